"""A ModelConfig message as the JSON that Triton's clients expect. Knows no HTTP."""

from __future__ import annotations

import math
import struct
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from doorstep.proto import is_repeated

_64_BIT = (FieldDescriptor.CPPTYPE_INT64, FieldDescriptor.CPPTYPE_UINT64)

# Triton turns 64-bit integers from protobuf's strings into numbers one field at a time, and leaves these as strings.
_STAY_STRINGS = {
    "inference.ModelInstanceGroup.SecondaryDevice.device_id",
    "inference.ModelOptimizationPolicy.Cuda.GraphSpec.Shape.dim",
    "inference.ModelSequenceBatching.InitialState.dims",
}


def config_json(message: Any) -> dict[str, Any]:
    """For orjson. Original field names in the order of the .proto; scalars, lists and maps printed even when empty,
    messages and members of a oneof only when set; enums by name; 64-bit integers as numbers; map keys as text."""
    out: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        inner = field.message_type
        if inner is not None and inner.GetOptions().map_entry:
            of = inner.fields_by_name["value"]
            out[field.name] = {_key(k): _value(value[k], of) for k in sorted(value)}
        elif is_repeated(field):
            out[field.name] = [_value(item, field) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            out[field.name] = _value(value, field)
    return out


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(key)


def _value(value: Any, field: Any) -> Any:
    if field.message_type is not None:
        return config_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if field.cpp_type in _64_BIT and field.full_name in _STAY_STRINGS:
        return str(value)
    if isinstance(value, float):
        return _number(value, single=field.cpp_type == FieldDescriptor.CPPTYPE_FLOAT)
    return value


def _number(value: float, *, single: bool) -> int | float | str:
    """The shortest text that reads back as the same number: 0.1 for the float nearest to it, 1 for 1.0."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value.is_integer() and abs(value) < 1e15:
        return int(value)
    if single:
        for digits in range(6, 10):
            short = float(f"{value:.{digits}g}")
            if struct.pack("<f", short) == struct.pack("<f", value):
                return short
    return value
