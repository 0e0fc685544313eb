"""gRPC's status codes and how they look in HTTP/2 fields. Knows no stream and no message."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from doorstep.errors import ErrorCode


class Status(IntEnum):
    """https://grpc.io/docs/guides/status-codes/"""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


STATUS_OF = {  # Triton's map
    ErrorCode.UNKNOWN: Status.UNKNOWN,
    ErrorCode.INTERNAL: Status.INTERNAL,
    ErrorCode.NOT_FOUND: Status.NOT_FOUND,
    ErrorCode.INVALID_ARG: Status.INVALID_ARGUMENT,
    ErrorCode.UNAVAILABLE: Status.UNAVAILABLE,
    ErrorCode.UNSUPPORTED: Status.UNIMPLEMENTED,
    ErrorCode.ALREADY_EXISTS: Status.ALREADY_EXISTS,
    ErrorCode.CANCELLED: Status.CANCELLED,
}

Fields = list[tuple[bytes, bytes]]

CONTENT_TYPE = (b"content-type", b"application/grpc")
ACCEPT_ENCODING = (b"grpc-accept-encoding", b"identity, deflate, gzip")
RESPONSE_FIELDS: Fields = [(b":status", b"200"), CONTENT_TYPE, ACCEPT_ENCODING]
OK_TRAILERS: Fields = [(b"grpc-status", b"0")]

_MESSAGE_BYTES = 4096  # of an error's text, encoded: clients refuse header lists above 8 KB
_UNITS_NS = {
    0x48: 3_600_000_000_000,  # H
    0x4D: 60_000_000_000,  # M
    0x53: 1_000_000_000,  # S
    0x6D: 1_000_000,  # m
    0x75: 1_000,  # u
    0x6E: 1,  # n
}
_PLAIN = frozenset(range(0x20, 0x7F)) - {0x25}
_ENCODED = [bytes((byte,)) if byte in _PLAIN else b"%%%02X" % byte for byte in range(256)]


def is_grpc(headers: Mapping[bytes, bytes]) -> bool:
    return headers.get(b"content-type", b"").startswith(b"application/grpc")


def encode_message(message: str) -> bytes:
    """`grpc-message`: UTF-8, with all but printable ASCII, and `%`, percent-encoded; long ones are cut."""
    raw = message.encode("utf-8", "replace")
    if raw.isascii() and _PLAIN.issuperset(raw):
        return raw[:_MESSAGE_BYTES]
    if len(raw) > _MESSAGE_BYTES // 3:
        raw = raw[: _MESSAGE_BYTES // 3].decode("utf-8", "ignore").encode()
    return b"".join([_ENCODED[byte] for byte in raw])


def status_fields(status: int, message: str) -> Fields:
    fields = [(b"grpc-status", b"%d" % status)]
    if message:
        fields.append((b"grpc-message", encode_message(message)))
    return fields


def trailers_only(status: int, message: str) -> Fields:
    """An answer that is one header block: no message was sent before the error."""
    return [*RESPONSE_FIELDS, *status_fields(status, message)]


def parse_timeout(value: bytes) -> int:
    """`grpc-timeout` (one to eight digits and a unit) in nanoseconds. Raises ValueError."""
    digits, unit = value[:-1], _UNITS_NS.get(value[-1]) if value else None
    if unit is None or not digits.isdigit() or len(digits) > 8:
        raise ValueError(
            f"malformed grpc-timeout {value[:32]!r}: one to eight digits and one of H M S m u n are expected"
        )
    return int(digits) * unit
