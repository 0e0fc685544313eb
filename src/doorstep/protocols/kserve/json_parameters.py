"""The `parameters` of a JSON inference request. Knows no tensor."""

from __future__ import annotations

from typing import Any

from doorstep.errors import Internal, InvalidArgument
from doorstep.request import InferenceRequest, Parameter

RESERVED = "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."


def apply_parameters(request: InferenceRequest, parameters: Any) -> bool:
    """Sets what the protocol knows on `request`, the rest as its custom parameters. Returns `binary_data_output`."""
    if type(parameters) is not dict:
        raise Internal("failed to get request params.: attempt to get members for non-object")
    binary = False
    custom: dict[str, Parameter] = {}
    for key, value in parameters.items():
        if key == "sequence_id":
            if not _is_unsigned(value) and type(value) is not str:
                raise Internal(f"Unable to parse '{key}': attempt to access JSON non-string as string")
            request.correlation_id = value
        elif key == "sequence_start":
            request.sequence_start = as_bool(value, f"Unable to parse '{key}'")
        elif key == "sequence_end":
            request.sequence_end = as_bool(value, f"Unable to parse '{key}'")
        elif key == "priority":
            request.priority = as_unsigned(value, f"Unable to parse '{key}'")
        elif key == "timeout":
            request.timeout_us = as_unsigned(value, f"Unable to parse '{key}'")
        elif key == "binary_data_output":
            binary = as_bool(value, f"Unable to parse '{key}'")
        elif key.startswith("triton_"):
            raise InvalidArgument(RESERVED)
        else:
            custom[key] = custom_parameter(key, value)
    if custom:
        request.parameters = custom
    return binary


def custom_parameter(key: str, value: Any) -> Parameter:
    kind = type(value)
    if kind is str or kind is bool or kind is float:
        return value  # type: ignore[no-any-return]
    if kind is int:
        return value if -(2**63) <= value < 2**63 else float(value)
    raise InvalidArgument(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")


def _is_unsigned(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**64


def as_unsigned(value: Any, what: str) -> int:
    if not _is_unsigned(value):
        raise Internal(f"{what}: attempt to access JSON non-unsigned-integer as unsigned-integer")
    return value  # type: ignore[no-any-return]


def as_bool(value: Any, what: str) -> bool:
    if type(value) is not bool:
        raise Internal(f"{what}: attempt to access JSON non-boolean as boolean")
    return value


def as_string(value: Any, what: str) -> str:
    if type(value) is not str:
        raise Internal(f"{what}: attempt to access JSON non-string as string")
    return value
