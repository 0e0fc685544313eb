"""The event loop's side of one worker process: its socket, the memory shared with it, and what it prints.

Knows no restart and no scheduler; a batch is only its layout to it. Touched only from the event loop.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from doorstep.workers.frames import INLINE_BYTES, Kind, Layout, ProtocolError, frame
from doorstep.workers.output import LineReader
from doorstep.workers.shared_memory import UNUSED_SECONDS, Reader, Segment, Writer, make_memory, segment_size
from doorstep.workers.spawn import Process, log_line

LARGEST_SEGMENT = 16 * 1024**3
COPY_BYTES = 2 * 1024 * 1024  # copying more than this would hold up the loop: a thread does it


class Link:
    def __init__(
        self,
        process: Process,
        loop: asyncio.AbstractEventLoop,
        *,
        on_result: Callable[[Any, bytearray], None],
        on_failed: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        """`on_result(meta, data)` gets each RESULT and raises ProtocolError for a bad one; `on_failed(why)` hears that
        a batch could not be sent; `on_end` that the process has ended: only `drain` is of use then."""
        self.process = process
        self.busy = False  # a batch is out
        self.undelivered = False  # the last batch never reached the process
        self._gave_outputs = False  # during the last batch
        self._loop = loop
        self._on_result = on_result
        self._on_failed = on_failed
        self._on_end = on_end
        self._attached = False
        self._inputs = Writer()
        self._outputs = Reader()
        self._segment_count = 0
        self._unsent = bytearray()
        self._trim_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None

    def attach(self) -> None:
        """From now on the loop reads what the process sends and prints."""
        self._attached = True
        loop = self._loop
        loop.add_reader(self.process.sock.fileno(), self._on_readable)
        loop.add_reader(self.process.pidfd, self._on_end)
        for stream in self.process.streams:
            if stream.fd >= 0:
                loop.add_reader(stream.fd, self._on_output, stream)

    def detach(self) -> None:
        if not self._attached:
            return
        self._attached = False
        loop = self._loop
        loop.remove_reader(self.process.sock.fileno())
        loop.remove_writer(self.process.sock.fileno())
        loop.remove_reader(self.process.pidfd)
        for stream in self.process.streams:
            if stream.fd >= 0:
                loop.remove_reader(stream.fd)
        for timer in (self._trim_timer, self._flush_timer):
            if timer is not None:
                timer.cancel()

    def drain(self) -> None:
        """Takes what an ended process had sent. Raises ProtocolError."""
        while self._receive():
            pass

    # Batches

    def execute(self, layout: Layout, rows: int, number: int, requests: list[Any]) -> None:
        """Sends a batch; its first request is called `number`, and the others go on from there.

        Raises OSError or ValueError when it cannot; the process has seen nothing of it then."""
        self.busy = True
        self._gave_outputs = False
        released = self._outputs.released()
        try:
            if layout.size <= INLINE_BYTES:
                self._write(frame(Kind.EXECUTE, (-1, released, rows, number, requests), layout.joined()))
                return
            segment = self._input_segment(layout.size)
            message = frame(Kind.EXECUTE, (segment.id, released, rows, number, requests))
            if layout.size <= COPY_BYTES:
                layout.write(segment.map)
                self._write(message)
            else:
                copied = self._loop.run_in_executor(None, layout.write, segment.map)
                copied.add_done_callback(partial(self._copied, message))
        except BaseException:
            self._outputs.put_back(released)
            self.busy = False
            raise

    def memory(self, segment: int, released: list[int], data: bytearray) -> Any:
        """Where the tensors of a RESULT are. Raises KeyError. `released` are input segments that are free again."""
        if released:
            self._inputs.release(released)
        return data if segment < 0 else self._outputs.open(segment)

    def _copied(self, message: bytes, copied: asyncio.Future[None]) -> None:
        if not self.busy or not self._attached:
            return  # it died meanwhile; the batch has been answered
        if copied.cancelled() or copied.exception() is not None:
            self.busy = False
            self._on_failed("stopping" if copied.cancelled() else str(copied.exception()))
        else:
            self._write(message)

    # Frames

    def _on_readable(self) -> None:
        try:
            if not self._receive(at_end=self.kill):
                return
        except ProtocolError as error:
            self.process.budget("ERROR", f"the process is killed: it sent {error}")
            self.kill()

    def _receive(self, at_end: Callable[[], None] | None = None) -> bool:
        """Takes what has arrived. False if that is nothing; raises ProtocolError."""
        process = self.process
        try:
            count = process.sock.recv_into(process.frames.space())
        except BlockingIOError:
            return False
        except (
            ConnectionResetError
        ):  # it ended without having read all we sent: the batch, or a segment for its outputs
            self.undelivered = self.busy and not self._gave_outputs
            count = 0
        except OSError:
            count = 0
        if not count:
            if at_end is not None:
                at_end()
            return False
        for kind, meta, data in process.frames.received(count):
            if kind == Kind.RESULT:
                self.busy = False
                self._on_result(meta, data)
            elif kind == Kind.LOG:
                process.budget(*log_line(meta))
            elif kind == Kind.NEED:
                self._give_segment(meta)
            else:
                raise ProtocolError(f"a frame of kind {kind}")
        return True

    def kill(self) -> None:
        """It closed its socket or cannot be trusted: `on_end` follows."""
        self._loop.remove_reader(self.process.sock.fileno())
        self.process.signal(signal.SIGKILL)

    def _write(self, message: bytes) -> None:
        if not self._unsent:
            try:
                sent = self.process.sock.send(message)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.undelivered = True  # it has ended, and `on_end` is about to say so
                return
            if sent == len(message):
                return
            message = message[sent:]
            self._loop.add_writer(self.process.sock.fileno(), self._on_writable)
        self._unsent += message

    def _on_writable(self) -> None:
        try:
            sent = self.process.sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self.process.sock.fileno())

    # Shared memory

    def _input_segment(self, size: int) -> Segment:
        segment = self._inputs.take(size)
        if segment is None:
            self._make_segment("inputs", size)
            segment = self._inputs.take(size)
            assert segment is not None
        return segment

    def _give_segment(self, size: Any) -> None:
        if not isinstance(size, int) or not self.busy:
            raise ProtocolError("a wish for memory out of turn")
        self._gave_outputs = True
        try:
            if not 0 < size <= LARGEST_SEGMENT:
                raise OSError(f"outputs of {size} bytes; {LARGEST_SEGMENT} is the most for a batch")
            self._make_segment("outputs", size)
        except OSError as error:
            self._write(frame(Kind.SEGMENT, {"error": f"no shared memory for the outputs: {error}"}))

    def _make_segment(self, use: str, size: int) -> None:
        """Makes a segment and sends it to the process. Raises OSError."""
        size = segment_size(size)
        self._segment_count += 1
        id = self._segment_count
        fd = make_memory(size, f"doorstep-{use}")
        try:
            message = frame(Kind.SEGMENT, {"id": id, "size": size, "for": use})
            if self._unsent or socket.send_fds(self.process.sock, [message], [fd]) != len(message):
                raise OSError("the process does not read")
            kept = Segment(id, os.dup(fd), size, writable=use == "inputs")
        finally:
            os.close(fd)
        if use == "inputs":
            self._inputs.add(kept)
        else:
            self._outputs.add(kept)
        if self._trim_timer is None:
            self._trim_timer = self._loop.call_later(UNUSED_SECONDS, self._trim)

    def _trim(self) -> None:
        """Gives back segments that nobody has used for a while. Only between batches: then no frame is on its way."""
        self._trim_timer = None
        if not self.busy:
            before = time.monotonic() - UNUSED_SECONDS
            ids = self._inputs.unused(before) + self._outputs.unused(before)
            if ids:
                self._write(frame(Kind.FORGET, ids))
        if len(self._inputs) or len(self._outputs):
            self._trim_timer = self._loop.call_later(UNUSED_SECONDS / 2, self._trim)

    # What it prints

    def _on_output(self, stream: LineReader) -> None:
        if not stream.read():
            self._loop.remove_reader(stream.fd)
            stream.close()
        elif stream.over_budget():
            self._loop.remove_reader(stream.fd)  # the pipe fills, and the process waits
            self._loop.call_later(0.25, self._read_on, stream)
        if self.process.budget.dropped and self._flush_timer is None:
            self._flush_timer = self._loop.call_later(1.0, self._flush)

    def _read_on(self, stream: LineReader) -> None:
        if self._attached and stream.fd >= 0:
            self._loop.add_reader(stream.fd, self._on_output, stream)

    def _flush(self) -> None:
        self._flush_timer = None
        self.process.budget.flush()
