"""Arrays as the bytes of the binary tensor extension, and back. Knows no message.

The client's own, so that it is light to import: the server's codec brings the server's protocols along.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from struct import pack, unpack_from

import numpy as np

from doorstep.errors import Internal
from doorstep.types import BYTES, Array, DataType, Tensor

Buffer = bytes | bytearray | memoryview


def to_bytes(tensor: Tensor) -> Buffer:
    """Row-major and little-endian; each element of BYTES after its length in four bytes. Copies only what it must."""
    if tensor.datatype is BYTES:
        return b"".join([part for item in tensor.array.ravel() for part in (pack("<I", len(item)), item)])
    array = np.ascontiguousarray(tensor.array)
    return array.reshape(-1).view(np.uint8).data if array.size else b""


def from_bytes(name: str, datatype: DataType, shape: Sequence[int], data: memoryview) -> Array:
    """A view on `data`, or an object array of `bytes`. Raises Internal where the two do not fit."""
    if datatype is BYTES:
        elements = _elements(data)
        if elements is not None and len(elements) == prod(shape):
            array = np.empty(len(elements), np.object_)
            array[:] = elements
            return array.reshape(shape)
    elif datatype.itemsize * prod(shape) == len(data):
        return np.frombuffer(data, datatype.numpy).reshape(shape)
    raise Internal(f"the server's output '{name}' has {len(data)} bytes, which is no {datatype} of shape {list(shape)}")


def _elements(data: memoryview) -> list[bytes] | None:
    elements = []
    offset = 0
    while offset < len(data):
        start = offset + 4
        if start > len(data):
            return None
        offset = start + unpack_from("<I", data, offset)[0]
        if offset > len(data):
            return None
        elements.append(bytes(data[start:offset]))
    return elements
