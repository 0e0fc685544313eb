"""Tensors as bytes, both ways: row-major, little-endian; BYTES with a length before each element. Knows no message."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from doorstep.errors import Internal
from doorstep.protocols.kserve.bytes_tensors import decode_bytes, encode_bytes
from doorstep.types import BYTES, DTYPES, DataType, Tensor
from doorstep.validation import INVALID, MOST_DIMENSIONS, UnfitTensor
from doorstep.wire.exchange import Buffer

_COPIED_BYTES = 16_384  # below it a copy costs less than handing on one more buffer
_ndarray = np.ndarray


def binary_tensor(name: str, datatype: DataType, shape: Sequence[int], data: Buffer) -> Tensor:
    """A tensor that is a view on `data`; an UnfitTensor where they are not what `shape` needs."""
    if datatype is BYTES:
        return decode_bytes(name, shape, data)
    size = len(data)
    if datatype is not INVALID and len(shape) <= MOST_DIMENSIONS and prod(shape) * datatype.itemsize == size:
        try:
            return Tensor(name, datatype, _ndarray(shape, datatype.numpy, data))
        except (ValueError, TypeError):  # a negative dimension, or more dimensions than an array can have
            pass
    return UnfitTensor(name, datatype, shape, size)


def quick_binary_tensor(item: Any, body: Buffer, offset: int) -> Tensor | None:
    """The tensor of a JSON input that has nothing but a name, a shape, a datatype of fixed size and binary data, at
    `offset` of `body` and as many as it needs; None for all others."""
    try:
        parameters = item["parameters"]
        datatype = DTYPES[item["datatype"]]
        shape = item["shape"]
        size = parameters["binary_data_size"]
        if (
            len(item) == 4
            and len(parameters) == 1
            and type(size) is int
            and len(shape) <= MOST_DIMENSIONS
            and size == prod(shape) * datatype.itemsize > 0
            and min(shape) > 0
            and type(item["name"]) is str
        ):
            return Tensor(item["name"], datatype, _ndarray(shape, datatype.numpy, body, offset))
    except (KeyError, TypeError, ValueError, OverflowError):  # whatever it is, the long way says it
        pass
    return None


def tensor_bytes(tensor: Tensor) -> Buffer:
    """The bytes of a tensor: a flat view on it, or a copy where it is small."""
    array = tensor.array
    if tensor.datatype is BYTES:
        return encode_bytes(array)
    if array.dtype != tensor.datatype.numpy:
        raise Internal(f"output '{tensor.name}' is {array.dtype}, not {tensor.datatype}")
    if array.nbytes <= _COPIED_BYTES:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
