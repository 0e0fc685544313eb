"""How the V2 protocol says errors over HTTP, and what it takes for a version. Knows no endpoint.

(gRPC's statuses are in wire/grpc_status.py.)
"""

from __future__ import annotations

import logging

from doorstep.errors import DoorstepError, ErrorCode, InvalidArgument
from doorstep.wire.answers import JSON, error_body
from doorstep.wire.exchange import Exchange
from doorstep.wire.request_id import with_request_id

logger = logging.getLogger("doorstep.kserve")

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


def respond_error(exchange: Exchange, error: DoorstepError) -> None:
    status = HTTP_STATUS[error.code]
    logger.debug("%s %s fails with status %d: %s", exchange.method, exchange.path, status, error.message)
    headers = with_request_id(exchange.headers, JSON)
    exchange.respond(status, headers, error_body(error.message))


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
