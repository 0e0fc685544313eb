"""HTTP/1.1 on one connection: from bytes to endpoints, and answers in order. Knows no model.

One request is answered at a time. What a client sends meanwhile is kept unparsed, up to a bound, and then left in the
socket; bytes are parsed in slices, so that a slice full of tiny requests is the most that ever waits. After an error,
or an answer that came before its request was whole, nothing more is parsed: the answer says `connection: close`, and
what the client still sends is thrown away for a moment, so that it can read the answer before the connection breaks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial
from typing import Any

import httptools

from doorstep.errors import InvalidArgument
from doorstep.wire.answers import JSON, error_body, fail, refusal, refuse
from doorstep.wire.body import LARGE_BYTES, LargeBody
from doorstep.wire.compression import INLINE_BYTES, decompress
from doorstep.wire.context import ListenerContext, describe
from doorstep.wire.exchange import Buffer
from doorstep.wire.http1_exchange import CLOSE, KEEP, KEEP_1_0, Http1Exchange

SLICE_BYTES = 8192  # parsed at a time where other requests may follow in the same bytes
HELD_BYTES = 65_536  # kept unparsed behind a request being answered before reading stops
STREAM_WINDOW = 262_144  # given to on_body and not consumed before reading stops
FRAMING_BYTES = 16  # per allowed chunk: what sizes, extensions, line ends and trailers may add to a chunked body

_METHODS = {m.encode(): m for m in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_CHUNKED = -1  # in place of a content-length


class _Stop(Exception):
    """Leaves the parser from inside one of its callbacks; the answer is in the queue already."""


class _Whole(Exception):
    """Leaves a parser that has done its one task."""


class _BodyOnly:
    """Stands between the parser and a connection that has the head of the request already."""

    def __init__(self, connection: Connection) -> None:
        self.on_body = connection.on_body
        self.on_chunk_header = connection.on_chunk_header
        self.on_message_complete = connection.on_upgraded_body_complete


class Connection(asyncio.Protocol):
    """Touched only from the event loop."""

    __slots__ = (
        "_body",
        "_chunks",
        "_current",
        "_deaf",
        "_expects_continue",
        "_framing",
        "_head_bytes",
        "_headers",
        "_held",
        "_in_head",
        "_keep_after_body",
        "_large",
        "_length",
        "_lingering",
        "_parser",
        "_parts",
        "_pumping",
        "_queue",
        "_rate_since_ns",
        "_rated",
        "_reading",
        "_receiving",
        "_repeated",
        "_rest",
        "_since_ns",
        "_stalled_ns",
        "_timing_head",
        "_transport",
        "_unsent",
        "_url",
        "choked",
        "context",
        "info",
        "lost",
        "write",
        "writelines",
    )

    def __init__(self, context: ListenerContext, transport: Any) -> None:
        """Whoever makes it then calls `transport.set_protocol(connection)` and gives it the bytes that came already."""
        self.context = context
        self.info = describe(transport, context.name, "1.1")
        self.lost = False  # nothing can be sent any more
        self.choked = False  # the client reads too slowly
        self.write = transport.write
        self.writelines = transport.writelines
        self._transport = transport
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Http1Exchange] = deque()  # whole requests, streaming ones and refusals, in order
        self._current: Http1Exchange | None = None  # being answered
        self._pumping = False
        self._rest: Buffer = b""  # read and not yet parsed
        self._reading = True
        self._deaf = False  # nothing is parsed any more
        self._lingering = False  # the last answer is on its way; reading on only to throw away
        self._since_ns = context.now_ns  # when it fell idle, began a head, last got a piece of a body, began to linger
        self._timing_head = False  # since_ns is when the unfinished head began
        self._stalled_ns = 0  # since when the client has read nothing of what is unsent
        self._unsent = 0
        self._rated: Http1Exchange | None = None  # whose body `sweep` saw arriving first at rate_since_ns
        self._rate_since_ns = 0
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
        context.connections.add(self)

    # Bytes in.

    def data_received(self, data: bytes) -> None:
        if self._current is None and not self._queue and not self._rest and not self._deaf and len(data) <= SLICE_BYTES:
            self._parse(data)
            self._pump()
        elif not self._deaf:
            self._rest = b"".join((self._rest, data)) if self._rest else data
            self._pump()
            if len(self._rest) > HELD_BYTES:
                self._pause()

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

    def _pump(self) -> None:
        """Answers and parses, by turns, as far as it goes without waiting."""
        if self._pumping:
            return
        self._pumping = True
        queue = self._queue
        while True:
            current = self._current
            if current is None and queue and not self.choked:
                self._current = exchange = queue.popleft()
                self._dispatch(exchange)
            elif self._rest and self._may_parse(current):
                rest = memoryview(self._rest)
                size = SLICE_BYTES
                receiving = self._receiving
                if receiving is not None and self._length > 0 and not receiving.streaming:
                    # Nothing but this body in these bytes.
                    size = max(size, self._length - sum(map(len, self._parts)))
                self._rest = rest[size:]
                self._parse(rest[:size])
            else:
                break
        self._pumping = False
        if self._current is None:
            if not self._in_head:
                self._timing_head = False
                self._since_ns = self.context.now_ns
            elif not self._timing_head:
                self._timing_head = True
                self._since_ns = self.context.now_ns
        if self._expects_continue and not self._queue and self._current in (None, self._receiving):
            self._expects_continue = False
            self.write(_CONTINUE)
        if not self._reading and (self._deaf or (len(self._rest) <= HELD_BYTES and not self._stream_is_full())):
            self._reading = True
            self._transport.resume_reading()

    def _may_parse(self, current: Http1Exchange | None) -> bool:
        if self._deaf or self._queue or self._large is not None or self.choked:
            return False
        return current is None or (current is self._receiving and not self._stream_is_full())

    def _pause(self) -> None:
        if self._reading and not self._deaf:
            self._reading = False
            self._transport.pause_reading()

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
        exchange = Http1Exchange(self)
        exchange.received_ns = context.clock()
        method = parser.get_method()
        exchange.method = method = _METHODS.get(method) or method.decode()
        url = self._url.decode("latin-1")
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
            coding = headers[b"content-encoding"].strip().lower()
            if coding not in match.codings.accepted:
                exchange.endpoint = partial(refuse, no=match.codings.refusal)
                wanted = False
            elif coding != b"identity":
                exchange.coding = coding
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
        # (A streaming endpoint without a body to stream is called like any other, with `body` empty.)

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
                self._refuse_arriving()
        elif self._length >= LARGE_BYTES:
            self._receive_large(exchange)

    def _receive_large(self, exchange: Http1Exchange) -> None:
        try:
            large = LargeBody(self, self._length, self._parts)
        except MemoryError:
            self._refuse_arriving()
            return
        self._parts = []
        self._large = large
        rest = memoryview(self._rest)
        self._rest = rest[large.missing :]
        large.put(rest[: large.missing])
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
                self._refuse_arriving()
                self._pump()
            return
        exchange = self._receiving
        assert exchange is not None
        exchange.body = large.view
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

    def _refuse_arriving(self) -> None:
        self._stop(503, "the server is receiving too many large requests at once; try again later")

    def _deliver(self, exchange: Http1Exchange, *, last: bool) -> None:
        """Hands a streaming endpoint what has come of its body."""
        parts, self._parts = self._parts, []
        if last and not parts:
            parts = [b""]
        for index, piece in enumerate(parts, 1):
            if exchange.on_body is None or exchange.ended:
                return
            exchange.unconsumed += len(piece)
            try:
                exchange.on_body(piece, last and index == len(parts))
            except Exception as error:
                fail(exchange, error)
        if self._stream_is_full():
            self._pause()

    def _stream_is_full(self) -> bool:
        current = self._current
        return current is not None and current.streaming and current.unconsumed >= STREAM_WINDOW

    def consumed(self, exchange: Http1Exchange) -> None:
        if exchange is self._current:
            self._pump()

    # Answers.

    def _dispatch(self, exchange: Http1Exchange) -> None:
        if exchange.coding:
            self._decode(exchange)
            return
        try:
            exchange.endpoint(exchange)
        except Exception as error:
            fail(exchange, error)
        if exchange.streaming and not exchange.ended:
            self._deliver(exchange, last=exchange is not self._receiving)

    def _decode(self, exchange: Http1Exchange) -> None:
        """Undoes the content-encoding, of a large body off the loop, and goes on."""
        coding, exchange.coding = exchange.coding, b""
        work = partial(decompress, coding, exchange.body, self.context.limits.body_bytes)
        if len(exchange.body) > INLINE_BYTES:
            future = asyncio.get_running_loop().run_in_executor(None, work)
            future.add_done_callback(lambda done: self._decoded(exchange, done.result))
        else:
            self._decoded(exchange, work)

    def _decoded(self, exchange: Http1Exchange, result: Any) -> None:
        try:
            exchange.body = result()
        except InvalidArgument as error:
            exchange.respond(400, JSON, error_body(error.message))
            return
        except Exception as error:
            fail(exchange, error)
            return
        if not self.lost:
            self._dispatch(exchange)

    def last_answer(self, exchange: Http1Exchange) -> None:
        """The server stops: the answer about to be given is this connection's last, unless others wait behind it."""
        if not self._queue and not self._rest and not self._in_head and self._receiving is None:
            exchange.keep = CLOSE

    def answered(self, exchange: Http1Exchange) -> None:
        self._current = None
        if exchange.keep is CLOSE:
            self._finish()
        else:
            self._pump()

    def _stop(self, status: int, message: str) -> _Stop:
        """Answers the request being parsed with an error, after those before it, and hears nothing more."""
        self.context.counters.protocol_errors += 1
        exchange = self._receiving
        if exchange is not None and exchange.streaming:
            self.abort()  # its endpoint is answering it
            return _Stop()
        if exchange is None:
            exchange = Http1Exchange(self)
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

    def _finish(self) -> None:
        """The last answer is written. Closes, after a moment for the client to stop sending where it may be at it."""
        if self._receiving is not None:
            self._receiving = None
            self._deaf = True
        self._in_head = False
        self._queue.clear()
        self._rest = b""
        if not self._deaf or self.context.draining:
            self._transport.close()
            return
        self._lingering = True
        self._since_ns = self.context.now_ns
        if self._transport.can_write_eof():
            self._transport.write_eof()
        if not self._reading:
            self._reading = True
            self._transport.resume_reading()

    # The transport's other news.

    def pause_writing(self) -> None:
        self.choked = True

    def resume_writing(self) -> None:
        self.choked = False
        self._stalled_ns = 0
        current = self._current
        if current is not None and current.on_drain is not None:
            try:
                current.on_drain()
            except Exception as error:
                fail(current, error)
        self._pump()

    def eof_received(self) -> None:
        """The client has closed, or says that it will send no more: it is taken to be gone."""
        self._leave()

    def connection_lost(self, exc: Exception | None) -> None:
        self.context.connections.discard(self)
        self._leave()
        self._parser = None  # it refers to this object

    def _leave(self) -> None:
        if self.lost:
            return
        self.lost = True
        self._deaf = True
        self._in_head = False
        self._receiving = self._rated = None
        self._rest = b""
        self._large = None
        self._queue.clear()
        self._release_held()
        current = self._current
        if current is not None and not current.ended:
            callback, current.on_disconnect = current.on_disconnect, None
            if callback is not None:
                try:
                    callback()
                except Exception as error:
                    fail(current, error)

    def abort(self) -> None:
        self._transport.abort()
        self._leave()

    def drain(self) -> None:
        if self._lingering or not (self._current or self._queue or self._receiving or self._in_head or self._rest):
            self._transport.close()

    def sweep(self, now_ns: int) -> None:
        limits = self.context.limits
        unsent = self._transport.get_write_buffer_size()
        if unsent:
            if not self._stalled_ns or unsent < self._unsent:
                self._stalled_ns = now_ns
            elif now_ns - self._stalled_ns > limits.write_timeout_s * 1e9:
                self._time_out()
            self._unsent = unsent
            return
        self._stalled_ns = 0
        waited_s = (now_ns - self._since_ns) / 1e9
        if self._lingering:
            if waited_s > limits.linger_timeout_s:
                self.abort()
        elif self._receiving is not None and self._reading and self._current in (None, self._receiving):
            if waited_s > limits.body_timeout_s:
                self._time_out("the request's body did not arrive in time")
            elif self._too_slow(now_ns):
                self._time_out(f"the request's body came at less than {limits.body_rate} bytes per second")
        elif self._current is not None:
            pass  # the answer takes as long as it takes
        elif self._in_head:
            if waited_s > limits.header_timeout_s:
                self._time_out("the request's header fields did not arrive in time")
        elif waited_s > limits.idle_timeout_s:
            self.context.counters.timeouts += 1
            self._transport.close()

    def _too_slow(self, now_ns: int) -> bool:
        exchange = self._receiving
        limits = self.context.limits
        if exchange is None or exchange.streaming:
            return False
        if exchange is not self._rated:
            self._rated, self._rate_since_ns = exchange, now_ns
        seconds = (now_ns - self._rate_since_ns) / 1e9
        arrived = self._held or sum(map(len, self._parts))
        return seconds > limits.body_timeout_s and arrived < seconds * limits.body_rate

    def _time_out(self, message: str = "") -> None:
        self.context.counters.timeouts += 1
        if message:
            self._stop(408, message)
            self._pump()
        else:
            self.abort()

    def __repr__(self) -> str:
        doing = "answering" if self._current else "receiving" if self._receiving or self._in_head else "idle"
        return f"<http1.Connection {self.info.peer} {doing}>"


def _too_large(size: int, limit: int, about: str = "") -> str:
    return (
        f"Request body size of {about}{size} bytes exceeds the maximum allowed input size of {limit} bytes. "
        "Use --http-max-input-size to increase the limit."
    )
