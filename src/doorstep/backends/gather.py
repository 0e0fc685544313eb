"""Gathers a batch's tensors, runs a `TensorInstance` once, and scatters what it returns. Knows no library.

The scheduler only puts requests together that can be stacked; requests whose stacking fails all the same get their own
error, and the others run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from doorstep.config.model import ModelConfig, TensorSpec
from doorstep.errors import BackendError
from doorstep.request import Batch, InferenceRequest
from doorstep.types import BYTES, Array, Tensor

if TYPE_CHECKING:
    from doorstep.backends.base import TensorInstance


def run_batch(instance: TensorInstance, batch: Batch) -> None:
    """Sets a result for every request of `batch`, or raises what `instance.run` raised."""
    config = instance.config
    requests = batch.requests
    wanted = _wanted(requests, config)
    first = requests[0]
    if len(requests) == 1:
        inputs = {name: tensor.array for name, tensor in first.inputs.items()}
    else:
        inputs = {name: np.concatenate([request.inputs[name].array for request in requests]) for name in first.inputs}
    if config.has_reshape:
        inputs = {name: _to_backend(array, config.inputs[name]) for name, array in inputs.items()}
    batch.input_end_ns = time.monotonic_ns()
    outputs = instance.run(inputs, wanted)
    batch.output_start_ns = time.monotonic_ns()
    tensors = [_checked(name, outputs, config) for name in wanted]
    if len(requests) == 1:
        batch.results[0] = tensors if not first.requested_outputs else _select(tensors, first)
        return
    for tensor in tensors:
        if tensor.array.ndim == 0 or tensor.array.shape[0] != batch.rows:
            raise BackendError(
                f"output '{tensor.name}' of model '{config.name}' has shape {list(tensor.array.shape)}, "
                f"but a batch of {batch.rows} must give {batch.rows} rows"
            )
    start = 0
    results = batch.results
    for i, request in enumerate(requests):
        end = start + request.rows
        piece = [Tensor(t.name, t.datatype, t.array[start:end]) for t in tensors]
        results[i] = piece if not request.requested_outputs else _select(piece, request)
        start = end


def _wanted(requests: list[InferenceRequest], config: ModelConfig) -> tuple[str, ...]:
    """The outputs that at least one request asks for, in the config's order."""
    everything = config.output_names
    asked: set[str] = set()
    for request in requests:
        if not request.requested_outputs:
            return everything
        asked.update(request.requested_outputs)
    return tuple(name for name in everything if name in asked)


def _select(tensors: list[Tensor], request: InferenceRequest) -> list[Tensor]:
    by_name = {t.name: t for t in tensors}
    return [by_name[name] for name in request.requested_outputs]


def _to_backend(array: Array, spec: TensorSpec) -> Array:
    """The array in the shape the library wants where `reshape` says so; the batch dimension, if any, stays."""
    if spec.reshape is None:
        return array
    lead = array.shape[:1] if len(spec.shape) > len(spec.dims) else ()
    return array.reshape(lead + spec.reshape)


def _checked(name: str, outputs: Mapping[str, Array], config: ModelConfig) -> Tensor:
    """One output as the config promises it: its datatype, and its wire shape if the library's differs by `reshape`."""
    spec = config.outputs[name]
    array = outputs.get(name)
    if array is None:
        raise BackendError(f"model '{config.name}' returned no output '{name}'")
    if spec.datatype is BYTES:
        array = _as_bytes(array)
    elif array.dtype != spec.datatype.numpy:
        raise BackendError(
            f"output '{name}' of model '{config.name}' is {array.dtype}, not the config's {spec.datatype.config_name}"
        )
    if spec.reshape is not None:
        lead = array.shape[:1] if len(spec.shape) > len(spec.dims) else ()
        dims = spec.dims
        if -1 not in dims or dims.count(-1) == 1:
            array = array.reshape(lead + dims)
    return Tensor(name, spec.datatype, array)


def _as_bytes(array: Array) -> Array:
    """A BYTES tensor as the rest of the server knows it: an object array of `bytes`."""
    flat = np.asarray(array, dtype=np.object_)
    if flat.size and all(type(value) is bytes for value in flat.flat):
        return flat
    result = np.empty(flat.shape, dtype=np.object_)
    result.flat = [value if type(value) is bytes else str(value).encode() for value in flat.flat]
    return result
