"""Requests out of bytes: heads, bodies, and their limits. Knows nothing of answers, but that errors become some.

Sits between the parser, which calls `on_…`, and the connection, which takes requests from `_queue`. A request is put
there when it is whole; one for a streaming endpoint, or one that is refused, when its head is.
"""

from __future__ import annotations

import asyncio
import re
from abc import abstractmethod
from collections import deque
from functools import partial
from typing import Any

import httptools

from doorstep.wire.answers import fail, refusal, refuse
from doorstep.wire.body import LARGE_BYTES, LargeBody
from doorstep.wire.compression import ContentCodings
from doorstep.wire.context import ListenerContext, describe
from doorstep.wire.exchange import Buffer
from doorstep.wire.http1_exchange import CLOSE, KEEP, KEEP_1_0, Http1Exchange

SLICE_BYTES = 8192  # parsed at a time where other requests may follow in the same bytes
FRAMING_BYTES = 16  # per allowed chunk: what sizes, extensions, line ends and trailers may add to a chunked body

_METHODS = {m.encode(): m for m in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")}
_CHUNKED = -1  # in place of a content-length


class _Stop(Exception):
    """Leaves the parser from inside one of its callbacks; the answer is in the queue already."""


class _Whole(Exception):
    """Leaves a parser that has done its one task."""


class _BodyOnly:
    """Stands between the parser and a connection that has the head of the request already."""

    def __init__(self, reader: RequestReader) -> None:
        self.on_body = reader.on_body
        self.on_chunk_header = reader.on_chunk_header
        self.on_message_complete = reader.on_upgraded_body_complete


class RequestReader(asyncio.Protocol):
    """The receiving half of a connection. Touched only from the event loop."""

    __slots__ = (
        "_body", "_chunks", "_current", "_deaf", "_expects_continue", "_framing", "_head_bytes", "_headers", "_held",
        "_in_head", "_keep_after_body", "_large", "_length", "_parser", "_parts", "_queue", "_receiving", "_repeated",
        "_rest", "_since_ns", "_timing_head", "_transport", "_url", "context", "info",
    )  # fmt: skip

    def __init__(self, context: ListenerContext, transport: Any) -> None:
        self.context = context
        self.info = describe(transport, context.name, "1.1")
        self._transport = transport
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Http1Exchange] = deque()  # in the order of their answers
        self._current: Http1Exchange | None = None  # being answered
        self._rest: Buffer = b""  # read and not yet parsed
        self._deaf = False  # nothing is parsed any more
        self._since_ns = context.now_ns  # when it fell idle, began a head, last got a piece of a body, began to linger
        self._timing_head = False  # since_ns is when the unfinished head began
        # The request being parsed:
        self._receiving: Http1Exchange | None = None  # its head is complete, its body is not
        self._in_head = False
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._repeated = 0  # header fields beyond the first of their name
        self._head_bytes = 0  # in slices before this one
        self._length = 0  # content-length, or _CHUNKED
        self._parts: list[bytes] = []
        self._body = bytearray()  # what has come of a chunked one
        self._chunks = 0
        self._framing = 0  # bytes of a chunked body that are not content
        self._large: LargeBody | None = None
        self._held = 0  # this connection's part of context.held_bytes
        self._expects_continue = False
        self._keep_after_body = KEEP  # a streaming request's; its answer closes if it comes before the body's end

    # What the other half does.

    @abstractmethod
    def _pump(self) -> None:
        """Answers what is in the queue, as far as it is its turn, and parses on."""

    @abstractmethod
    def _deliver(self, exchange: Http1Exchange, *, last: bool) -> None:
        """Hands a streaming endpoint what has come of its body."""

    @abstractmethod
    def abort(self) -> None: ...

    # Slices in.

    def _parse(self, data: Buffer) -> None:
        """One slice. Whatever is wrong with it is in the queue afterwards, as an answer."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(memoryview(data)[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            match error.__context__:
                case _Stop():
                    pass
                case _Whole():
                    self._parser = httptools.HttpRequestParser(self)
                case _:
                    raise
        except httptools.HttpParserError as error:
            if self._queue and self._queue[-1].keep is CLOSE:
                self._deaf = True  # bytes after the last request
            else:
                self._stop(400, f"malformed HTTP request: {error}")
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > self.context.limits.header_bytes and not self._deaf:
                self._refuse_head()
        elif self._receiving is not None:
            self._body_grew(self._receiving, len(data))

    def _ignore_upgrade(self, rest: Buffer) -> None:
        """The client offers to change protocols, which one need not take up. The parser takes the request for whole."""
        self._rest = b"".join((rest, self._rest))
        if self._deaf or not self._length:
            self._parser = httptools.HttpRequestParser(self)
            return
        exchange = self._queue[-1] if self._queue[-1].streaming else self._queue.pop()
        if exchange.streaming:
            exchange.keep = CLOSE
        self._receiving = exchange
        self._parser = httptools.HttpRequestParser(_BodyOnly(self))
        framing = b"transfer-encoding: chunked" if self._length == _CHUNKED else b"content-length: %d" % self._length
        self._parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n\r\n" % framing)

    def _next_slice(self) -> int:
        """How many bytes may be parsed at once without finding many requests in them."""
        receiving = self._receiving
        if receiving is not None and self._length > 0 and not receiving.streaming:
            return max(SLICE_BYTES, self._length - sum(map(len, self._parts)))  # nothing but this body
        return SLICE_BYTES

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._in_head = True
        self._url = b""
        self._headers = {}
        self._repeated = 0
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers
        name = name.lower()
        if name in headers:
            self._repeated += 1
            if self._repeated <= self.context.limits.header_count:
                headers[name] += b", " + value
        else:
            headers[name] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        context = self.context
        limits = context.limits
        parser = self._parser
        headers = self._headers
        exchange = Http1Exchange(self)  # type: ignore[arg-type]  # this is always a Connection
        exchange.received_ns = context.clock()
        method = parser.get_method()
        exchange.method = method = _METHODS.get(method) or method.decode()
        url = self._url.decode("latin-1")
        if url[:1] != "/":
            url = _origin_form(url)
        exchange.path, exchange.query = path, _ = (url, "") if "?" not in url else tuple(url.split("?", 1))
        exchange.headers = headers
        self._receiving = exchange
        if not parser.should_keep_alive() or b"connection" in headers:
            self._settle_version(exchange, parser.get_http_version())
        if len(headers) + self._repeated > limits.header_count or self._head_bytes + SLICE_BYTES > limits.header_bytes:
            self._check_head()
        length = 0
        if b"content-length" in headers:
            length = int(headers[b"content-length"])
            if length > limits.body_bytes:
                raise self._stop(400, _too_large(length, limits.body_bytes))
        elif b"transfer-encoding" in headers:
            length = self._check_transfer_encoding(exchange)
        self._length = length
        context.counters.requests += 1
        match = context.router.find(method, path)
        exchange.params = match.params
        exchange.route = match.route
        exchange.endpoint = match.endpoint
        wanted = match.route != ""
        if context.gates:
            wanted = self._pass_gates(exchange) and wanted
        if b"content-encoding" in headers and match.codings is not None and wanted:
            wanted = self._settle_coding(exchange, match.codings)
        if path[:1] != "/":
            raise self._stop(400, "the request target must be a path that begins with '/'")
        if length:
            if b"expect" in headers:
                self._check_expectation(exchange)
            if not wanted and (length > LARGE_BYTES or length == _CHUNKED or self._expects_continue):
                raise self._stop_reading_body(exchange)
            if match.streaming and wanted:
                exchange.streaming = True
                self._keep_after_body, exchange.keep = exchange.keep, CLOSE
                self._queue.append(exchange)

    def on_body(self, piece: bytes) -> None:
        exchange = self._receiving
        if exchange is None:
            return
        if self._length != _CHUNKED or exchange.streaming:
            self._parts.append(piece)
            return
        self._body += piece
        if len(self._body) > self.context.limits.body_bytes:
            raise self._stop(400, _too_large(len(self._body), self.context.limits.body_bytes, "more than "))

    def on_chunk_header(self) -> None:
        self._chunks += 1
        if self._chunks > self.context.limits.chunk_count + 1:  # the last one is empty
            limit = self.context.limits.chunk_count
            raise self._stop(
                400,
                f"Chunked request body exceeds maximum of {limit} non-empty chunks. Send fewer or larger HTTP chunks.",
            )

    def on_message_complete(self) -> None:
        exchange = self._receiving
        if exchange is None:
            return
        self._receiving = None
        self._timing_head = False
        self._expects_continue = False
        if exchange.streaming:
            if not exchange.started:
                exchange.keep = self._keep_after_body
            if exchange is self._current:
                self._deliver(exchange, last=True)
            return
        if self._length == _CHUNKED:
            exchange.body, self._body = self._body, bytearray()
            self._release_held()
        elif self._parts:
            parts = self._parts
            exchange.body = parts[0] if len(parts) == 1 else b"".join(parts)
            self._parts = []
        self._queue.append(exchange)

    def on_upgraded_body_complete(self) -> None:
        """The end of a body that `_BodyOnly` stood for; a client that offers an upgrade sends nothing behind it."""
        self.on_message_complete()
        raise _Whole

    # Less usual heads.

    def _settle_version(self, exchange: Http1Exchange, version: str) -> None:
        if version == "1.0":
            exchange.http_1_0 = True
            exchange.keep = KEEP_1_0 if self._parser.should_keep_alive() else CLOSE
        elif version != "1.1":
            raise self._stop(505, f"HTTP version {version} is not supported here")
        elif not self._parser.should_keep_alive():
            exchange.keep = CLOSE

    def _check_head(self) -> None:
        limits = self.context.limits
        if len(self._headers) + self._repeated > limits.header_count:
            raise self._stop(431, f"the request has more than {limits.header_count} header fields")
        size = len(self._url) + sum(len(name) + len(value) + 4 for name, value in self._headers.items())
        if size > limits.header_bytes:
            raise self._refuse_head()

    def _refuse_head(self) -> _Stop:
        limit = self.context.limits.header_bytes
        if len(self._url) > limit // 2:
            return self._stop(414, f"the request line is longer than {limit} bytes")
        return self._stop(431, f"the request's header fields are larger than {limit} bytes")

    def _check_transfer_encoding(self, exchange: Http1Exchange) -> int:
        if exchange.http_1_0:
            raise self._stop(400, "transfer-encoding has no meaning in HTTP/1.0")
        coding = self._headers[b"transfer-encoding"].strip().lower()
        if coding != b"chunked":
            raise self._stop(501, "the only supported transfer-encoding is chunked; compress with content-encoding")
        self._headers = {}  # trailers go here, and nowhere
        self._chunks = self._framing = 0
        return _CHUNKED

    def _check_expectation(self, exchange: Http1Exchange) -> None:
        if exchange.headers[b"expect"].strip().lower() != b"100-continue":
            raise self._stop(417, "the only expectation that can be met is 100-continue")
        self._expects_continue = not exchange.http_1_0

    def _settle_coding(self, exchange: Http1Exchange, codings: ContentCodings) -> bool:
        coding = exchange.headers[b"content-encoding"].strip().lower()
        if coding not in codings.accepted:
            exchange.endpoint = partial(refuse, no=codings.refusal)
            return False
        if coding != b"identity":
            exchange.coding = coding
        return True

    def _pass_gates(self, exchange: Http1Exchange) -> bool:
        for gate in self.context.gates:
            try:
                no = gate(exchange)
            except Exception as error:
                exchange.endpoint = partial(fail, error=error)
                return False
            if no is not None:
                exchange.endpoint = partial(refuse, no=no)
                return False
        return True

    # Bodies that do not come with their heads.

    def _body_grew(self, exchange: Http1Exchange, size: int) -> None:
        """A slice of `size` bytes ended inside a body."""
        if exchange.streaming:
            if exchange is self._current:
                self._deliver(exchange, last=False)
        elif self._length == _CHUNKED:
            limits = self.context.limits
            grown = len(self._body) - self._held
            self._framing += size - grown
            self._held += grown
            self.context.held_bytes += grown
            if self._framing > limits.chunk_count * FRAMING_BYTES + limits.header_bytes:
                self._stop(400, "the chunked request body is mostly framing. Send larger HTTP chunks.")
            elif self.context.held_bytes > limits.arriving_bytes:
                self.refuse_arriving()
        elif self._length >= LARGE_BYTES:
            self._receive_large(exchange)

    def _receive_large(self, exchange: Http1Exchange) -> None:
        try:
            large = LargeBody(self, self._length, self._parts)
            rest = memoryview(self._rest)
            self._rest = rest[large.missing :]
            large.put(rest[: large.missing])
        except MemoryError:
            self.refuse_arriving()
            return
        self._parts = []
        self._large = large
        if large.missing:
            self._transport.set_protocol(large)
        self.large_body_grew(large, self._length - large.missing)

    def large_body_grew(self, large: LargeBody, size: int) -> None:
        """Called with what was there before the transport was switched over, and then with every read."""
        context = self.context
        self._since_ns = context.now_ns
        if large.missing:
            self._held += size
            context.held_bytes += size
            if context.held_bytes > context.limits.arriving_bytes:
                self.refuse_arriving()
            return
        exchange = self._receiving
        assert exchange is not None
        exchange.body = large.body
        self._receiving = None
        self._parser = httptools.HttpRequestParser(self)  # the old one still waits for the body
        self._listen_again()
        self._queue.append(exchange)
        self._pump()

    def _listen_again(self) -> None:
        """The transport's bytes come here, and not into a large body."""
        self._release_held()
        if self._large is not None:
            self._large = None
            self._transport.set_protocol(self)

    def _release_held(self) -> None:
        self.context.held_bytes -= self._held
        self._held = 0

    def refuse_arriving(self) -> None:
        self._stop(503, "the server is receiving too many large requests at once; try again later")
        self._pump()

    # The end of listening.

    def _stop(self, status: int, message: str) -> _Stop:
        """Answers the request being parsed with an error, after those before it, and hears nothing more."""
        self.context.counters.protocol_errors += 1
        exchange = self._receiving
        if exchange is not None and exchange.streaming:
            self.abort()  # its endpoint is answering it
            return _Stop()
        if exchange is None:
            exchange = Http1Exchange(self)  # type: ignore[arg-type]  # this is always a Connection
            exchange.received_ns = self.context.clock()
            exchange.method = exchange.path = exchange.query = ""
            exchange.headers = {}
        exchange.endpoint = partial(refuse, no=refusal(status, message))
        exchange.coding = b""
        return self._stop_reading_body(exchange)

    def _stop_reading_body(self, exchange: Http1Exchange) -> _Stop:
        exchange.keep = CLOSE
        self._deaf = True
        self._in_head = self._expects_continue = False
        self._receiving = None
        self._rest = b""
        self._parts = []
        self._body = bytearray()
        self._listen_again()
        self._queue.append(exchange)
        return _Stop()


def _too_large(size: int, limit: int, about: str = "") -> str:
    return (
        f"Request body size of {about}{size} bytes exceeds the maximum allowed input size of {limit} bytes. "
        "Use --http-max-input-size to increase the limit."
    )


_ABSOLUTE = re.compile(r"https?://[^/?#]+", re.IGNORECASE)


def _origin_form(target: str) -> str:
    """A target as proxies send it, `http://host/path`, without its beginning (RFC 9112 section 3.2.2)."""
    found = _ABSOLUTE.match(target)
    if found is None:
        return target
    rest = target[found.end() :]
    return rest if rest.startswith("/") else f"/{rest}"
