"""Runs models written in Python: `doorstep.Model` with type hints, or Triton's `TritonPythonModel`. Knows no process.

Model code is imported by `complete_config` and `load_instance` alike; whoever calls them does so in a worker process.
A python-based backend is this backend with the model.py of a folder of --backend-directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doorstep.backends.base import (
    Backend,
    CompletionContext,
    Execution,
    InstanceContext,
    ModelInstance,
    PythonEnvironment,
)


class PythonBackend(Backend):
    name = "python"
    default_filename = "model.py"
    default_execution: Execution = "process"
    models_are_code = True

    def __init__(self, file: Path | None = None) -> None:
        """`file` is the model.py of a python-based backend, `<directory>/<backend>/model.py`."""
        self._file = file
        if file is not None:
            self.name = file.parent.name

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        from doorstep.backends.python.api import Model
        from doorstep.backends.python.source import load_source

        if self._file is not None:
            proto.runtime = self._file.name
        source = load_source(proto, model_directory, version_directory, self._file)
        if issubclass(source.model, Model):
            from doorstep.backends.python.complete import complete_from_hints

            complete_from_hints(proto, source)
        else:
            from doorstep.backends.python.triton_instance import complete_from_triton

            complete_from_triton(proto, source)

    def environment(
        self, proto: Any, model_directory: Path, version_directory: Path, backend_config: Mapping[str, str]
    ) -> PythonEnvironment | None:
        from doorstep.backends.python.environments import environment_of

        backend_directory = self._file.parent if self._file is not None else None
        return environment_of(proto, model_directory, version_directory, backend_config, backend_directory)

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        from doorstep.backends.python.api import Model
        from doorstep.backends.python.source import load_source

        source = load_source(context.config.proto, context.model_directory, context.version_directory, self._file)
        if issubclass(source.model, Model):
            from doorstep.backends.python.instance import PredictInstance

            return PredictInstance(source, context)
        from doorstep.backends.python.triton_instance import TritonInstance

        return TritonInstance(source, context)
