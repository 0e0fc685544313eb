"""Reads the inputs and outputs of an .onnx file without loading it: no weights, no runtime, no session.

Knows only the protobuf wire format and the few fields of onnx.proto3 that say what a graph takes and gives:
ModelProto.graph = 7; GraphProto.initializer = 5, input = 11, output = 12; TensorProto.name = 8; ValueInfoProto.name = 1
and type = 2; TypeProto.tensor_type = 1; Tensor.elem_type = 1, shape = 2; TensorShapeProto.dim = 1; dim_value = 1.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from doorstep.types import (
    BF16,
    BOOL,
    BYTES,
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
)  # fmt: skip

# onnx.TensorProto.DataType → ours; the rest (complex, float8, int4 …) has no V2 datatype.
ELEMENT_TYPES: dict[int, DataType] = {
    1: FP32, 2: UINT8, 3: INT8, 4: UINT16, 5: INT16, 6: INT32, 7: INT64, 8: BYTES, 9: BOOL, 10: FP16, 11: FP64,
    12: UINT32, 13: UINT64, 16: BF16,
}  # fmt: skip


class NotOnnx(Exception):
    """The file is not an ONNX model, or is cut short."""


@dataclass(frozen=True, slots=True)
class ValueInfo:
    name: str
    datatype: DataType | None  # None: a type the V2 protocol has no name for, or not a tensor at all
    shape: tuple[int, ...] | None  # -1 where the size is free; None where the file does not say


@dataclass(frozen=True, slots=True)
class OnnxHeader:
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]


def read_header(path: Path) -> OnnxHeader:
    """Raises NotOnnx, or OSError."""
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise NotOnnx("the file is empty") from None
        with data, memoryview(data) as view:
            try:
                graphs = [
                    span for number, span in _fields(view, 0, len(view)) if number == 7 and isinstance(span, tuple)
                ]
                if not graphs:
                    raise NotOnnx("it holds no graph")
                return _graph(view, *graphs[-1])
            except (IndexError, UnicodeDecodeError):
                raise NotOnnx("it is cut short or not an ONNX file") from None


def _graph(view: memoryview, start: int, end: int) -> OnnxHeader:
    inputs: list[ValueInfo] = []
    outputs: list[ValueInfo] = []
    initializers: set[str] = set()
    for number, span in _fields(view, start, end):
        if not isinstance(span, tuple):
            continue
        if number == 5:
            initializers.add(_text(view, span, 8))
        elif number == 11:
            inputs.append(_value_info(view, *span))
        elif number == 12:
            outputs.append(_value_info(view, *span))
    # Before IR version 4 weights were listed among the inputs, too.
    return OnnxHeader(tuple(i for i in inputs if i.name not in initializers), tuple(outputs))


def _value_info(view: memoryview, start: int, end: int) -> ValueInfo:
    name = ""
    datatype: DataType | None = None
    shape: tuple[int, ...] | None = None
    for number, span in _fields(view, start, end):
        if number == 1 and isinstance(span, tuple):
            name = bytes(view[span[0] : span[1]]).decode()
        elif number == 2 and isinstance(span, tuple):
            for kind, tensor in _fields(view, *span):
                if kind == 1 and isinstance(tensor, tuple):
                    datatype, shape = _tensor_type(view, *tensor)
    return ValueInfo(name, datatype, shape)


def _tensor_type(view: memoryview, start: int, end: int) -> tuple[DataType | None, tuple[int, ...] | None]:
    datatype: DataType | None = None
    shape: tuple[int, ...] | None = None
    for number, value in _fields(view, start, end):
        if number == 1 and isinstance(value, int):
            datatype = ELEMENT_TYPES.get(value)
        elif number == 2 and isinstance(value, tuple):
            shape = tuple(
                _dimension(view, *dim) for n, dim in _fields(view, *value) if n == 1 and isinstance(dim, tuple)
            )
    return datatype, shape


def _dimension(view: memoryview, start: int, end: int) -> int:
    for number, value in _fields(view, start, end):
        if number == 1 and isinstance(value, int) and 0 <= value < 2**63:
            return value
    return -1  # dim_param (a symbol), or nothing


def _text(view: memoryview, span: tuple[int, int], wanted: int) -> str:
    for number, value in _fields(view, *span):
        if number == wanted and isinstance(value, tuple):
            return bytes(view[value[0] : value[1]]).decode()
    return ""


def _fields(view: memoryview, at: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
    """(field number, value) of one message: an int for varints, (start, end) for length-delimited fields."""
    while at < end:
        key, at = _varint(view, at, end)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(view, at, end)
            yield number, value
        elif kind == 2:
            size, at = _varint(view, at, end)
            if at + size > end:
                raise IndexError
            yield number, (at, at + size)
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
            if at > end:
                raise IndexError
        else:
            raise NotOnnx("it is not an ONNX file")


def _varint(view: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if at >= end:
            raise IndexError
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise NotOnnx("it is not an ONNX file")
