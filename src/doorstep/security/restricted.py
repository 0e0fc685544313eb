"""A gate for `--http-restricted-api` and `--grpc-restricted-protocol`: some APIs need a header with a secret value.

Knows neither models nor endpoints. The rules are Triton's (inference_protocols.md, "Limit Endpoint Access"): HTTP looks
at the header as named, gRPC at `triton-grpc-protocol-<name>`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson

from doorstep.wire.exchange import Exchange, Gate, Refusal

GRPC_PREFIX = "triton-grpc-protocol-"


@dataclass(frozen=True, slots=True)
class Restriction:
    """The header that opens an API, and its value."""

    header: str
    value: str


def restricted_gate(
    category_of: Callable[[str], str | None],
    http: Mapping[str, Restriction],
    grpc: Mapping[str, Restriction],
    is_grpc: Callable[[str], bool],
) -> Gate | None:
    """A gate over routes by category; None where nothing is restricted. `http` and `grpc` map a category to its key."""
    if not http and not grpc:
        return None

    def gate(exchange: Exchange) -> Refusal | None:
        category = category_of(exchange.route)
        if category is None:
            return None
        over_grpc = is_grpc(exchange.route)
        restriction = (grpc if over_grpc else http).get(category)
        if restriction is None:
            return None
        header = (GRPC_PREFIX if over_grpc else "") + restriction.header.lower()
        given = exchange.headers.get(header.encode(), b"")
        if hmac.compare_digest(given, restriction.value.encode()):
            return None
        if over_grpc:
            message = f"This protocol is restricted, expecting header '{GRPC_PREFIX}{restriction.header}'"
        else:
            message = f"This API is restricted, expecting header '{restriction.header}'"
        return Refusal(
            403,
            orjson.dumps({"error": message}),
            ((b"content-type", b"application/json"),),
            grpc_status=14,  # UNAVAILABLE
            grpc_message=message,
        )

    return gate
