"""One HTTP/1.1 request and its answer as bytes. Knows no parser; its connection knows when the answer is its turn.

Answers are written as few buffers as possible: small ones in one piece, large bodies without a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING

from doorstep.wire.exchange import Buffer, Endpoint, Exchange, Headers

if TYPE_CHECKING:
    from doorstep.wire.http1 import Connection

JOINED_BYTES = 16_384  # answers up to this size are copied into one write; larger bodies are handed over as they are
_CACHED_HEADS = 1024
_NO_LENGTH = frozenset({204, 304})
_NO_PARAMS: Mapping[str, str] = {}

KEEP = b"\r\n\r\n"
KEEP_1_0 = b"\r\nconnection: keep-alive\r\n\r\n"
CLOSE = b"\r\nconnection: close\r\n\r\n"

_NO_BODY, _CHUNKED, _UNTIL_CLOSE = "no body", "chunked", "until close"

_status_lines = {s.value: f"HTTP/1.1 {s.value} {s.phrase}".encode() for s in HTTPStatus}
_heads: dict[tuple[int, Headers], bytes] = {}


def head_of(status: int, headers: Headers) -> bytes:
    """Status line and header fields, without the last line end. Kept for headers that come as a tuple of tuples."""
    cacheable = type(headers) is tuple
    if cacheable:
        found = _heads.get((status, headers))
        if found is not None:
            return found
    line = _status_lines.get(status) or b"HTTP/1.1 %d Status" % status
    fields = [line]
    for name, value in headers:
        if b"\r" in value or b"\n" in value or b"\0" in value or b"\r" in name or b"\n" in name:
            raise ValueError(f"header {name!r} holds a line break or NUL: {value!r}")
        fields.append(name + b": " + value)
    head = b"\r\n".join(fields)
    if cacheable:
        if len(_heads) >= _CACHED_HEADS:
            _heads.clear()
        _heads[status, headers] = head
    return head


def byte_length(buffer: Buffer) -> int:
    return buffer.nbytes if type(buffer) is memoryview else len(buffer)


class Http1Exchange(Exchange):
    """Made by its connection when the head is complete, dispatched when the body is, and it is its turn."""

    __slots__ = (
        "_connection",
        "_framing",
        "_sent",
        "_status",
        "coding",
        "endpoint",
        "http_1_0",
        "keep",
        "streaming",
        "unconsumed",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.connection = connection.info
        self.params = _NO_PARAMS
        self.route = ""
        self.body = b""
        self.started = False
        self.ended = False
        self.state = None
        self.on_disconnect = None
        self.on_drain = None
        self.on_body = None
        self.streaming = False
        self.keep = KEEP  # how the head of the answer ends: KEEP, KEEP_1_0 or CLOSE
        self.coding = b""  # content-encoding still to be undone
        self.http_1_0 = False
        self.unconsumed = 0  # bytes given to on_body and not yet consumed
        self._framing = _NO_BODY  # of a streamed answer
        self._status = 0
        self._sent = 0  # bytes of body
        self.endpoint: Endpoint  # set by the connection, as are method, path, query, headers, received_ns

    @property
    def disconnected(self) -> bool:
        return self._connection.lost

    def respond(self, status: int, headers: Headers, *body: Buffer) -> None:
        if self.started:
            raise RuntimeError(f"{self.method} {self.path} was answered already")
        connection = self._connection
        if connection.lost:
            self.started = self.ended = True
            return
        head = head_of(status, headers)
        self.started = self.ended = True
        context = connection.context
        if context.draining:
            connection.last_answer(self)
        if len(body) == 1 and type(body[0]) is bytes:
            data: Buffer = body[0]
            size = len(data)
        else:
            size = sum(map(byte_length, body))
            data = b"".join(body) if size <= JOINED_BYTES else b""
        if status in _NO_LENGTH:
            connection.write(head + self.keep)
            size = 0
        elif self.method == "HEAD":
            connection.write(b"%b\r\ncontent-length: %d%b" % (head, size, self.keep))
        elif size <= JOINED_BYTES:
            connection.write(b"%b\r\ncontent-length: %d%b%b" % (head, size, self.keep, data))  # type: ignore[str-format]
        else:
            connection.writelines((b"%b\r\ncontent-length: %d%b" % (head, size, self.keep), *body))
        if context.on_access is not None:
            context.on_access(self, status, size, None)
        connection.answered(self)

    def start(self, status: int, headers: Headers) -> None:
        if self.started:
            raise RuntimeError(f"{self.method} {self.path} was answered already")
        connection = self._connection
        head = head_of(status, headers)
        self.started = True
        self._status = status
        if connection.lost:
            return
        if connection.context.draining:
            connection.last_answer(self)
        if self.http_1_0:
            self.keep = CLOSE
        if self.method == "HEAD" or status in _NO_LENGTH:
            self._framing = _NO_BODY
            connection.write(head + self.keep)
        elif self.http_1_0:
            self._framing = _UNTIL_CLOSE
            connection.write(head + self.keep)
        else:
            self._framing = _CHUNKED
            connection.write(head + b"\r\ntransfer-encoding: chunked" + self.keep)

    def write(self, data: Buffer) -> bool:
        connection = self._connection
        if self.ended or not self.started:
            raise RuntimeError(f"{self.method} {self.path}: write outside of start and end")
        if connection.lost:
            return True
        size = byte_length(data)
        if size and self._framing is not _NO_BODY:
            self._sent += size
            if self._framing is _UNTIL_CLOSE:
                connection.write(data)
            elif size <= JOINED_BYTES:
                connection.write(b"%x\r\n%b\r\n" % (size, data))  # type: ignore[str-format]
            else:
                connection.writelines((b"%x\r\n" % size, data, b"\r\n"))
        return not connection.choked

    def end(self, trailers: Headers = ()) -> None:
        if self.ended or not self.started:
            raise RuntimeError(f"{self.method} {self.path}: end outside of a streamed answer")
        self.ended = True
        connection = self._connection
        if connection.lost:
            return
        if self._framing is _CHUNKED:
            connection.write(b"0\r\n\r\n")
        on_access = connection.context.on_access
        if on_access is not None:
            on_access(self, self._status, self._sent, None)
        connection.answered(self)

    def reset(self) -> None:
        self.started = self.ended = True
        self._connection.abort()

    def consume(self, size: int) -> None:
        self.unconsumed -= size
        self._connection.consumed(self)

    def __repr__(self) -> str:
        state = "answered" if self.ended else "answering" if self.started else "open"
        return f"<Http1Exchange {self.method} {self.path} {state}>"
