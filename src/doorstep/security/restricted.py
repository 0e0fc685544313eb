"""A gate for `--http-restricted-api` and `--grpc-restricted-protocol`: some APIs need a header with a secret value.

Knows neither models nor endpoints. The rules are Triton's (inference_protocols.md, "Limit Endpoint Access"): HTTP looks
at the header as named, gRPC at `triton-grpc-protocol-<name>`.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping

import orjson

from doorstep.wire.exchange import Exchange, Gate, Refusal

Restriction = tuple[str, str]  # the header that opens an API, in lower case and in full, and its value


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
        header, value = restriction
        if hmac.compare_digest(exchange.headers.get(header.encode(), b""), value.encode()):
            return None
        message = f"This {'protocol' if over_grpc else 'API'} is restricted, expecting header '{header}'"
        return Refusal(
            403,
            orjson.dumps({"error": message}),
            ((b"content-type", b"application/json"),),
            grpc_status=14,  # UNAVAILABLE
            grpc_message=message,
        )

    return gate
