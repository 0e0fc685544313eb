"""The server's end of a worker process's side socket: frames either way, and the memory that goes with them.

Batches have a socket of their own, where one frame goes and one comes. Here is what comes at any time and from any
thread of the model. Knows no batch, request or model. Touched only from the event loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from doorstep.workers.frames import INLINE_BYTES, FrameBuffer, Kind, Layout, ProtocolError, frame
from doorstep.workers.shared_memory import UNUSED_SECONDS, Reader, Segment, Writer, make_memory, memory_of, segment_size

LARGEST_SEGMENT = 16 * 1024**3
OnFrame = Callable[[int, Any, bytearray], None]


class SideLink:
    def __init__(
        self,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        on_frame: OnFrame,
        on_bad: Callable[[str], None],
    ) -> None:
        """Owns `sock` from now on. `on_frame` raises ProtocolError for a bad one; `on_bad(why)` hears of it."""
        self._sock = sock
        self._loop = loop
        self._on_frame = on_frame
        self._on_bad = on_bad
        self._frames = FrameBuffer()
        self._unsent: deque[tuple[memoryview, int]] = deque()  # with a descriptor that goes along, or -1
        self._inputs = Writer()  # what the process reads
        self._outputs = Reader()  # what it writes
        self._segment_count = 0
        self._trim_timer: asyncio.TimerHandle | None = None
        self._reading = False
        self.closed = False

    def attach(self) -> None:
        if not self.closed:
            self.read_on()

    def read_on(self) -> None:
        if not self._reading and not self.closed:
            self._reading = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def pause(self) -> None:
        """What the process sends from now on stays in the socket, and then the process waits."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        if self.closed:
            return
        self.pause()
        if self._unsent:
            self._loop.remove_writer(self._sock.fileno())
        self.closed = True
        if self._trim_timer is not None:
            self._trim_timer.cancel()
        for _, fd in self._unsent:
            if fd >= 0:
                os.close(fd)
        self._unsent.clear()
        self._sock.close()

    def drain(self) -> None:
        """Takes what an ended process had sent. Raises ProtocolError."""
        while not self.closed and self._receive():
            pass

    def receive_now(self) -> None:
        """Takes something that is known to have been sent. Raises ProtocolError if it has not."""
        if self.closed or not self._receive():
            raise ProtocolError("less than it says it sent")

    # Frames

    def send(self, kind: Kind, meta: Any, data: bytes | bytearray = b"") -> None:
        """Raises TypeError for what is no JSON."""
        released = self._outputs.released()
        if released:
            self._write(frame(Kind.RELEASE, released))
        self._write(frame(kind, meta, data))

    def _write(self, message: bytes, fd: int = -1) -> None:
        """Takes `fd`, too."""
        if self.closed:
            if fd >= 0:
                os.close(fd)
            return
        self._unsent.append((memoryview(message), fd))
        if len(self._unsent) == 1 and not self._send_some():
            self._loop.add_writer(self._sock.fileno(), self._on_writable)

    def _on_writable(self) -> None:
        if self._send_some():
            self._loop.remove_writer(self._sock.fileno())

    def _send_some(self) -> bool:
        """Whether all of it is sent."""
        while self._unsent:
            message, fd = self._unsent[0]
            try:
                if fd >= 0:
                    sent = socket.send_fds(self._sock, [message], [fd])
                    os.close(fd)
                else:
                    sent = self._sock.send(message)
            except BlockingIOError:
                return False
            except OSError:  # it has ended
                sent = len(message)
                if fd >= 0:
                    os.close(fd)
            if sent < len(message):
                self._unsent[0] = (message[sent:], -1)
                continue
            self._unsent.popleft()
        return True

    def _on_readable(self) -> None:
        try:
            if self._receive() is False:
                self.pause()  # it has ended: the process's own end is noticed elsewhere
        except ProtocolError as error:
            self.pause()
            self._on_bad(str(error))

    def _receive(self) -> bool | None:
        """Takes what has arrived. None if that is nothing, False at the end; raises ProtocolError."""
        try:
            count = self._sock.recv_into(self._frames.space())
        except BlockingIOError:
            return None
        except OSError:
            return False
        if not count:
            return False
        for kind, meta, data in self._frames.received(count):
            if kind == Kind.NEED:
                self._give_segment(meta)
            elif kind == Kind.RELEASE:
                self._inputs.release(meta)
            elif kind == Kind.FORGET:
                self._outputs.forget(meta)
            else:
                self._on_frame(kind, meta, data)
        return True

    # Memory

    def place(self, layout: Layout) -> tuple[int, bytes | bytearray, Segment | None]:
        """Where the tensors of `layout` go: in the frame, which then is done, or into a segment, to be written there.

        Raises OSError."""
        if layout.size <= INLINE_BYTES:
            return -1, layout.joined(), None
        segment = self._inputs.take(layout.size)
        if segment is None:
            self._make_segment("inputs", layout.size, {})
            segment = self._inputs.take(layout.size)
            assert segment is not None
        return segment.id, b"", segment

    def memory(self, segment: int, data: bytearray) -> Any:
        """Where the tensors of a frame are. Raises ProtocolError."""
        return memory_of(self._outputs, segment, data)

    def _give_segment(self, meta: Any) -> None:
        try:
            need, size = meta
        except (TypeError, ValueError):
            raise ProtocolError("a wish for memory that is none") from None
        if not isinstance(size, int):
            raise ProtocolError("a wish for memory that is none")
        released = self._outputs.released()
        if released:
            self._write(frame(Kind.RELEASE, released))
            if any(self._outputs.size(id) >= size for id in released):
                self._write(frame(Kind.SEGMENT, {"need": need}))
                return
        try:
            if not 0 < size <= LARGEST_SEGMENT:
                raise OSError(f"outputs of {size} bytes; {LARGEST_SEGMENT} is the most for a response")
            self._make_segment("outputs", size, {"need": need})
        except OSError as error:
            self._write(frame(Kind.SEGMENT, {"need": need, "error": f"no shared memory for the outputs: {error}"}))

    def _make_segment(self, use: str, size: int, meta: dict[str, Any]) -> None:
        size = segment_size(size)
        self._segment_count += 1
        id = self._segment_count
        fd = make_memory(size, f"doorstep-{use}")
        try:
            kept = Segment(id, os.dup(fd), size, writable=use == "inputs")
        except BaseException:
            os.close(fd)
            raise
        self._write(frame(Kind.SEGMENT, {"id": id, "size": size, "for": use, **meta}), fd)
        if use == "inputs":
            self._inputs.add(kept)
        else:
            self._outputs.add(kept)
        if self._trim_timer is None:
            self._trim_timer = self._loop.call_later(UNUSED_SECONDS, self._trim)

    def _trim(self) -> None:
        """Gives back what nobody has written for a while. Only the writing side can tell."""
        self._trim_timer = None
        if ids := self._inputs.unused(time.monotonic() - UNUSED_SECONDS):
            self._write(frame(Kind.FORGET, ids))
        if released := self._outputs.released():
            self._write(frame(Kind.RELEASE, released))
        if not self.closed and (len(self._inputs) or len(self._outputs)):
            self._trim_timer = self._loop.call_later(UNUSED_SECONDS / 2, self._trim)
