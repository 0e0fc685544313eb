"""Requests made up for a model: zeros, noise or a file's bytes, to measure it and to warm it up. Knows no thread.

Warm-up follows Triton's `model_warmup`: `count` times a batch of `batch_size` equal samples, before the model is ready.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from doorstep.backends.base import ModelInstance
from doorstep.config.model import ModelConfig, TensorSpec
from doorstep.errors import ConfigError, DoorstepError, Problem
from doorstep.request import Batch, InferenceRequest, InferenceResponse
from doorstep.types import BOOL, BY_CONFIG_NUMBER, BYTES, Array, DataType, Tensor, object_array

Make = Callable[[DataType, tuple[int, ...]], Array]


class _Nobody:
    """The sender of requests that nobody waits for."""

    def send(self, response: InferenceResponse, final: bool) -> None: ...


NOBODY = _Nobody()


def zeros(datatype: DataType, shape: tuple[int, ...]) -> Array:
    if datatype is BYTES:
        return np.full(shape, b"", dtype=np.object_)
    return np.zeros(shape, dtype=datatype.numpy)


def noise(datatype: DataType, shape: tuple[int, ...]) -> Array:
    """Random values any model of the datatype can take: 0..1 for floats, small numbers for integers."""
    random = np.random.default_rng(0)
    if datatype is BYTES:
        return object_array([random.bytes(8).hex().encode() for _ in range(math.prod(shape))], shape)
    if datatype is BOOL or datatype.numpy.kind in "iu":
        return random.integers(0, 2 if datatype is BOOL else 100, shape).astype(datatype.numpy)
    return random.random(shape).astype(datatype.numpy)


def sample_request(config: ModelConfig, rows: int, make: Make = zeros) -> InferenceRequest:
    """A request of `rows` rows whose free dimensions are 1 and whose optional inputs are left out."""
    inputs = {name: _sample(config, config.inputs[name], rows, make) for name in config.required_inputs}
    request = InferenceRequest(config.name, inputs, NOBODY)
    request.rows = rows
    return request


def _sample(config: ModelConfig, spec: TensorSpec, rows: int, make: Make) -> Tensor:
    dims = tuple(1 if d < 0 else d for d in spec.dims)
    shape = (rows, *dims) if len(spec.shape) > len(spec.dims) else dims
    return Tensor(spec.name, spec.datatype, make(spec.datatype, shape))


def sample_bytes(config: ModelConfig, rows: int) -> int:
    """How large the inputs of `sample_request` are, without making them."""
    total = 0
    for name in config.required_inputs:
        spec = config.inputs[name]
        dims = math.prod(1 if d < 0 else d for d in spec.dims)
        total += dims * max(spec.datatype.itemsize, 1) * (rows if len(spec.shape) > len(spec.dims) else 1)
    return total


def measure_ns(instance: ModelInstance, config: ModelConfig, runs: int = 5, enough_ns: int = 10_000_000) -> int | None:
    """The quickest of a few runs at the largest batch, the first not counted; None where zeros are no fit input.

    Stops early once a run took `enough_ns`."""
    rows = max(config.max_batch_size, 1)
    best: int | None = None
    for run in range(runs + 1):
        batch = Batch([sample_request(config, rows)], rows)
        start = time.monotonic_ns()
        try:
            instance.execute(batch)
        except Exception:
            return None
        took = time.monotonic_ns() - start
        if isinstance(batch.results[0], DoorstepError):
            return None
        if run and (best is None or took < best):
            best = took
        if run and took > enough_ns:
            return best
    return best


def warmup_batches(config: ModelConfig, model_directory: Path) -> Iterator[tuple[str, Batch]]:
    """(sample name, batch) for each run `model_warmup` asks for. Raises ConfigError for a sample that cannot be."""
    for sample in config.proto.model_warmup:
        inputs = {
            name: _warmup_tensor(config, sample.name, name, model_directory, given)
            for name, given in sample.inputs.items()
        }
        size = max(sample.batch_size, 1)
        for _ in range(max(sample.count, 1)):
            requests = (InferenceRequest(config.name, dict(inputs), NOBODY, id="warmup") for _ in range(size))
            if config.max_batch_size > 0:
                yield sample.name, Batch(list(requests), size)
            else:
                for request in requests:
                    yield sample.name, Batch([request], 1)


def _warmup_tensor(config: ModelConfig, sample: str, name: str, model_directory: Path, given: Any) -> Tensor:
    datatype = BY_CONFIG_NUMBER[given.data_type]
    shape = tuple(given.dims)
    match given.WhichOneof("input_data_type"):
        case "input_data_file":
            path = model_directory / "warmup" / given.input_data_file
            try:
                array = _from_file(path, datatype, shape)
            except (OSError, ValueError) as error:
                what = error.strerror if isinstance(error, OSError) else error
                problem = Problem(f"model_warmup '{sample}' input '{name}'", f"cannot use warmup/{path.name}: {what}")
                raise ConfigError(config.name, [problem]) from None
        case "random_data":
            array = noise(datatype, shape)
        case _:
            array = zeros(datatype, shape)
    return Tensor(name, datatype, array[np.newaxis] if config.max_batch_size > 0 else array)


def _from_file(path: Path, datatype: DataType, shape: tuple[int, ...]) -> Array:
    """Raises OSError, or ValueError where the file does not hold what `shape` asks for."""
    data = path.read_bytes()
    count = math.prod(shape)
    if datatype is BYTES:
        values = _split_bytes(data)
        if len(values) != count:
            raise ValueError(f"it holds {len(values)} strings, dims ask for {count}")
        return object_array(values, shape)
    if len(data) != count * datatype.itemsize:
        raise ValueError(f"it holds {len(data)} bytes, dims and datatype ask for {count * datatype.itemsize}")
    return np.frombuffer(data, dtype=datatype.numpy).reshape(shape)


def _split_bytes(data: bytes) -> list[bytes]:
    """Strings as the V2 binary extension lays them out: a 4-byte little-endian length, then the bytes."""
    values = []
    at = 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        values.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return values
