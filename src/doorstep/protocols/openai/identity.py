"""Who calls, and what the headers ask: request id, key, deadline. Pure; checks no key (that is a gate's job)."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from doorstep.protocols.openai.errors import BadField
from doorstep.wire.exchange import Exchange
from doorstep.wire.request_id import request_id

TIMEOUT = b"x-request-timeout-ms"
LOAD_FORMAT = b"endpoint-load-metrics-format"  # ORCA: the caller, a load balancer, wants to know how busy we are
_LONGEST_TIMEOUT_MS = 24 * 3600 * 1000


@dataclass(frozen=True, slots=True)
class Caller:
    request_id: str
    tenant: str  # a digest of the key; "" for those who have none, who share one place
    priority: int  # 0: the model's default; 1 is the highest
    deadline_ns: int  # 0: none
    wants_load: bytes  # b"", b"text" or b"json"


def caller_of(exchange: Exchange, body: Mapping[str, Any]) -> Caller:
    """Raises BadField for a timeout that is none."""
    headers = exchange.headers
    key = headers.get(b"authorization") or headers.get(b"x-api-key") or b""
    tenant = hashlib.blake2b(key, digest_size=12).hexdigest() if key else ""
    id = id_of(exchange)
    wanted = headers.get(LOAD_FORMAT, b"").strip().lower()
    wanted = wanted if wanted in (b"text", b"json") else b""
    return Caller(id, tenant, body.get("priority", 0), _deadline(headers.get(TIMEOUT)), wanted)


def id_of(exchange: Exchange) -> str:
    """The client's, or a new one."""
    return request_id(exchange.headers).decode() or f"req_{secrets.token_hex(12)}"


def id_headers(exchange: Exchange, id: str) -> list[tuple[bytes, bytes]]:
    """OpenAI's clients read the one, Anthropic's the other."""
    headers = [(b"x-request-id", id.encode())]
    if exchange.route.startswith("/v1/messages"):
        headers.append((b"request-id", id.encode()))
    return headers


def _deadline(given: bytes | None) -> int:
    if given is None:
        return 0
    if not given.isdigit() or len(given) > 12 or not 0 < int(given) <= _LONGEST_TIMEOUT_MS:
        raise BadField(f"the header {TIMEOUT.decode()} must be a number of milliseconds", TIMEOUT.decode())
    return time.monotonic_ns() + int(given) * 1_000_000
