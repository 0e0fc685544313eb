"""The `parameters` maps of gRPC inference messages, both ways. Knows no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from doorstep.client_memory import Loan
from doorstep.errors import InvalidArgument, NotFound
from doorstep.request import InferenceRequest, Parameter

EMPTY_FINAL = "triton_enable_empty_final_response"
RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    f"'triton_' are allowed: {EMPTY_FINAL}"
)
_CUSTOM = ("int64_param", "bool_param", "string_param", "double_param")


def apply_parameters(request: InferenceRequest, parameters: Mapping[str, Any]) -> bool:
    """Sets what the protocol knows on `request`, the rest as its custom parameters.

    Returns whether the client wants an empty final response (grpc/infer_handler.cc: SetInferenceRequestMetadata).
    """
    wants_empty_final = False
    custom: dict[str, Parameter] = {}
    for key, message in parameters.items():
        kind = message.WhichOneof("parameter_choice")
        value: Any = getattr(message, kind) if kind else None
        if key == "sequence_id":
            if kind == "int64_param":
                request.correlation_id = value % 2**64
            elif kind == "string_param":
                request.correlation_id = value
            else:
                raise _wrong_type(key, "int64_param or string_param.")
        elif key == "sequence_start":
            request.sequence_start = _bool(key, kind, value)
        elif key == "sequence_end":
            request.sequence_end = _bool(key, kind, value)
        elif key == "priority":
            if kind not in ("int64_param", "uint64_param"):
                raise _wrong_type(key, "int64_param or uint64_param.")
            if value < 0:
                raise InvalidArgument("invalid value for 'priority', expected value >= 0.")
            request.priority = value
        elif key == "timeout":
            if kind != "int64_param":
                raise _wrong_type(key, "int64_param.")
            request.timeout_us = value % 2**64
        elif key.startswith("triton_"):
            if key != EMPTY_FINAL:
                raise InvalidArgument(RESERVED)
            wants_empty_final = _bool(key, kind, value)
        elif kind in _CUSTOM:
            custom[key] = value
        else:
            raise _wrong_type(key, "int64_param, bool_param, or string_param.")
    if custom:
        request.parameters = custom
    return wants_empty_final


def _wrong_type(key: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"invalid value type for '{key}' parameter, expected {expected}")


def _bool(key: str, kind: str | None, value: Any) -> bool:
    if kind != "bool_param":
        raise _wrong_type(key, "bool_param.")
    return bool(value)


def shared_memory(tensor: str, parameters: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """The region a tensor is in, the offset there and its size (grpc/grpc_utils.h: ParseSharedMemoryParams)."""
    region = parameters.get("shared_memory_region")
    if region is None:
        for key in ("shared_memory_offset", "shared_memory_byte_size"):
            if key in parameters:
                raise InvalidArgument(
                    f"'{key}' can not be specified without 'shared_memory_region' parameter for tensor '{tensor}'"
                )
        return None
    _tensor_parameter(tensor, "shared_memory_region", region, "string_param")
    offset = 0
    if "shared_memory_offset" in parameters:
        _tensor_parameter(tensor, "shared_memory_offset", parameters["shared_memory_offset"], "int64_param")
        offset = parameters["shared_memory_offset"].int64_param % 2**64
    if "shared_memory_byte_size" not in parameters:
        raise InvalidArgument(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor "
            f"'{tensor}'"
        )
    _tensor_parameter(tensor, "shared_memory_byte_size", parameters["shared_memory_byte_size"], "int64_param")
    return region.string_param, offset, parameters["shared_memory_byte_size"].int64_param % 2**64


def lent(loan: Loan | None, name: str) -> Loan:
    """The request's loan. Raises NotFound where clients' shared memory is off, so that there are no regions."""
    if loan is None:
        raise NotFound(f"Unable to find shared memory region: '{name}'")
    return loan


def _tensor_parameter(tensor: str, key: str, message: Any, expected: str) -> None:
    if message.WhichOneof("parameter_choice") != expected:
        raise InvalidArgument(f"invalid value type for '{key}' parameter for tensor '{tensor}', expected {expected}.")


def class_count(parameters: Mapping[str, Any]) -> int:
    """How many classes an output is to be reduced to; 0: it is not."""
    message = parameters.get("classification")
    if message is None:
        return 0
    if message.WhichOneof("parameter_choice") != "int64_param":
        raise InvalidArgument("invalid value type for 'classification' parameter, expected int64_param")
    count: int = message.int64_param
    if count <= 0:
        raise InvalidArgument("invalid value for 'classification' parameter, expected >= 0")
    return count


def set_parameter(message: Any, value: Parameter) -> None:
    """Writes a parameter of a response into its InferParameter."""
    if isinstance(value, bool):
        message.bool_param = value
    elif isinstance(value, int):
        if value < 2**63:
            message.int64_param = value
        else:
            message.uint64_param = value
    elif isinstance(value, float):
        message.double_param = value
    else:
        message.string_param = value
