"""One gRPC call on an HTTP/2 exchange: its messages in, its answer out. Knows no method and no protobuf.

A call is answered exactly once; whatever is sent after the client has gone, or after the deadline, goes nowhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from doorstep.errors import DoorstepError
from doorstep.wire.exchange import Buffer
from doorstep.wire.grpc_codec import BadFlag, MessageReader, MessageTooLarge, prefix
from doorstep.wire.grpc_compression import INLINE_BYTES, Corrupt, compress, decompress
from doorstep.wire.grpc_status import (
    OK_TRAILERS,
    RESPONSE_FIELDS,
    STATUS_OF,
    Fields,
    Status,
    status_fields,
)

if TYPE_CHECKING:
    from doorstep.wire.grpc import GrpcServer
    from doorstep.wire.http2_exchange import Http2Exchange

log = logging.getLogger("doorstep.grpc")

Metadata = Mapping[bytes, bytes]

FRAMED_BYTES = 65_536  # of small messages that wait for the end of a turn of the loop


class Truncated(ValueError):
    """The client ended its side in the middle of a message."""

    def __init__(self) -> None:
        super().__init__("the stream ended in the middle of a message")


class Call:
    """What unary calls and streams have in common. Touched only from the event loop."""

    __slots__ = (
        "_accepted",
        "_deadline_slot",
        "_encoding",
        "_server",
        "deadline_ns",
        "exchange",
        "finished",
        "initial_metadata",
        "metadata",
        "on_cancel",
        "state",
        "trailing_metadata",
    )

    def __init__(self, server: GrpcServer, exchange: Http2Exchange) -> None:
        self._server = server
        self.exchange = exchange
        self.metadata: Metadata = exchange.headers  # names in lower case; `-bin` values as sent, in base64
        self.deadline_ns = 0  # monotonic; 0: none
        self.state: Any = None  # the handler's own
        self.on_cancel: Callable[[], None] | None = None  # the client has gone or the deadline has passed; at most once
        self.initial_metadata: Fields | None = None  # the handler's, to be sent before the first message
        self.trailing_metadata: Fields | None = None  # the handler's, to be sent with the status
        self.finished = False
        self._deadline_slot = 0
        self._encoding: bytes | None = None  # of the client's messages
        self._accepted: bytes | None = None  # the encoding of ours; None: identity

    @property
    def peer(self) -> str:
        return self.exchange.connection.peer

    def expire(self) -> None:
        """The deadline has passed."""
        self._deadline_slot = 0
        if not self.finished:
            self._cancelled()
            if not self.finished:
                self.fail(Status.DEADLINE_EXCEEDED, "Deadline Exceeded")

    def fail(self, status: int, message: str = "") -> None:
        """Ends the call with a status other than OK."""
        if self.finished:
            return
        self._settle()
        exchange = self.exchange
        log.debug("%s fails with status %d: %s", exchange.path, status, message)
        exchange.grpc_status = status
        trailers = status_fields(status, message)
        if self.trailing_metadata:
            trailers += self.trailing_metadata
        if exchange.started:
            exchange.end(trailers)
        else:
            exchange.answer([*self._fields(), *trailers], 0, (), None)
        self._forget()

    def fail_with(self, error: BaseException) -> None:
        """Ends the call because of an exception: what it says if it is one of ours, only its kind if it is not."""
        if isinstance(error, DoorstepError):
            self.fail(STATUS_OF[error.code], error.message)
        elif isinstance(error, MessageTooLarge):
            self.fail(Status.RESOURCE_EXHAUSTED, str(error))
        elif isinstance(error, BadFlag | Corrupt | Truncated):
            self.fail(Status.INTERNAL, str(error))
        else:
            log.error("%s failed", self.exchange.path, exc_info=error)
            self.fail(Status.INTERNAL, f"internal error: {type(error).__name__}")

    def _fields(self) -> Fields:
        """The header fields of the answer."""
        fields = RESPONSE_FIELDS
        if self._accepted is not None:
            fields = [*fields, (b"grpc-encoding", self._accepted)]
        return [*fields, *self.initial_metadata] if self.initial_metadata else fields

    def _inflate(self, flag: int, data: Buffer) -> Buffer:
        if not flag:
            return data
        if self._encoding is None:
            raise Corrupt("a message is flagged as compressed, but there is no grpc-encoding")
        return decompress(self._encoding, data, self._server.message_bytes)

    def _settle(self) -> None:
        self.finished = True
        if self._deadline_slot:
            self._server.deadlines.discard(self._deadline_slot, self)
            self._deadline_slot = 0

    def _gone(self) -> None:
        """The client has gone."""
        if not self.finished:
            self.exchange.grpc_status = Status.CANCELLED
            self._settle()
            self._cancelled()
            self._forget()

    def _forget(self) -> None:
        """Lets go of the handler's callbacks, which hold the call."""
        self.on_cancel = None

    def _cancelled(self) -> None:
        on_cancel, self.on_cancel = self.on_cancel, None
        if on_cancel is not None:
            try:
                on_cancel()
            except Exception:
                log.exception("%s: on_cancel failed", self.exchange.path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.exchange.path} {'finished' if self.finished else 'open'}>"


class UnaryCall(Call):
    """One message in, one out: `respond`, or `fail`, at once or later."""

    __slots__ = ("_handler", "_messages", "_reader", "message")

    message: Buffer  # the request, decompressed; set when the handler is called

    def __init__(self, server: GrpcServer, exchange: Http2Exchange, handler: Callable[[UnaryCall], Any]) -> None:
        super().__init__(server, exchange)
        self._handler = handler
        self._reader: MessageReader | None = None

    def respond(self, payload: Buffer | tuple[Buffer, ...]) -> None:
        """The answer, in one buffer or several, which must not change afterwards; ends the call with OK."""
        if self.finished:
            return
        if type(payload) is bytes:
            buffers: tuple[Buffer, ...] = (payload,)
            size = len(payload)
        else:
            buffers = payload if isinstance(payload, tuple) else (payload,)
            size = sum(map(byte_length, buffers))
        if self._accepted is not None and size:
            if size <= INLINE_BYTES:
                self._send_smaller(buffers, size, compress(self._accepted, self._server.compression, buffers))
            else:
                work = run_aside(compress, self._accepted, self._server.compression, buffers)
                work.add_done_callback(lambda done: self._send_smaller(buffers, size, done.result()))
        else:
            self._send(buffers, size, False)

    def _send_smaller(self, buffers: tuple[Buffer, ...], size: int, compressed: bytes) -> None:
        if len(compressed) < size:
            self._send((compressed,), len(compressed), True)
        else:
            self._send(buffers, size, False)

    def _send(self, buffers: tuple[Buffer, ...], size: int, compressed: bool) -> None:
        if self.finished:
            return
        if size > self._server.message_bytes:
            self.fail(
                Status.RESOURCE_EXHAUSTED, f"Sent message larger than max ({size} vs. {self._server.message_bytes})"
            )
            return
        fields = RESPONSE_FIELDS if self._accepted is None and self.initial_metadata is None else self._fields()
        trailers = OK_TRAILERS if self.trailing_metadata is None else [*OK_TRAILERS, *self.trailing_metadata]
        self.finished = True
        if self._deadline_slot:
            self._settle()
        self.on_cancel = None
        exchange = self.exchange
        exchange.grpc_status = 0
        exchange.answer(fields, size + 5, (prefix(size, compressed), *buffers), trailers)

    def receive(self, data: Buffer, last: bool) -> None:
        """Bytes of the body: the exchange's `on_body`."""
        if self.finished:
            return
        # Nearly always the whole call is one small message in one piece.
        if last and self._reader is None and data[:1] == b"\0":
            size = len(data) - 5
            if size == int.from_bytes(data[1:5], "big") and 0 <= size <= self._server.message_bytes:
                self._run(data[5:])
                return
        try:
            self._receive(bytes(data), last)
        except Exception as error:
            self.fail_with(error)

    def _receive(self, data: bytes, last: bool) -> None:
        reader, exchange = self._reader, self.exchange
        if reader is None:
            reader = self._reader = MessageReader(self._server.message_bytes)
            self._messages: list[tuple[int, Buffer]] = []
        messages = self._messages
        if reader.room is not None:
            if exchange.landing is not None:
                raise Truncated
            messages.append(reader.filled())
        if data:
            messages += reader.feed(data)
        if len(messages) > 1:
            self.fail(Status.UNIMPLEMENTED, "more than one message in a call that takes one")
            return
        exchange.landing = reader.room
        if last:
            if not reader.between:
                raise Truncated
            if not messages:
                self.fail(Status.UNIMPLEMENTED, "no message in a call that takes one")
                return
            flag, message = messages[0]
            if flag and len(message) > INLINE_BYTES:
                run_aside(self._inflate, flag, message).add_done_callback(self._inflated)
            else:
                self._run(self._inflate(flag, message))

    def _inflated(self, done: asyncio.Future[Buffer]) -> None:
        error = done.exception()
        if self.finished:
            return
        if error is not None:
            self.fail_with(error)
        else:
            self._run(done.result())

    def _run(self, message: Buffer) -> None:
        self.message = message
        try:
            self._handler(self)
        except Exception as error:
            self.fail_with(error)


class StreamCall(Call):
    """Any number of messages both ways, then a status: `send` and `finish`.

    Messages, and the client's end, that come before the handler has set `on_message` wait for it.
    """

    __slots__ = ("_closed", "_ended", "_framed", "_framed_bytes", "_inflating", "_on_message", "_paused", "_reader",
                 "_stash", "_waiting", "on_drain", "on_full", "on_half_close")  # fmt: skip

    def __init__(self, server: GrpcServer, exchange: Http2Exchange) -> None:
        super().__init__(server, exchange)
        self.on_half_close: Callable[[], None] | None = None  # the client will send no more messages
        self.on_drain: Callable[[], None] | None = None  # after `send` returned False: there is room again
        self.on_full: Callable[[], None] | None = None  # what `send_framed` sent is more than the client reads
        self._framed: list[bytes] = []  # messages that go out together, at the end of this turn of the loop
        self._framed_bytes = 0
        self._on_message: Callable[[Buffer], None] | None = None
        self._reader = MessageReader(server.message_bytes)
        self._waiting: deque[tuple[int, Buffer]] = deque()  # messages not handed over yet
        self._stash: list[bytes] = []  # bytes not looked at yet, nor given back to the client's window
        self._paused = True  # until there is somebody to tell
        self._inflating = False
        self._ended = False  # the client has sent everything …
        self._closed = False  # … and on_half_close has been called

    @property
    def on_message(self) -> Callable[[Buffer], None] | None:
        return self._on_message

    @on_message.setter
    def on_message(self, callback: Callable[[Buffer], None]) -> None:
        self._on_message = callback
        self.resume()

    def pause(self) -> None:
        """No more messages for now; the client may send as much as fits into its window."""
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._hand_over()

    def send(self, *buffers: Buffer) -> bool:
        """One message, in one buffer or several, which must not change afterwards.

        False: the client reads too slowly, or no more; wait for `on_drain`, or `on_cancel`, before more."""
        if self.finished:
            return False
        if self._framed:
            self._send_framed()
        exchange = self._begun()
        size = sum(map(byte_length, buffers))
        if size > self._server.message_bytes:
            self.fail(
                Status.RESOURCE_EXHAUSTED, f"Sent message larger than max ({size} vs. {self._server.message_bytes})"
            )
            return False
        # Larger messages go as they are: to compress them here would hold up everybody else.
        if self._accepted is not None and 0 < size <= INLINE_BYTES:
            compressed = compress(self._accepted, self._server.compression, buffers)
            if len(compressed) < size:
                return exchange.write_buffers((prefix(len(compressed), True), compressed))
        return exchange.write_buffers((prefix(size), *buffers))

    @property
    def takes_framed(self) -> bool:
        """Whether `send_framed` may be used: nothing is compressed, nor too large for being small."""
        return self._accepted is None and self._server.message_bytes >= FRAMED_BYTES

    def send_framed(self, message: bytes) -> None:
        """One small message, with its length in front: PREFIX, no compression. Many that are sent in one turn of the
        loop cost little more than one; see `on_full`."""
        framed = self._framed
        if not framed:
            asyncio.get_running_loop().call_soon(self._send_framed)
        framed.append(message)
        self._framed_bytes += len(message)
        if self._framed_bytes > FRAMED_BYTES:
            self._send_framed()

    def _send_framed(self) -> None:
        framed = self._framed
        if not framed or self.finished:
            return
        data = b"".join(framed)
        framed.clear()
        self._framed_bytes = 0
        if not self._begun().write_buffers((data,)) and self.on_full is not None:
            self.on_full()

    def _begun(self) -> Http2Exchange:
        exchange = self.exchange
        if not exchange.started:
            exchange.start_fields(200, self._fields())
        exchange.on_drain = self.on_drain
        return exchange

    def drop_unsent(self) -> None:
        """Forgets what has been sent and not yet taken by the client. Nothing but the end may follow."""
        self._framed.clear()
        self.exchange.drop_unsent()

    def fail(self, status: int, message: str = "") -> None:
        if self._framed:
            self._send_framed()
        super().fail(status, message)

    def finish(self, status: int = Status.OK, message: str = "") -> None:
        """Ends the call, after what was sent."""
        self.fail(status, message)

    def _forget(self) -> None:
        super()._forget()
        self._framed.clear()
        self._on_message = self.on_half_close = self.on_drain = self.on_full = None

    def receive(self, data: Buffer, last: bool) -> None:
        """Bytes of the body: the exchange's `on_body`."""
        if self.finished:
            return
        self._ended = self._ended or last
        if self.exchange.landing is not None:
            self.fail_with(Truncated())
            return
        try:
            if self._reader.room is not None:
                self._waiting.append(self._reader.filled())
            if data:
                self._stash.append(bytes(data))
        except Exception as error:
            self.fail_with(error)
        else:
            self._hand_over()

    def _hand_over(self) -> None:
        waiting, stash = self._waiting, self._stash
        try:
            while not (self._paused or self._inflating or self.finished):
                if waiting:
                    self._deliver(*waiting.popleft())
                elif stash:
                    data = stash.pop(0)
                    waiting.extend(self._reader.feed(data))
                    self.exchange.landing = self._reader.room
                    self.exchange.patient = self._reader.between
                    self.exchange.consume(len(data))
                else:
                    if self._ended:
                        self._half_close()
                    return
        except Exception as error:
            self.fail_with(error)

    def _deliver(self, flag: int, message: Buffer) -> None:
        assert self._on_message is not None
        if flag and len(message) > INLINE_BYTES:
            self._inflating = True
            run_aside(self._inflate, flag, message).add_done_callback(self._inflated)
        else:
            self._on_message(self._inflate(flag, message) if flag else message)

    def _inflated(self, done: asyncio.Future[Buffer]) -> None:
        self._inflating = False
        error = done.exception()
        if self.finished or self._on_message is None:
            return
        try:
            if error is not None:
                raise error
            self._on_message(done.result())
        except Exception as error:
            self.fail_with(error)
        else:
            self._hand_over()

    def _half_close(self) -> None:
        if self._closed:
            return
        if not self._reader.between:
            raise Truncated
        self._closed = True
        if self.on_half_close is not None:
            self.on_half_close()


def byte_length(buffer: Buffer) -> int:
    return buffer.nbytes if type(buffer) is memoryview else len(buffer)


def run_aside(function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().run_in_executor(None, function, *args)
