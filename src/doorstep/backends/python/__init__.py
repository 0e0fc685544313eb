"""Runs models written in Python: `doorstep.Model` with type hints, or Triton's `TritonPythonModel`. Knows no process.

Model code is imported by `complete_config` and `load_instance` alike; whoever calls them does so in a worker process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doorstep.backends.base import Backend, CompletionContext, Execution, InstanceContext, ModelInstance


class PythonBackend(Backend):
    name = "python"
    default_filename = "model.py"
    default_execution: Execution = "process"
    models_are_code = True

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        from doorstep.backends.python.api import Model
        from doorstep.backends.python.source import load_source

        source = load_source(proto, model_directory, version_directory)
        if issubclass(source.model, Model):
            from doorstep.backends.python.complete import complete_from_hints

            complete_from_hints(proto, source)
        else:
            from doorstep.backends.python.triton_instance import complete_from_triton

            complete_from_triton(proto, source)

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        from doorstep.backends.python.api import Model
        from doorstep.backends.python.source import load_source

        source = load_source(context.config.proto, context.model_directory, context.version_directory)
        if issubclass(source.model, Model):
            from doorstep.backends.python.instance import PredictInstance

            return PredictInstance(source, context)
        from doorstep.backends.python.triton_instance import TritonInstance

        return TritonInstance(source, context)
