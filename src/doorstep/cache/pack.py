"""An entry as bytes, and back. Pure. What comes back is checked: who else writes to the Redis is not known here."""

from __future__ import annotations

from math import prod
from struct import Struct
from struct import error as StructError
from typing import Any

import numpy as np
import orjson

from doorstep.cache.base import Entry, size_of
from doorstep.types import BYTES, DTYPES, Tensor, object_array

_MAGIC = b"DSC1"
_LENGTH = Struct("<I")


def pack_entry(entry: Entry) -> bytes:
    heads = []
    bodies = []
    for tensor in entry.outputs:
        data = _texts(tensor) if tensor.datatype is BYTES else tensor.array.tobytes()
        heads.append([tensor.name, tensor.datatype.name, tensor.array.shape, len(data)])
        bodies.append(data)
    head = orjson.dumps([heads, entry.parameters])
    return b"".join((_MAGIC, _LENGTH.pack(len(head)), head, *bodies))


def unpack_entry(data: bytes) -> Entry | None:
    """None for what no `pack_entry` has made."""
    try:
        if data[:4] != _MAGIC:
            return None
        start = 8 + _LENGTH.unpack_from(data, 4)[0]
        heads, parameters = orjson.loads(data[8:start])
        if not _are_parameters(parameters):
            return None
        outputs: list[Tensor] = []
        for name, datatype, shape, size in heads:
            kind = DTYPES[datatype]
            if type(name) is not str or size < 0 or any(name == tensor.name for tensor in outputs):
                return None
            if start + size > len(data):
                return None
            if kind is BYTES:
                array = object_array(_elements(data[start : start + size]), shape)
            elif prod(shape) * kind.itemsize != size:
                return None
            else:
                array = np.frombuffer(data, np.uint8, size, start).view(kind.numpy).reshape(shape)
            array.flags.writeable = False
            outputs.append(Tensor(name, kind, array))
            start += size
        if start != len(data):
            return None
        return Entry(tuple(outputs), parameters, size_of(outputs))
    except (ValueError, TypeError, LookupError, ArithmeticError, StructError):
        return None


def _are_parameters(value: Any) -> bool:
    if value is None:
        return True
    return type(value) is dict and all(type(each) in (bool, int, float, str) for each in value.values())


def _texts(tensor: Tensor) -> bytes:
    elements = [e if type(e) is bytes else str(e).encode() for e in tensor.array.ravel().tolist()]
    return b"".join([_LENGTH.pack(len(e)) + e for e in elements])


def _elements(data: bytes) -> list[bytes]:
    elements = []
    offset = 0
    while offset < len(data):
        end = offset + 4 + _LENGTH.unpack_from(data, offset)[0]
        if end > len(data):
            raise ValueError("cut off")
        elements.append(data[offset + 4 : end])
        offset = end
    return elements
