"""DATA frames of bodies too large, or too slow, to pass through the HTTP/2 library. Knows no socket and no header.

The library copies each byte it sends four times, into frames of 16 KB. Small whole answers are its own; every other
body waits here as views on the caller's buffers and leaves in frames as large as the client takes, without a copy. Both
kinds draw on one connection window, which is therefore counted here; the library is shown it as larger by `debt`, the
bytes sent behind its back, and never gets to send more than `credit` allows. Only touched from the event loop.
"""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import Any

from doorstep.wire.exchange import Buffer

FRAME_HEAD = Struct(">BHBBL")  # length (8 + 16 bits), type, flags, stream
DATA, HEADERS, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 7, 8, 9
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8
MAX_WINDOW = 2**31 - 1
LARGEST_FRAME = 1 << 20  # ours to send: more would only keep other streams waiting
STREAM_FULL, STREAM_LOW = 1 << 20, 1 << 18  # bytes of one body waiting to be sent: `write` says False; on_drain
CONNECTION_FULL = 1 << 24  # bytes of all bodies together, from which on each may have less
_TURN = 1 << 20  # bytes of one stream before it is another's turn

_pack_head = FRAME_HEAD.pack
_pack_update = Struct(">BHBBLL").pack


def window_update(stream_id: int, increment: int) -> bytes:
    return _pack_update(0, 4, WINDOW_UPDATE, 0, stream_id, increment)


class OutStream:
    """One body on its way out."""

    __slots__ = ("closed", "finished", "owner", "queue", "queued", "ready", "sent", "stream_id", "trailers", "window")

    def __init__(self, stream_id: int, window: int, owner: Any) -> None:
        self.stream_id = stream_id
        self.window = window  # bytes the client still takes; negative where it shrank its windows
        self.owner = owner
        self.queue: deque[memoryview] = deque()
        self.queued = 0  # bytes in `queue`
        self.sent = 0  # bytes that have left it
        self.finished = False  # nothing more will be queued
        self.trailers: Any = ()
        self.ready = False  # in the outbox's `_ready`
        self.closed = False


class Outbox:
    """All of a connection's bodies on their way out."""

    __slots__ = ("_ready", "credit", "debt", "initial_window", "max_frame", "queued", "streams")

    def __init__(self) -> None:
        self.credit = 65_535  # the connection's window, as the client sees it
        self.debt = 0  # of that, used up by bytes sent from here, and not yet given back by the client
        self.initial_window = 65_535  # of the client's SETTINGS
        self.max_frame = 16_384  # of the client's SETTINGS
        self.streams: dict[int, OutStream] = {}
        self.queued = 0  # bytes of all streams
        self._ready: deque[OutStream] = deque()

    @property
    def sendable(self) -> bool:
        return bool(self._ready) and (self.credit > 0 or any(not s.queue for s in self._ready))

    def open(self, stream_id: int, window: int, owner: Any) -> OutStream:
        stream = self.streams[stream_id] = OutStream(stream_id, window, owner)
        return stream

    def put(self, stream: OutStream, data: Buffer) -> int:
        """Queues bytes, which must not change until they are sent; returns how many."""
        view = memoryview(data)
        size = view.nbytes
        if size:
            stream.queue.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
            stream.queued += size
            self.queued += size
            self._wake(stream)
        return size

    def is_full(self, stream: OutStream) -> bool:
        """Whether the stream's endpoint should wait: much is queued of it, or some where much is queued of others."""
        return stream.queued > (STREAM_FULL if self.queued <= CONNECTION_FULL else STREAM_LOW >> 2)

    def has_room(self, stream: OutStream) -> bool:
        """Whether an endpoint that has waited may go on."""
        return stream.queued <= (STREAM_LOW if self.queued <= CONNECTION_FULL else STREAM_LOW >> 3)

    def finish(self, stream: OutStream, trailers: Any) -> None:
        stream.finished = True
        stream.trailers = trailers
        self._wake(stream)

    def drop(self, stream: OutStream) -> None:
        """Forgets what is queued of the stream."""
        stream.queue.clear()
        self.queued -= stream.queued
        stream.queued = 0

    def close(self, stream_id: int) -> None:
        """The stream is no more, sent or not."""
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            stream.closed = True
            self.drop(stream)

    def settings(self, settings: dict[int, int]) -> None:
        """The client's SETTINGS: 4 is INITIAL_WINDOW_SIZE, 5 MAX_FRAME_SIZE."""
        window = settings.get(4)
        if window is not None and window != self.initial_window:
            change = window - self.initial_window
            self.initial_window = window
            for stream in self.streams.values():
                stream.window += change
                self._wake(stream)
        frame = settings.get(5)
        if frame is not None:
            self.max_frame = min(frame, LARGEST_FRAME)

    def grant(self, increment: int) -> int:
        """The client's WINDOW_UPDATE for the connection; returns how much of it the library is to be told of."""
        self.credit += increment
        repaid = min(increment, self.debt)
        self.debt -= repaid
        return increment - repaid

    def grant_stream(self, stream: OutStream, increment: int) -> None:
        stream.window += increment
        self._wake(stream)

    def pump(self, budget: int, out: list[Buffer]) -> list[OutStream]:
        """Appends frames for up to `budget` bytes of bodies to `out`, streams in turn; returns the finished ones."""
        ready, done = self._ready, []
        credit = self.credit
        blocked: list[OutStream] = []
        while ready and budget > 0:
            stream = ready.popleft()
            if stream.closed:
                continue
            queue = stream.queue
            turn = min(_TURN, budget, credit, stream.window)
            while queue and turn > 0:
                size = _frame(stream, min(turn, self.max_frame), out)
                turn -= size
                credit -= size
                budget -= size
            if queue:
                if stream.window > 0 and credit > 0:
                    ready.append(stream)
                elif stream.window > 0:
                    blocked.append(stream)
                else:
                    stream.ready = False
            else:
                stream.ready = False
                if stream.finished:
                    done.append(stream)
                    self.streams.pop(stream.stream_id, None)
        ready.extendleft(reversed(blocked))
        sent = self.credit - credit
        self.queued -= sent
        self.debt += sent
        self.credit = credit
        return done

    def _wake(self, stream: OutStream) -> None:
        if not stream.ready and not stream.closed and (stream.finished or stream.queue):
            stream.ready = True
            self._ready.append(stream)


def _frame(stream: OutStream, room: int, out: list[Buffer]) -> int:
    """One DATA frame of at most `room` bytes, out of as many buffers as fit; returns its size."""
    queue = stream.queue
    at = len(out)
    out.append(b"")
    size = 0
    while queue and size < room:
        view = queue[0]
        free = room - size
        if view.nbytes <= free:
            out.append(view)
            size += view.nbytes
            queue.popleft()
        else:
            out.append(view[:free])
            queue[0] = view[free:]
            size = room
    out[at] = _pack_head(size >> 16, size & 0xFFFF, DATA, 0, stream.stream_id)
    stream.window -= size
    stream.queued -= size
    stream.sent += size
    return size
