"""Models whose code sees batches as a worker process does: `execute(batch)` in model.py, with `context` beside it.

For tests of the transport alone, whatever the API of Python models makes of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from doorstep.backends import table
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.testing.python_models import PythonModel
from doorstep.types import Tensor, datatype_of

BACKEND = '''
import threading
from doorstep.backends.base import Backend, ModelInstance

class RawInstance(ModelInstance):
    def __init__(self, names):
        self.names = names
    def execute(self, batch):
        self.names["execute"](batch)
    def is_ready(self):
        return self.names["is_ready"]()
    def may_be_unready(self):
        return "is_ready" in self.names
    def unload(self):
        self.names.get("unload", lambda: None)()

class RawBackend(Backend):
    name = "raw"
    default_filename = "model.py"
    default_execution = "process"
    def load_instance(self, context):
        names = {"context": context, "server": context.server}
        exec(compile(START + context.artefact("model.py").read_text(), "model.py", "exec"), names)
        return RawInstance(names)

START = """
import os, signal, threading, time
import numpy as np
from doorstep.backends.base import ModelCall
from doorstep.errors import DoorstepError, BackendError
from doorstep.request import LATER, RESCHEDULE, Outputs
from doorstep.types import Tensor, datatype_of
def tensor(values, name="y"):
    array = np.asarray(values)
    return Tensor(name, datatype_of(array), array)
def say(*what):
    context.log("INFO", " ".join(map(str, what)))
"""
'''


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """Gives a function: (source, **rest) → a PythonModel of the raw backend."""
    packages = tmp_path / "packages"
    (packages / "raw_backend-1.dist-info").mkdir(parents=True)
    (packages / "raw_backend.py").write_text(BACKEND)
    (packages / "raw_backend-1.dist-info" / "entry_points.txt").write_text(
        "[doorstep.backends]\nraw = raw_backend:RawBackend\n"
    )
    (packages / "raw_backend-1.dist-info" / "METADATA").write_text("Name: raw-backend\nVersion: 1\n")
    monkeypatch.syspath_prepend(str(packages))
    monkeypatch.setenv("PYTHONPATH", str(packages) + os.pathsep + os.environ.get("PYTHONPATH", ""))

    def make(source: str, name: str = "raw", **rest: Any) -> PythonModel:
        return PythonModel(tmp_path / name, source, backend="raw", **rest)

    yield make
    table._loaded.pop("raw", None)
    sys.modules.pop("raw_backend", None)


class Heard:
    """What a request's responses said, in order. Its `emit` is a batch's."""

    def __init__(self) -> None:
        self.said: list[tuple[InferenceRequest, Any, bool]] = []

    def emit(self, request: InferenceRequest, outputs: Any, final: bool) -> None:
        self.said.append((request, outputs, final))

    def of(self, request: InferenceRequest) -> list[tuple[Any, bool]]:
        return [(outputs, final) for one, outputs, final in self.said if one is request]


class Sender:
    def __init__(self) -> None:
        self.responses: list[tuple[InferenceResponse, bool]] = []

    def send(self, response: InferenceResponse, final: bool) -> None:
        self.responses.append((response, final))


def tensor(values: Any, name: str = "y") -> Tensor:
    array = np.asarray(values)
    return Tensor(name, datatype_of(array), array)


__all__ = ["Heard", "Path", "Sender", "raw", "tensor"]
