"""A worker process's end of the side socket: a thread that reads it, and senders in any thread. Knows no model.

Responses that come quickly leave together: one that comes alone leaves at once, those right after it with the next
frame. A model that makes them faster than its clients read them waits in `emit`.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

from doorstep.errors import BackendError, DoorstepError
from doorstep.request import InferenceRequest, Outputs
from doorstep.types import Tensor
from doorstep.workers.channel import Channel
from doorstep.workers.child_request import WorkerRequest
from doorstep.workers.frames import INLINE_BYTES, RESPONSE_BYTES, WINDOW_BYTES, Kind, Layout, raw_frame
from doorstep.workers.outcome import described, error_meta
from doorstep.workers.shared_memory import UNUSED_SECONDS, Reader, Segment, Writer

TOGETHER_NS = 100_000  # responses within this time of the last frame wait for the next one
TOGETHER_BYTES = 32 * 1024  # unless there are as many
_dumps = orjson.dumps


class _Need:
    """A thread waits for a segment."""

    __slots__ = ("error", "segment", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.segment: Segment | None = None
        self.error = ""


class ChildSide:
    def __init__(self, channel: Channel, on_end: Callable[[], None]) -> None:
        """`on_end` is called in the reading thread when the server is gone."""
        self.inputs = Reader()
        self.handlers: dict[int, Callable[[Any, bytearray], None]] = {
            Kind.SEGMENT: self._on_segment,
            Kind.RELEASE: self._on_release,
            Kind.FORGET: lambda ids, _: self.inputs.forget(ids),
            Kind.TAKEN: self._on_taken,
            Kind.CANCEL: self._on_cancel,
        }
        self._channel = channel
        self._on_end = on_end
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # room for a response, a segment, or the end
        self._open: dict[int, WorkerRequest] = {}  # those that got, or will get, their responses one by one
        self._outputs = Writer()
        self._needs: dict[int, _Need] = {}
        self._need_count = 0
        self._ended = False
        self.frame_count = 0  # EMIT frames sent
        # What is not sent yet.
        self._pending: list[bytes] = []
        self._pending_data: list[bytes | bytearray] = []
        self._pending_bases: list[int] = []
        self._pending_bytes = 0
        self._sending = threading.Lock()
        self._sent_ns = 0
        self._flusher: threading.Thread | None = None
        self._left_over = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._read, name="doorstep-side", daemon=True).start()

    # Responses

    def emit(self, request: InferenceRequest, outputs: Sequence[Tensor] | DoorstepError | None, final: bool) -> None:
        """`Batch.emit`, from any thread."""
        assert isinstance(request, WorkerRequest)
        if request.ended:
            return
        what, data, segment, cost = self._encode(request, outputs)
        final = final or isinstance(outputs, DoorstepError)
        with self._lock:
            while not final and request.unread_bytes >= WINDOW_BYTES and not self._ended and not request.unwanted:
                self._changed.wait(0.5)  # flags of cancellation wake nobody
            if request.ended or (request.unwanted and not final):
                if segment is not None:
                    self._outputs.release((segment.id,))
                return
            if final:
                request.ended = True
                self._open.pop(request.number, None)
                request.over()
            else:
                self._open[request.number] = request
            request.unread_bytes += cost
            meta = _dumps((request.number, final, cost, segment.id if segment is not None else -1, what[0], what[1]))
            self._pending.append(meta)
            self._pending_bases.append(self._pending_bytes)
            if data:
                self._pending_data.append(data)
                self._pending_bytes += len(data)
            now = time.monotonic_ns()
            if now - self._sent_ns <= TOGETHER_NS and self._pending_bytes + len(self._pending) * 64 < TOGETHER_BYTES:
                if not self._left_over.is_set():
                    self._start_flusher()
                    self._left_over.set()
                return
        self.flush()

    def _encode(
        self, request: WorkerRequest, outputs: Sequence[Tensor] | DoorstepError | None
    ) -> tuple[tuple[Any, Any], bytes | bytearray, Segment | None, int]:
        """What a response says (outputs or error, parameters), its data or segment, and what it counts for."""
        if outputs is None:
            return (None, None), b"", None, RESPONSE_BYTES
        if isinstance(outputs, DoorstepError):
            return (error_meta(outputs), None), b"", None, RESPONSE_BYTES
        parameters = outputs.parameters if isinstance(outputs, Outputs) else None
        try:
            layout = Layout()
            entries = layout.add(outputs)
            if parameters:
                _dumps(parameters)
            data, segment = self.place(layout)
        except DoorstepError as error:
            return (error_meta(error), None), b"", None, RESPONSE_BYTES
        except Exception as error:  # an output no array of its datatype can hold
            failed = BackendError(f"the outputs cannot be sent: {described(error)}")
            return (error_meta(failed), None), b"", None, RESPONSE_BYTES
        return (entries, parameters), data, segment, layout.size + RESPONSE_BYTES

    def left_open(self, request: WorkerRequest) -> None:
        """Its batch is done, and it is not."""
        with self._lock:
            if not request.ended:
                self._open[request.number] = request

    def watch(self, request: WorkerRequest) -> None:
        """Its cancellation comes as a frame: there are more requests than flags."""
        with self._lock:
            self._open[request.number] = request

    def forget(self, request: WorkerRequest) -> None:
        """It has had its one response, with its batch."""
        with self._lock:
            request.ended = True
            self._open.pop(request.number, None)

    def flush(self) -> None:
        """Sends what there is."""
        with self._sending:
            with self._lock:
                pending, self._pending = self._pending, []
                if not pending:
                    return
                bases, self._pending_bases = self._pending_bases, []
                chunks, self._pending_data = self._pending_data, []
                self._pending_bytes = 0
                self._sent_ns = time.monotonic_ns()
            text = b"[%b,%b]" % (_dumps(bases), b",".join(pending))
            self._channel.send_raw(raw_frame(Kind.EMIT, text, b"".join(chunks)))
            self.frame_count += 1

    @property
    def has_pending(self) -> bool:
        return bool(self._pending)

    def _start_flusher(self) -> None:
        if self._flusher is None:
            self._flusher = threading.Thread(target=self._flush_later, name="doorstep-flush", daemon=True)
            self._flusher.start()

    def _flush_later(self) -> None:
        """Sends what no later response took along."""
        while self._left_over.wait():
            time.sleep(TOGETHER_NS / 1e9)
            self._left_over.clear()
            try:
                self.flush()
            except OSError:
                return  # the server is gone

    # Frames

    def send(self, kind: Kind, meta: Any, data: bytes | bytearray = b"") -> None:
        """Raises OSError when the server is gone."""
        released = self.inputs.released()
        if released:
            self._channel.send(Kind.RELEASE, released)
        self._channel.send(kind, meta, data)

    def _read(self) -> None:
        channel = self._channel
        try:
            while True:
                if not channel.wait(UNUSED_SECONDS / 2 if len(self._outputs) or len(self.inputs) else None):
                    self._trim()
                    continue
                kind, meta, data = channel.receive()
                self.handlers[kind](meta, data)
                del meta, data
        except (EOFError, OSError):
            with self._lock:
                self._ended = True
                self._changed.notify_all()
            self._on_end()
        except BaseException as error:  # whoever waits for this thread would wait for ever
            traceback.print_exception(error)
            os._exit(1)

    def _on_taken(self, meta: Any, _: bytearray) -> None:
        number, cost = meta
        with self._lock:
            request = self._open.get(number)
            if request is not None:
                request.unread_bytes -= cost
                self._changed.notify_all()

    def _on_cancel(self, number: Any, _: bytearray) -> None:
        with self._lock:
            request = self._open.get(number)
            if request is not None:
                request.cancelled_by_message = True
                self._changed.notify_all()

    # Memory

    def place(self, layout: Layout) -> tuple[bytes | bytearray, Segment | None]:
        """The bytes of `layout`, or the segment it has been written to. Raises BackendError."""
        if layout.size <= INLINE_BYTES:
            return layout.joined() if layout.size else b"", None
        segment = self._segment(layout.size)
        layout.write(segment.map)
        return b"", segment

    def _segment(self, size: int) -> Segment:
        with self._lock:
            segment = self._outputs.take(size)
            if segment is not None:
                return segment
            self._need_count += 1
            number = self._need_count
            need = self._needs[number] = _Need(size)
        self._channel.send(Kind.NEED, (number, size))
        with self._lock:
            self._changed.wait_for(lambda: need.segment is not None or need.error or self._ended)
            self._needs.pop(number, None)
            if need.segment is None:
                raise BackendError(need.error or "the server is gone")
            return need.segment

    def _on_segment(self, meta: Mapping[str, Any], _: bytearray) -> None:
        made: Segment | None = None
        if "id" in meta:
            made = Segment(meta["id"], self._channel.descriptor(), meta["size"])
            if meta["for"] == "inputs":
                self.inputs.add(made)
                return
        with self._lock:
            if made is not None:
                self._outputs.add(made)
            number = meta["need"]
            need = self._needs.get(number)
            if need is None:
                return
            need.error = meta.get("error", "")
            if not need.error:
                need.segment = self._outputs.take(need.size)
            self._changed.notify_all()
        if need.segment is None and not need.error:  # another thread was quicker
            self._channel.send(Kind.NEED, (number, need.size))

    def _on_release(self, ids: Any, _: bytearray) -> None:
        with self._lock:
            self._outputs.release(ids)

    def _trim(self) -> None:
        """Gives back segments that nobody has written for a while. Only the writing side can tell."""
        with self._lock:
            ids = self._outputs.unused(time.monotonic() - UNUSED_SECONDS)
        if ids:
            self._channel.send(Kind.FORGET, ids)
        if released := self.inputs.released():
            self._channel.send(Kind.RELEASE, released)
