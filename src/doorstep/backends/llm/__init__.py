"""Language models: one backend per engine, all behind `LLMEngine`. Knows no protocol and no queue.

Adding an engine is a file, or a folder, with an LLMEngine, and a row in engines.py and in `backends/table.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from doorstep.backends.base import Backend, CompletionContext, Execution, InstanceContext, ModelInstance
from doorstep.backends.llm.complete import complete_config
from doorstep.backends.llm.engine import LLMEngine
from doorstep.backends.llm.engines import ENGINES, EngineRow
from doorstep.backends.llm.settings import read_settings
from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError

FEW_CORES = 4


class LLMBackend(Backend):
    """One engine's. `row` is that of an engine that is not among ours (docs/adding-a-backend.md)."""

    default_execution: Execution = "process"

    def __init__(self, name: str, row: EngineRow | None = None) -> None:
        self.name = name
        self._row = row or ENGINES[name]
        self.default_filename = self._row.filename

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        complete_config(self._row, proto, version_directory, context.backend_config)

    def slots(self, config: ModelConfig) -> int:
        return int(config.parameters["slots"])

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        from doorstep.backends.llm.instance import LLMInstance

        row = self._row
        try:
            engine_class: type[LLMEngine] = getattr(importlib.import_module(row.module), row.attribute)
        except ImportError as error:
            raise BackendError(f"backend '{self.name}' needs {error.name}: pip install '{row.install}'") from error
        settings = read_settings(
            context.config.name,
            context.config.parameters,
            context.artefact(self.default_filename),
            context.version_directory,
            context.backend_config,
        )
        if not settings.threads:
            settings = replace(settings, threads=_threads(context.threads or settings.thread_count))
        if context.kind == "KIND_GPU":
            settings = replace(settings, gpu=context.device_id)
        log = context.log or (lambda level, message: None)
        engine = engine_class(settings, log)
        engine.load()
        return LLMInstance(engine)


def _threads(cores: int) -> int:
    """Of many cores one is left to who answers clients: an engine's threads wait for each other, and one that has lost
    its core holds up all. Of few, each is worth more than that."""
    return cores if cores <= FEW_CORES else cores - 1


LlamaCppBackend = partial(LLMBackend, "llamacpp")
TransformersBackend = partial(LLMBackend, "transformers")
VllmBackend = partial(LLMBackend, "vllm")
OpenVinoBackend = partial(LLMBackend, "openvino")
