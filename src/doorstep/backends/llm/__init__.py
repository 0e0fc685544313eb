"""Language models: one backend per engine, all behind `LLMEngine`. Knows no protocol and no queue.

Adding an engine is a file with an LLMEngine, and a row in `ENGINES` and in `backends/table.py`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from doorstep.backends.base import Backend, CompletionContext, Execution, InstanceContext, ModelInstance
from doorstep.backends.llm import complete
from doorstep.backends.llm.settings import read_settings
from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError

# engine → (module, class, what to install when its library is missing)
ENGINES = {
    "llamacpp": ("doorstep.backends.llm.llamacpp", "LlamaCppEngine", "xllamacpp"),
    "transformers": ("doorstep.backends.llm.transformers_engine", "TransformersEngine", "doorstep[transformers]"),
    "vllm": ("doorstep.backends.llm.vllm", "VllmEngine", "doorstep[vllm]"),
    "openvino": ("doorstep.backends.llm.openvino", "OpenVinoEngine", "doorstep[openvino]"),
}


class LLMBackend(Backend):
    """One engine's."""

    default_execution: Execution = "process"

    def __init__(self, engine: str) -> None:
        self.name = engine
        self.default_filename = complete.DEFAULT_FILENAMES[engine]

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        complete.complete_config(self.name, proto, version_directory, context.backend_config)

    def slots(self, config: ModelConfig) -> int:
        return int(config.parameters["slots"])

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        from doorstep.backends.llm.instance import LLMInstance

        module, attribute, install = ENGINES[self.name]
        try:
            engine_class = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise BackendError(f"backend '{self.name}' needs {error.name}: pip install '{install}'") from error
        settings = read_settings(
            context.config.name,
            context.config.parameters,
            context.artefact(self.default_filename),
            context.version_directory,
            context.backend_config,
        )
        if not settings.threads:
            # An engine's threads spin while they wait for each other: where they take every core, the thread that must
            # answer clients takes one of theirs away, and all the others spin for it.
            settings = replace(settings, threads=max((context.threads or settings.thread_count) - 1, 1))
        if context.kind == "KIND_GPU":
            settings = replace(settings, gpu=context.device_id)
        log = context.log or (lambda level, message: None)
        engine = engine_class(settings, log)
        engine.load()
        return LLMInstance(engine)


class LlamaCppBackend(LLMBackend):
    def __init__(self) -> None:
        super().__init__("llamacpp")


class TransformersBackend(LLMBackend):
    def __init__(self) -> None:
        super().__init__("transformers")


class VllmBackend(LLMBackend):
    def __init__(self) -> None:
        super().__init__("vllm")


class OpenVinoBackend(LLMBackend):
    def __init__(self) -> None:
        super().__init__("openvino")
