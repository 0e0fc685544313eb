"""Requests whose head is, byte for byte, the last one's on the same connection are not parsed again.

A client in a loop sends the same head over and over, with other bytes in a body of the same length. The parser stands
between two messages then, so it would read the same from the same bytes. Only plain requests are remembered: whole in
one read, kept alive, their length known, nothing to be undone or asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from doorstep.wire.http1_exchange import KEEP, Http1Exchange

if TYPE_CHECKING:
    from doorstep.wire.http1 import Connection

_NOT_PLAIN = (b"transfer-encoding", b"expect", b"upgrade", b"connection", b"content-encoding")


class Repeat:
    """What the last request said before its body. Touched only from the event loop."""

    __slots__ = ("_model", "_offset", "head", "size")

    def __init__(self, head: bytes, exchange: Http1Exchange) -> None:
        self.head = head
        self.size = len(head) + len(exchange.body)
        self._offset = len(head)
        self._model = (
            exchange.method, exchange.path, exchange.query, exchange.headers, exchange.params, exchange.route,
            exchange.endpoint,
        )  # fmt: skip

    def exchange(self, connection: Connection, data: bytes) -> Http1Exchange:
        """The exchange of `data`, `size` bytes that begin with `head`."""
        made = Http1Exchange(connection)
        (made.method, made.path, made.query, made.headers, made.params, made.route, made.endpoint) = self._model
        made.received_ns = connection.context.clock()
        made.body = data[self._offset :]
        connection.context.counters.requests += 1
        return made


def repeatable(data: bytes, exchange: Http1Exchange) -> Repeat | None:
    """To be kept for the next request, if `data` is `exchange` and nothing else, and that is plain."""
    headers = exchange.headers
    if exchange.keep is not KEEP or exchange.http_1_0 or exchange.streaming or not exchange.route:
        return None
    for name in _NOT_PLAIN:
        if name in headers:
            return None
    size = len(exchange.body)
    if int(headers.get(b"content-length", b"0")) != size:
        return None
    head = data[: len(data) - size]
    return Repeat(head, exchange) if head.endswith(b"\r\n\r\n") else None
