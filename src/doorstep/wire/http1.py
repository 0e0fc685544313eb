"""HTTP/1.1 on one connection: requests to endpoints, answers in order, time limits. Knows no model.

One request is answered at a time. What a client sends meanwhile is kept unparsed, up to a bound, and then left in the
socket; bytes are parsed in slices, so that a slice full of tiny requests is the most that ever waits. After an error,
or an answer that came before its request was whole, nothing more is parsed: the answer says `connection: close`, and
what the client still sends is thrown away for a moment, so that it can read the answer before the connection breaks.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from doorstep.errors import InvalidArgument
from doorstep.wire.answers import JSON, error_body, fail
from doorstep.wire.compression import INLINE_BYTES, decompress
from doorstep.wire.context import ListenerContext
from doorstep.wire.exchange import SpelledHeaders
from doorstep.wire.http1_exchange import CLOSE, Http1Exchange
from doorstep.wire.http1_reader import SLICE_BYTES, RequestReader
from doorstep.wire.http1_repeat import Repeat, repeatable

HELD_BYTES = 65_536  # kept unparsed behind a request being answered before reading stops
STREAM_WINDOW = 262_144  # given to on_body and not consumed before reading stops

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection(RequestReader):
    """Touched only from the event loop."""

    __slots__ = (
        "_lingering", "_pumping", "_rate_since_ns", "_rated", "_reading", "_repeat", "_stalled_ns", "_unsent",
        "choked", "lost", "write", "writelines",
    )  # fmt: skip

    def __init__(self, context: ListenerContext, transport: Any) -> None:
        """Whoever makes it then calls `transport.set_protocol(connection)` and gives it the bytes that came already."""
        super().__init__(context, transport)
        self.lost = False  # nothing can be sent any more
        self.choked = False  # the client reads too slowly
        self.write = transport.write
        self.writelines = transport.writelines
        self._pumping = False
        self._reading = True
        self._lingering = False  # the last answer is on its way; reading on only to throw away
        self._stalled_ns = 0  # since when the client has read nothing of what is unsent
        self._unsent = 0
        self._rated: Http1Exchange | None = None  # whose body `sweep` saw arriving first at rate_since_ns
        self._rate_since_ns = 0
        self._repeat: Repeat | None = None  # the last request, if it was a plain one
        context.connections.add(self)

    # Bytes in, requests out.

    def data_received(self, data: bytes) -> None:
        if self._current is None and not self._queue and not self._rest and not self._deaf and len(data) <= SLICE_BYTES:
            between = not self._in_head and self._receiving is None
            repeat = self._repeat
            if repeat is not None and between and len(data) == repeat.size and data.startswith(repeat.head):
                self._queue.append(repeat.exchange(self, data))
            else:
                self._parse(data)
                if between and len(self._queue) == 1 and not self._in_head and self._receiving is None:
                    self._repeat = repeatable(data, self._queue[0]) if not self.context.gates else None
            self._pump()
        elif not self._deaf:
            self._rest = b"".join((self._rest, data)) if self._rest else data
            self._pump()
            if len(self._rest) > HELD_BYTES:
                self._pause()

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
                size = self._next_slice()
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

    # Streaming endpoints.

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

    # The transport's news.

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

    # The listener's wishes.

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


class SpellingConnection(Connection):
    """One whose requests also know how their headers' names were spelled."""

    __slots__ = ()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._headers = SpelledHeaders()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        lower = name.lower()
        if lower != name and type(self._headers) is SpelledHeaders:
            self._headers.spelled.setdefault(lower, name)
