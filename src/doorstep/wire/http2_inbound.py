"""What a client sends on an HTTP/2 connection, frame by frame, before the library sees it. Knows no endpoint.

Every frame's head is looked at. Large DATA frames go past the library: their bytes land where the exchange wants them,
without a copy where the kernel can put them there itself. WINDOW_UPDATE counts in the outbox. All else goes on to the
library, byte for byte, in pieces as large as possible; so does every large DATA frame that is not plainly in order.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from doorstep.wire.answers import fail
from doorstep.wire.flow import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    HEADERS,
    MAX_WINDOW,
    PADDED,
    WINDOW_UPDATE,
    window_update,
)
from doorstep.wire.http2_dispatch import admits

if TYPE_CHECKING:
    from doorstep.wire.http2 import Http2Connection
    from doorstep.wire.http2_exchange import Http2Exchange

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LARGE = 16_384  # a DATA frame of at least so many bytes goes past the library
_DIRECT = 65_536  # with so many still to come, the kernel writes them where they belong
_INBOX = 1 << 18
_STREAM_ID = 0x7FFFFFFF

_unpack_head = FRAME_HEAD.unpack_from
_inboxes = threading.local()  # what is read is dealt with before the next read: one inbox per event loop will do


def _inbox() -> memoryview:
    view: memoryview | None = getattr(_inboxes, "view", None)
    if view is None:
        view = _inboxes.view = memoryview(bytearray(_INBOX))
    return view


class Inbound:
    """Where in the client's sequence of frames we are. Touched only from the event loop."""

    __slots__ = (
        "_direct",
        "_exchange",
        "_flags",
        "_held",
        "_inbox",
        "_kind",
        "_last",
        "_left",
        "_owner",
        "_skip",
        "_stream_id",
        "_unread",
    )

    def __init__(self, owner: Http2Connection) -> None:
        self._owner = owner
        self._inbox = _inbox()
        self._skip = len(PREFACE)  # bytes that go to the library unseen
        self._held = b""  # the beginning of a frame of which more has to be seen
        self._kind, self._flags = HEADERS, 0  # the last frame; at first as if a header block had begun
        self._exchange: Http2Exchange | None = None  # whose large DATA frame is arriving
        self._stream_id = 0
        self._left = 0  # bytes of that frame still to come
        self._last = False  # it ends the stream
        self._direct = False  # the current read goes into the exchange's `landing`
        self._unread = 0  # bytes of large DATA frames not yet given back to the connection's window

    @property
    def in_block(self) -> bool:
        """A header block, or a frame other than DATA, has begun and not ended."""
        return bool(self._held or (self._skip and self._kind != DATA) or _unfinished(self._kind, self._flags))

    def buffer(self) -> memoryview:
        """Where the next read goes."""
        if self._left >= _DIRECT and (exchange := self._exchange) is not None:
            landing = exchange.landing
            if landing is not None and len(landing) >= _DIRECT:
                self._direct = True
                return landing[: self._left]
        self._direct = False
        held = self._held
        if held:
            size = len(held)
            self._inbox[:size] = held
            return self._inbox[size:]
        return self._inbox

    def filled(self, size: int) -> None:
        """`size` bytes have been read into `buffer()`."""
        if self._direct:
            self._direct = False
            self._landed(size)
        else:
            held = len(self._held)
            if held:
                self._held = b""
                size += held
            self.walk(self._inbox[:size])

    def walk(self, data: memoryview) -> None:
        """Bytes as they came. Runs of frames that are the library's go to it in one piece."""
        size = len(data)
        position = min(self._left, size)
        if position:
            self._piece(data[:position])
        start = position  # of the run
        skip = self._skip
        if skip:
            step = min(skip, size - position)
            self._skip = skip - step
            position += step
        kind, flags = self._kind, self._flags
        while size - position >= 9:
            high, low, next_kind, next_flags, stream_id = _unpack_head(data, position)
            length = high << 16 | low
            past = 0  # bytes of this frame that are not for the library; 0: it is
            if next_kind == DATA:
                if length >= LARGE and not next_flags & PADDED and not _unfinished(kind, flags):
                    self._feed(data[start:position])
                    start = position
                    if self._begins(stream_id & _STREAM_ID, length, next_flags):
                        past = 9 + min(length, size - position - 9)
                        if past > 9:
                            self._piece(data[position + 9 : position + past])
            elif next_kind == WINDOW_UPDATE and length == 4:
                if size - position < 13:
                    break
                increment = int.from_bytes(data[position + 9 : position + 13], "big") & MAX_WINDOW
                told = self._granted(stream_id & _STREAM_ID, increment)
                if told != increment:
                    self._feed(data[start:position])
                    if told:
                        self._feed(memoryview(window_update(stream_id, told)))
                    past = 13
            kind, flags = next_kind, next_flags
            if past:
                position += past
                start = position
            else:
                position += 9 + length
        self._kind, self._flags = kind, flags
        if position > size:
            self._skip = position - size
        elif position < size:
            self._held = bytes(data[position:])
        self._feed(data[start:position] if start or position < size else data)

    def _feed(self, data: memoryview) -> None:
        if len(data):
            self._owner.feed(data)

    # Large DATA frames

    def _begins(self, stream_id: int, length: int, flags: int) -> bool:
        """Whether a large DATA frame may go past the library. What is wrong with the others the library knows."""
        owner = self._owner
        exchange = owner.streams.get(stream_id)
        if exchange is None or exchange.remote_done or b"content-length" in exchange.headers:
            return False
        settings = owner.settings
        if length > settings.frame_bytes:
            return False
        if exchange.paced and exchange.lane_unread + length > settings.stream_window:
            owner.flow_control_error()
            return False
        self._exchange = exchange
        self._stream_id = stream_id
        self._left = length
        self._last = bool(flags & END_STREAM)
        return True

    def _piece(self, data: memoryview) -> None:
        """The next bytes of a large DATA frame, in the inbox."""
        size = len(data)
        self._left -= size
        exchange = self._exchange
        if exchange is not None and self._arrived(exchange, size):
            try:
                exchange.feed(data, False)
            except Exception as error:
                fail(exchange, error)
        if not self._left:
            self._ends()

    def _landed(self, size: int) -> None:
        """The next bytes of a large DATA frame, in `landing` already."""
        self._left -= size
        exchange = self._exchange
        if exchange is not None and self._arrived(exchange, size) and exchange.landing is not None:
            try:
                exchange.landed(size)
            except Exception as error:
                fail(exchange, error)
        if not self._left:
            self._ends()

    def _ends(self) -> None:
        self._exchange = None
        if self._last:
            # The library keeps the streams' states: it hears of the end as an empty frame.
            self._owner.feed(memoryview(FRAME_HEAD.pack(0, 0, DATA, END_STREAM, self._stream_id)))

    # The windows

    def _arrived(self, exchange: Http2Exchange, size: int) -> bool:
        """Counts bytes that came past the library; whether they are wanted."""
        owner = self._owner
        owner.work += size
        if exchange.paced and not exchange.disconnected:
            exchange.lane_unread += size
        else:
            self.give_back(size)
            self.give_back_stream(exchange, size)
        return admits(owner, exchange, size)

    def give_back(self, size: int) -> None:
        """To the connection's window, when it is worth a frame."""
        self._unread += size
        if self._unread >= self._owner.settings.connection_window >> 2:
            self._owner.transport.write(window_update(0, self._unread))
            self._unread = 0

    def give_back_stream(self, exchange: Http2Exchange, size: int) -> None:
        exchange.lane_given += size
        if exchange.lane_given >= self._owner.settings.stream_window >> 2 and not exchange.disconnected:
            self._owner.transport.write(window_update(exchange.stream_id, exchange.lane_given))
            exchange.lane_given = 0

    def _granted(self, stream_id: int, increment: int) -> int:
        """A WINDOW_UPDATE of the client; returns how much of it the library is to hear of."""
        owner = self._owner
        if not stream_id:
            return owner.outbox.grant(increment)
        stream = owner.outbox.streams.get(stream_id)
        if stream is None or not increment:
            return increment
        owner.outbox.grant_stream(stream, increment)
        # What left from the outbox was not taken off the library's count of this window: it must not overflow.
        return increment if owner.session.stream_remote_window_size(stream_id) + increment <= MAX_WINDOW else 0


def _unfinished(kind: int, flags: int) -> bool:
    return kind in (HEADERS, CONTINUATION) and not flags & END_HEADERS
