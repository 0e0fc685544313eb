"""How the V2 protocol says each error: HTTP statuses, gRPC statuses and the JSON body. Knows no endpoint."""

from __future__ import annotations

import orjson

from doorstep.errors import DoorstepError, ErrorCode, InvalidArgument

JSON_CONTENT = ((b"content-type", b"application/json"),)

HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.UNKNOWN: 400,
    ErrorCode.INTERNAL: 500,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.INVALID_ARG: 400,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.UNSUPPORTED: 501,
    ErrorCode.ALREADY_EXISTS: 400,
    ErrorCode.CANCELLED: 400,
}

# Numbers of google.rpc.Code.
GRPC_STATUS: dict[ErrorCode, int] = {
    ErrorCode.UNKNOWN: 2,
    ErrorCode.INTERNAL: 13,
    ErrorCode.NOT_FOUND: 5,
    ErrorCode.INVALID_ARG: 3,
    ErrorCode.UNAVAILABLE: 14,
    ErrorCode.UNSUPPORTED: 12,
    ErrorCode.ALREADY_EXISTS: 6,
    ErrorCode.CANCELLED: 1,
}


def error_body(message: str) -> bytes:
    """`{"error": message}`; a lone surrogate, which no JSON text can hold, becomes a question mark."""
    try:
        return orjson.dumps({"error": message})
    except orjson.JSONEncodeError:
        return orjson.dumps({"error": message.encode("utf-8", "replace").decode()})


def http_status(error: DoorstepError) -> int:
    return HTTP_STATUS[error.code]


def grpc_status(error: DoorstepError) -> int:
    return GRPC_STATUS[error.code]


def checked_version(text: str) -> str:
    """A version as a client wrote it, in the form the server keeps it: a decimal number, or "" for any.

    Raises InvalidArgument for what is no version (server, common.cc: GetModelVersionFromString).
    """
    if not text or (text.isdecimal() and text.isascii() and text[0] != "0" and len(text) < 19):
        return text
    digits = text.strip()
    try:
        number = int(digits)
    except ValueError:
        number = None
    if number is None or abs(number) > 2**63 - 1 or "_" in digits:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{text}' (details: stol), "
            "version should be an integral value > 0"
        )
    if number < 0:
        raise InvalidArgument(f"invalid model version specified '{text}' , version should be an integral value > 0")
    return str(number)
