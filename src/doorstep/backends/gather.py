"""Gathers a batch's tensors, runs a `TensorInstance` once, and scatters what it returns. Knows no library.

The scheduler only puts requests together whose shapes can be stacked, so gathering cannot fail for one of them alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from doorstep.config.model import ModelConfig, TensorSpec
from doorstep.errors import BackendError
from doorstep.request import Batch, InferenceRequest
from doorstep.types import BYTES, Array, Tensor, object_array

Run = Callable[[Mapping[str, Array], tuple[str, ...]], Mapping[str, Array]]


class Gatherer:
    """What of gathering and scattering is the same for all batches of a model, worked out once."""

    __slots__ = ("_everything", "_has_reshape", "_inputs", "_name", "_outputs", "_run")

    def __init__(self, config: ModelConfig, run: Run) -> None:
        self._name = config.name
        self._run = run
        self._inputs = config.inputs
        self._has_reshape = config.has_reshape
        self._everything = config.output_names
        # Per output: its datatype, the dtype the array must have (None: it needs more than a look), and its spec.
        self._outputs = {
            name: (
                spec.datatype,
                None if spec.datatype is BYTES or spec.reshape is not None else spec.datatype.numpy,
                spec,
            )
            for name, spec in config.outputs.items()
        }

    def __call__(self, batch: Batch) -> None:
        """Sets a result for every request of `batch`, or raises what the model raised."""
        requests = batch.requests
        alone = len(requests) == 1
        first = requests[0]
        inputs: dict[str, Array]
        if alone:
            inputs = {name: tensor.array for name, tensor in first.inputs.items()}
        else:
            inputs = {name: np.concatenate([r.inputs[name].array for r in requests]) for name in first.inputs}
        if self._has_reshape:
            inputs = {name: to_backend(array, self._inputs[name]) for name, array in inputs.items()}
        wanted = self._wanted(requests)
        batch.input_end_ns = time.monotonic_ns()
        outputs = self._run(inputs, wanted)
        batch.output_start_ns = time.monotonic_ns()
        tensors = []
        for name in wanted:
            datatype, dtype, spec = self._outputs[name]
            array = outputs.get(name)
            if array is None or dtype is None or array.dtype != dtype:
                array = self._settle(array, spec)
            tensors.append(Tensor(name, datatype, array))
        if alone:
            batch.results[0] = tensors if not first.requested_outputs else select(tensors, first)
        else:
            self._scatter(batch, tensors)

    def _scatter(self, batch: Batch, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.array.ndim == 0 or tensor.array.shape[0] != batch.rows:
                raise BackendError(
                    f"output '{tensor.name}' of model '{self._name}' has shape {list(tensor.array.shape)}, "
                    f"but a batch of {batch.rows} must give {batch.rows} rows"
                )
        start = 0
        results = batch.results
        for i, request in enumerate(batch.requests):
            end = start + request.rows
            piece = [Tensor(t.name, t.datatype, t.array[start:end]) for t in tensors]
            results[i] = piece if not request.requested_outputs else select(piece, request)
            start = end

    def _wanted(self, requests: list[InferenceRequest]) -> tuple[str, ...]:
        """The outputs that at least one request asks for, in the config's order."""
        asked: set[str] = set()
        for request in requests:
            if not request.requested_outputs:
                return self._everything
            asked.update(request.requested_outputs)
        return tuple(name for name in self._everything if name in asked)

    def _settle(self, array: Array | None, spec: TensorSpec) -> Array:
        """The output as the config promises it: its datatype, and the wire's shape where the library's is another."""
        if array is None:
            raise BackendError(f"model '{self._name}' returned no output '{spec.name}'")
        if spec.datatype is BYTES:
            array = _as_bytes(array)
        elif array.dtype != spec.datatype.numpy:
            raise BackendError(
                f"output '{spec.name}' of model '{self._name}' is {array.dtype}, "
                f"not the config's {spec.datatype.config_name}"
            )
        if spec.reshape is not None and spec.dims.count(-1) <= 1:
            lead = array.shape[:1] if len(spec.shape) > len(spec.dims) else ()
            array = array.reshape(lead + spec.dims)
        return array


def select(tensors: list[Tensor], request: InferenceRequest) -> list[Tensor]:
    """Those the request asks for, in the model's order: Triton's, whatever the request's is."""
    return [t for t in tensors if t.name in request.requested_outputs]


def to_backend(array: Array, spec: TensorSpec) -> Array:
    """The array in the shape the library wants where `reshape` says so; the batch dimension, if any, stays."""
    if spec.reshape is None:
        return array
    lead = array.shape[:1] if len(spec.shape) > len(spec.dims) else ()
    return array.reshape(lead + spec.reshape)


def _as_bytes(array: Array) -> Array:
    """A BYTES tensor as the rest of the server knows it: an object array of `bytes`."""
    values: list[object] = array.ravel().tolist()
    if array.dtype == np.object_ and all(type(value) is bytes for value in values):
        return array
    return object_array([value if isinstance(value, bytes) else str(value).encode() for value in values], array.shape)
