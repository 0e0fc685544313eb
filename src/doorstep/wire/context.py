"""What all connections of one listener share. Knows no bytes of any protocol.

How a connection lives: the listener accepts it and picks its protocol, which adds itself to `connections` when it is
made and discards itself in `connection_lost`; `sweep` is called about once a second, `drain` when the server stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from doorstep.wire.exchange import ConnectionInfo, Exchange, Gate
from doorstep.wire.http2_settings import Http2Settings
from doorstep.wire.limits import WireLimits

if TYPE_CHECKING:
    from doorstep.wire.router import Router

# Called when an answer is complete: (exchange, HTTP status, bytes of body sent, gRPC status where there is one).
AccessHook = Callable[[Exchange, int, int, int | None], None]


class WireConnection(Protocol):
    """What the listener asks of a connection, whatever it speaks. Called on the event loop."""

    def sweep(self, now_ns: int) -> None:
        """Closes the connection if one of its time limits has passed. May discard itself from the set it is in."""

    def drain(self) -> None:
        """Takes no new requests: closes at once when idle, after the last answer otherwise."""

    def abort(self) -> None:
        """Closes at once, unsent bytes dropped."""


class WireCounters:
    """Plain numbers for /metrics. Written only from the event loop."""

    __slots__ = ("accepted", "protocol_errors", "refused", "requests", "timeouts")

    def __init__(self) -> None:
        self.accepted = 0  # connections
        self.refused = 0  # connections closed at once because there were too many
        self.requests = 0  # whole heads that reached the router
        self.protocol_errors = 0  # connections closed, or requests refused, for what they sent
        self.timeouts = 0  # connections closed by a time limit


class Connections(set[WireConnection]):
    """The open connections of a listener. They leave with `discard`."""

    _empty: asyncio.Event | None = None

    def discard(self, connection: object) -> None:
        super().discard(connection)
        if self._empty is not None and not self:
            self._empty.set()

    async def empty(self) -> None:
        """Returns when no connection is left."""
        while self:
            self._empty = self._empty or asyncio.Event()
            self._empty.clear()
            await self._empty.wait()


class ListenerContext:
    """Touched only from the event loop."""

    __slots__ = (
        "clock",
        "connections",
        "counters",
        "draining",
        "gates",
        "held_bytes",
        "http2",
        "keeps_spelling",
        "limits",
        "name",
        "now_ns",
        "on_access",
        "router",
    )

    def __init__(
        self,
        name: str,
        router: Router,
        limits: WireLimits | None = None,
        *,
        gates: list[Gate] | None = None,
        on_access: AccessHook | None = None,
        http2: Http2Settings | None = None,
        keeps_spelling: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name = name  # "http", "grpc", "metrics"
        self.router = router
        self.limits = limits or WireLimits()
        self.http2 = http2 or Http2Settings()
        self.keeps_spelling = keeps_spelling  # somebody wants to know how clients spell the names of headers
        self.gates: list[Gate] = gates if gates is not None else []  # in order; run before every endpoint, 404 and 405
        self.on_access = on_access
        self.clock = clock
        self.now_ns = clock()  # as of the last sweep: good enough for time limits, and free
        self.connections = Connections()
        self.counters = WireCounters()
        self.draining = False  # answers say `connection: close` (HTTP/2: GOAWAY has been sent)
        self.held_bytes = 0  # of large bodies that are still arriving, all connections together

    def sweep(self) -> None:
        """Lets every connection look at its clock."""
        self.now_ns = now_ns = self.clock()
        for connection in list(self.connections):
            connection.sweep(now_ns)

    def drain(self) -> None:
        self.draining = True
        for connection in list(self.connections):
            connection.drain()

    def __repr__(self) -> str:
        state = " draining" if self.draining else ""
        return f"<ListenerContext {self.name} {len(self.connections)} connections{state}>"


def describe(transport: Any, listener: str, http_version: str) -> ConnectionInfo:
    """What there is to know of a connection; `transport` is an asyncio transport, plain or TLS."""
    peername = transport.get_extra_info("peername")
    match peername:
        case (str(host), int(port), *_):
            peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        case _:
            peer = "unix:"
    ssl_object = transport.get_extra_info("ssl_object")
    return ConnectionInfo(
        listener,
        peer,
        http_version=http_version,
        secure=ssl_object is not None,
        client_certificate=(ssl_object.getpeercert() or None) if ssl_object is not None else None,
    )
