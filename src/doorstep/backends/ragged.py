"""Gathers batches whose requests have inputs of different sizes: `allow_ragged_batch`, `batch_input`, `batch_output`.

Knows no library. Triton's rule (docs/user_guide/ragged_batching.md; backend_input_collector.cc): a ragged input reaches
the model as one flat vector, all requests' elements one after another, and the inputs that `batch_input` describes tell
the model where each request's begin. `batch_output` says how to cut a flat output into the requests' pieces.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod

import numpy as np

from doorstep.backends.gather import Gatherer, Run, select, to_backend
from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError
from doorstep.request import Batch, InferenceRequest
from doorstep.types import BY_CONFIG_NUMBER, Array, DataType, Tensor


class RaggedGatherer(Gatherer):
    __slots__ = ("_batch_inputs", "_cut_like", "_ragged")

    def __init__(self, config: ModelConfig, run: Run) -> None:
        super().__init__(config, run)
        proto = config.proto
        self._ragged = frozenset(tensor.name for tensor in proto.input if tensor.allow_ragged_batch)
        self._batch_inputs = [
            (
                tuple(described.target_name),
                described.Kind.Name(described.kind),
                BY_CONFIG_NUMBER[described.data_type],
                described.source_input[0],
            )
            for described in proto.batch_input
        ]
        # Outputs that are cut by the shape of an input: output → input.
        self._cut_like = {described.target_name[0]: described.source_input[0] for described in proto.batch_output}

    def __call__(self, batch: Batch) -> None:
        requests = batch.requests
        inputs = {name: self._join(name, requests) for name in requests[0].inputs}
        for targets, kind, datatype, source in self._batch_inputs:
            described = describe(kind, datatype, [request.inputs[source].array.shape for request in requests])
            inputs.update(dict.fromkeys(targets, described))
        wanted = self._wanted(requests)
        batch.input_end_ns = time.monotonic_ns()
        outputs = self._run(inputs, wanted)
        batch.output_start_ns = time.monotonic_ns()
        pieces: list[list[Tensor]] = [[] for _ in requests]
        for name in wanted:
            datatype, _, spec = self._outputs[name]
            array = outputs.get(name)
            if name not in self._cut_like:
                cut = self._by_rows(name, self._settle(array, spec), batch)
            else:
                if array is None:
                    raise BackendError(f"model '{self._name}' returned no output '{name}'")
                source = self._cut_like[name]
                dims = (-1, *(spec.dims if spec.reshape is None else spec.reshape))
                cut = cut_like(name, array, [shape_like(dims, r.inputs[source].array.shape) for r in requests])
            for piece, part in zip(pieces, cut, strict=True):
                piece.append(Tensor(name, datatype, part))
        for i, request in enumerate(requests):
            batch.results[i] = pieces[i] if not request.requested_outputs else select(pieces[i], request)

    def _join(self, name: str, requests: Sequence[InferenceRequest]) -> Array:
        if name in self._ragged:
            return np.concatenate([request.inputs[name].array.ravel() for request in requests])
        joined = np.concatenate([request.inputs[name].array for request in requests])
        return to_backend(joined, self._inputs[name])

    def _by_rows(self, name: str, array: Array, batch: Batch) -> list[Array]:
        if array.ndim == 0 or array.shape[0] != batch.rows:
            raise BackendError(
                f"output '{name}' of model '{self._name}' has shape {list(array.shape)}, but a batch of {batch.rows} "
                f"must give {batch.rows} rows; batch_output says how to cut an output of another kind"
            )
        ends = np.cumsum([request.rows for request in batch.requests])[:-1]
        return np.split(array, ends)


def describe(kind: str, datatype: DataType, shapes: Sequence[Sequence[int]]) -> Array:
    """What a `batch_input` of this kind holds for requests whose source input has these shapes, batch size first."""
    counts = [prod(shape) for shape in shapes]
    dtype = datatype.numpy
    if kind == "BATCH_ELEMENT_COUNT":
        return np.array(counts, dtype)
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT":
        return np.cumsum(counts).astype(dtype)
    if kind == "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO":
        return np.cumsum([0, *counts]).astype(dtype)
    if kind == "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE":
        return np.zeros(max(counts), dtype)  # only its shape says something
    rows = [shape[1:] for shape in shapes for _ in range(shape[0])]  # BATCH_ITEM_SHAPE: a row per item
    array = np.array(rows, dtype).reshape(len(rows), len(shapes[0]) - 1)
    return array.ravel() if kind == "BATCH_ITEM_SHAPE_FLATTEN" else array


def shape_like(dims: Sequence[int], source: Sequence[int]) -> tuple[int, ...]:
    """An output's shape where -1 stands for the same dimension of the source input."""
    return tuple(source[i] if dim == -1 and i < len(source) else dim for i, dim in enumerate(dims))


def cut_like(name: str, array: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    flat = array.ravel()
    sizes = [prod(shape) for shape in shapes]
    if sum(sizes) != flat.size:
        raise BackendError(
            f"output '{name}' has {flat.size} elements, but the shapes of its requests' inputs ask for {sum(sizes)}"
        )
    return [part.reshape(shape) for part, shape in zip(np.split(flat, np.cumsum(sizes)[:-1]), shapes, strict=True)]
