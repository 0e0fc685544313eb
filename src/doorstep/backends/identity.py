"""Gives back what it gets: output i is input i. For measuring what serving costs when the model costs nothing,
or as much time as its config says.

Knows no library. The config must list as many outputs as inputs, in the same order, with the same datatypes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from doorstep.backends.base import Backend, CompletionContext, InstanceContext, ModelInstance, TensorInstance
from doorstep.errors import ConfigError, Problem
from doorstep.request import Batch
from doorstep.types import BYTES, Array, Tensor

# Parameters of Triton's identity backend: how long each execution takes, times the instance's number where there is a
# multiplier (and the number is not 0), and how long the model takes to load.
DELAY_MS, MULTIPLIER, CREATION_S = "execute_delay_ms", "instance_wise_delay_multiplier", "creation_delay_sec"


class IdentityBackend(Backend):
    name = "identity"
    default_execution = "inline"

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        problems = _number_problems(proto)
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
        if _number(proto, DELAY_MS) and "execution" not in proto.parameters:
            proto.parameters["execution"].string_value = "thread"  # nobody sleeps on the event loop

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        if context.instance_name.endswith("_0"):
            time.sleep(_number(context.config.proto, CREATION_S))
        return IdentityInstance(context)


class IdentityInstance(TensorInstance):
    def __init__(self, context: InstanceContext) -> None:
        super().__init__(context.config)
        self._source = dict(zip(context.config.outputs, context.config.inputs, strict=True))
        number = int(context.instance_name.rpartition("_")[2] or 0)
        factor = max(_number(context.config.proto, MULTIPLIER) * number, 1)
        self._delay_s = _number(context.config.proto, DELAY_MS) * factor / 1000

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        if self._delay_s:
            time.sleep(self._delay_s)
        return self._outputs(inputs, outputs)

    def execute(self, batch: Batch) -> None:
        if not self.config.ragged:
            super().execute(batch)
            return
        time.sleep(self._delay_s)
        for i, request in enumerate(batch.requests):  # what is of several shapes is given back one by one
            arrays = {name: tensor.array for name, tensor in request.inputs.items()}
            wanted = tuple(name for name in self._source if name in (request.requested_outputs or self._source))
            given = self._outputs(arrays, wanted)
            batch.results[i] = [Tensor(name, self.config.outputs[name].datatype, x) for name, x in given.items()]

    def _outputs(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        try:
            return {name: inputs[self._source[name]] for name in outputs}
        except KeyError:  # the client left an optional input out
            rows = len(next(iter(inputs.values()), "1"))
            given = {name: inputs.get(self._source[name]) for name in outputs}
            return {name: self._zeros(name, rows) if array is None else array for name, array in given.items()}

    def _zeros(self, name: str, rows: int) -> Array:
        """As Triton's: of the shape that the config gives, 1 where it leaves a size open."""
        spec = self.config.outputs[name]
        dims = spec.dims if spec.reshape is None else spec.reshape
        shape = ((rows,) if self.config.max_batch_size else ()) + tuple(abs(size) for size in dims)
        return np.full(shape, b"" if spec.datatype is BYTES else 0, spec.datatype.numpy)


def _number(proto: Any, name: str) -> int:
    return int(proto.parameters[name].string_value) if name in proto.parameters else 0


def _number_problems(proto: Any) -> list[Problem]:
    """Of the parameters that must be numbers. `name in proto.parameters` first: looking one up in a map adds it."""
    return [
        Problem(f'parameters["{name}"]', f"is '{proto.parameters[name].string_value}'", "write a whole number")
        for name in (DELAY_MS, MULTIPLIER, CREATION_S)
        if name in proto.parameters and not proto.parameters[name].string_value.isdecimal()
    ]
