"""Gives back what it gets: output i is input i. For measuring what serving costs when the model costs nothing.

Knows no library. The config must list as many outputs as inputs, in the same order, with the same datatypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doorstep.backends.base import Backend, CompletionContext, InstanceContext, ModelInstance, TensorInstance
from doorstep.errors import ConfigError, Problem
from doorstep.types import Array


class IdentityBackend(Backend):
    name = "identity"
    default_execution = "inline"

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        problems = []
        if not proto.input:
            problems.append(Problem("input", "backend 'identity' needs at least one input", "add input { … }"))
        if not proto.output:
            for tensor in proto.input:
                copy = proto.output.add()
                copy.name = tensor.name.replace("INPUT", "OUTPUT")
                copy.data_type = tensor.data_type
                copy.dims.extend(tensor.dims)
        if len(proto.input) != len(proto.output):
            problems.append(
                Problem(
                    "output",
                    f"backend 'identity' needs one output per input: {len(proto.input)} in, {len(proto.output)} out",
                )
            )
        else:
            for i, (a, b) in enumerate(zip(proto.input, proto.output, strict=True)):
                if a.data_type != b.data_type:
                    problems.append(Problem(f"output[{i}].data_type", f"differs from input[{i}]'s", "make them equal"))
        if problems:
            raise ConfigError(proto.name, problems)

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        return IdentityInstance(context)


class IdentityInstance(TensorInstance):
    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context.config)
        self._source = dict(zip(context.config.outputs, context.config.inputs, strict=True))

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        return {name: inputs[self._source[name]] for name in outputs}
