"""The `data` of a JSON tensor as an array. Knows no request.

The quick way is `array.array(list)`, three times as fast as numpy for a few elements. It takes what it should not (true
is a number to it), so it is for texts that hold no such word. Errors: server, http_server.cc: ReadDataFromJson.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import chain
from math import prod
from typing import Any

import numpy as np

from doorstep.errors import DoorstepError, Internal, InvalidArgument
from doorstep.protocols.kserve.bytes_tensors import tensor_of_elements
from doorstep.protocols.kserve.json_text import MAX_DEPTH, TOO_DEEP
from doorstep.types import (
    BF16,
    BOOL,
    BYTES,
    DTYPES,
    FP16,
    FP32,
    FP64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DataType,
    Tensor,
)
from doorstep.validation import INT64_MAX, MOST_DIMENSIONS, UnfitTensor, shape_text

_TYPECODES: dict[DataType, str] = {
    FP32: "f", FP64: "d", INT8: "b", INT16: "h", INT32: "i", INT64: "q", UINT8: "B", UINT16: "H", UINT32: "I",
    UINT64: "Q",
}  # fmt: skip
assert all(array(code).itemsize == datatype.itemsize for datatype, code in _TYPECODES.items())

_ndarray = np.ndarray


def quick_json_tensor(item: Any) -> Tensor | None:
    """The tensor of a JSON input that has nothing but a name, a shape, a numeric datatype and flat, fitting data; None
    for all others. Only for a text without `true` and `false`, and so short that its data are within the limits."""
    try:
        datatype = DTYPES[item["datatype"]]
        values = array(_TYPECODES[datatype], item["data"])
        shape = item["shape"]
        if (
            len(item) == 4
            and len(shape) <= MOST_DIMENSIONS
            and len(values) == prod(shape)
            and min(shape) > 0
            and type(item["name"]) is str
        ):
            return Tensor(item["name"], datatype, _ndarray(shape, datatype.numpy, values))
    except (KeyError, TypeError, ValueError, OverflowError):  # whatever it is, the long way says it
        pass
    return None


def json_tensor(name: str, datatype: DataType, shape: list[int], data: Any) -> Tensor:
    """The tensor that a JSON input's `data` spells, nested or flat. `shape` has been through `empty_or_refused`."""
    if type(data) is not list:
        raise Internal("Unable to parse 'data': attempt to access JSON non-array as array")
    if datatype is BYTES:
        elements = flatten(data, "")
        if not all(type(e) is str for e in elements):
            raise Internal("Unable to parse JSON bytes array: attempt to access JSON non-string as string")
        return tensor_of_elements(name, shape, [e.encode() for e in elements])
    if datatype is FP16 or datatype is BF16:
        raise InvalidArgument(
            f"receiving {datatype} data via JSON is not supported. Please use the binary data format for input {name}"
        )
    typecode = _TYPECODES.get(datatype)
    if typecode is None and datatype is not BOOL:
        raise InvalidArgument(f"invalid datatype for input {name}")
    elements = flatten(data, "Unable to parse 'data': ")
    types = set(map(type, elements))
    count = prod(shape)
    if len(elements) != count or not types <= _RIGHT_TYPES[datatype]:
        raise _what_is_wrong(datatype, count, elements)
    try:
        values: Any = bytearray(elements) if typecode is None else array(typecode, elements)
    except OverflowError:
        raise _what_is_wrong(datatype, count, elements) from None
    try:
        return Tensor(name, datatype, _ndarray(shape, datatype.numpy, values))
    except ValueError:  # more dimensions than an array can have
        return UnfitTensor(name, datatype, shape, count * datatype.itemsize)


_INT, _NUMBER = frozenset({int}), frozenset({int, float})
_RIGHT_TYPES: dict[DataType, frozenset[type]] = dict.fromkeys(_TYPECODES, _INT)
_RIGHT_TYPES |= {BOOL: frozenset({bool}), FP32: _NUMBER, FP64: _NUMBER}


def flatten(data: list[Any], prefix: str) -> list[Any]:
    """The scalars of nested lists in order; levels of lists only, as real clients send them, go by in C."""
    elements = data
    for level in range(MAX_DEPTH - 1):  # the outermost list is a level as well
        types = set(map(type, elements))
        if list not in types:
            return elements
        if len(types) > 1:
            return _flatten_mixed(elements, MAX_DEPTH - 2 - level, prefix)
        elements = list(chain.from_iterable(elements))
    raise InvalidArgument(prefix + TOO_DEEP)


def _flatten_mixed(data: list[Any], levels: int, prefix: str) -> list[Any]:
    """The same for scalars beside lists, which nest at most `levels` deep; every element is looked at once."""
    elements: list[Any] = []
    open_: list[Iterator[Any]] = [iter(data)]
    while open_:
        for element in open_[-1]:
            if type(element) is list:
                if len(open_) > levels:
                    raise InvalidArgument(prefix + TOO_DEEP)
                open_.append(iter(element))
                break
            elements.append(element)
        else:
            open_.pop()
    return elements


def _what_is_wrong(datatype: DataType, count: int, elements: list[Any]) -> DoorstepError:
    """The first thing wrong, as one who reads the elements one by one would meet it."""
    right = _RIGHT_TYPES[datatype]
    for element in elements[:count]:
        if type(element) not in right or (datatype in _UNSIGNED and element < 0) or not _is_int64(datatype, element):
            return Internal(f"Unable to parse 'data': {_COMPLAINTS[_kind(datatype)]}")
        if right is _INT and not _fits(datatype, element):
            return InvalidArgument(f"Unable to parse 'data': {element} is out of the range of {datatype}")
    if len(elements) > count:
        return Internal("Unable to parse 'data': Shape does not match true shape of 'data' field")
    return Internal("Failed to parse 'data' field: shape does not match true shape")


_UNSIGNED = frozenset({UINT8, UINT16, UINT32, UINT64})
_COMPLAINTS = {
    "b": "attempt to access JSON non-boolean as boolean",
    "u": "attempt to access JSON non-unsigned-integer as unsigned-integer",
    "i": "attempt to access JSON non-signed-integer as signed-integer",
    "f": "attempt to access JSON non-number as double",
}


def _kind(datatype: DataType) -> str:
    return datatype.numpy.kind


def _is_int64(datatype: DataType, element: Any) -> bool:
    return _kind(datatype) != "i" or -(2**63) <= element < 2**63


def _fits(datatype: DataType, element: int) -> bool:
    limits = np.iinfo(datatype.numpy)
    return int(limits.min) <= element <= int(limits.max)


def element_count(shape: list[int]) -> int:
    """As Triton counts (server, common.cc): -1 with a wildcard, -2 with a negative dimension, -3 beyond int64."""
    count = 0
    for dim in shape:
        if dim == -1:
            return -1
        if dim < 0:
            return -2
        if dim == 0:
            return 0
        count = count * dim if count else dim
        if count > 2**63 - 1:
            return -3
    return count


def empty_or_refused(name: str, datatype: DataType, shape: list[int], data: Any, max_input_size: int) -> Tensor | None:
    """Refuses a shape that no JSON data can fill; makes the tensor that has no elements; None for the rest."""
    count = element_count(shape)
    if not shape:  # Triton counts no element in it, and no model has such an input
        return UnfitTensor(name, datatype, shape, 0)
    if count == 0:
        try:
            return Tensor(name, datatype, np.empty(shape, datatype.numpy))
        except ValueError:
            return UnfitTensor(name, datatype, shape, 0)
    if count == -2:
        raise InvalidArgument(
            f"invalid shape for input '{name}': shape {shape_text(shape)} contains one or more invalid dimensions"
        )
    if count == -3:
        raise InvalidArgument(
            f"invalid shape for input '{name}': shape {shape_text(shape)} causes total element count to exceed maximum "
            f"size of {INT64_MAX}"
        )
    if type(data) is not list:
        raise Internal("Unable to parse 'data': attempt to access JSON non-array as array")
    if datatype.itemsize > 1 and count > INT64_MAX // datatype.itemsize:
        raise InvalidArgument(
            f"byte size overflow for input '{name}': element count ({count}) * data type size ({datatype.itemsize}) "
            f"exceeds maximum allowed size ({INT64_MAX})"
        )
    size = count * datatype.itemsize % 2**64
    if size > max_input_size:
        raise InvalidArgument(
            f"JSON input '{name}' has a byte_size ({size} bytes) that exceeds the maximum allowed value of "
            f"{max_input_size} bytes. Use --http-max-input-size to increase the limit."
        )
    return None
