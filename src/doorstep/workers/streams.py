"""The requests a worker process has, each with its number, its flag, and what it has sent to those not answered yet.

Knows no socket and no restart. Touched only from the event loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from doorstep.errors import DoorstepError
from doorstep.request import Batch, Emit, InferenceRequest, Outputs
from doorstep.workers.child_request import ASKED_TO_STOP, CANCELLED
from doorstep.workers.frames import WINDOW_BYTES, Kind, ProtocolError, read_tensors
from doorstep.workers.outcome import read_error
from doorstep.workers.side_link import SideLink

logger = logging.getLogger("doorstep.model")

OnCancel = Callable[[InferenceRequest], None] | None


class Open:
    """A request that has, or will have, its responses one by one."""

    __slots__ = ("emit", "ended", "left", "number", "on_cancel", "request", "slot", "taken")

    def __init__(self, request: InferenceRequest, number: int, slot: int, emit: Emit, on_cancel: OnCancel) -> None:
        self.request = request
        self.number = number
        self.slot = slot
        self.emit = emit
        self.on_cancel = on_cancel  # whose it was before
        self.taken = 0  # bytes of its responses, that the process has not been told have gone on
        self.ended = False  # it has had its final response
        self.left = False  # its batch is done


class Streams:
    """Of one process."""

    def __init__(self, link: SideLink, flags: Any) -> None:
        self._link = link
        self._flags = flags
        self._free = list(range(len(flags) - 1, -1, -1))  # flags: any request may have one, while there are any
        self._last = 0  # the number given last
        self._open: dict[int, Open] = {}
        self._of: dict[InferenceRequest, Open] = {}
        self._on_room = self._room
        self.frame_count = 0  # EMIT frames that have come
        # The batch that is in the process.
        self._batch: Batch | None = None
        self._first = 0
        self._slots: list[int] = []
        self._on_cancels: list[OnCancel] = []

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, batch: Batch, on_cancel: Callable[[InferenceRequest], None]) -> tuple[int, list[int]]:
        """Takes the requests of a batch: the number of the first, and their flags (-1: none)."""
        free = self._free
        slots = []
        on_cancels = []
        for request in batch.requests:
            slot = free.pop() if free else -1
            if slot >= 0:
                self._flags[slot] = CANCELLED if request.cancelled else 0
            slots.append(slot)
            on_cancels.append(request.on_cancel)
            request.on_cancel = on_cancel
        self._batch = batch
        self._first = self._last + 1
        self._last += len(slots)
        self._slots = slots
        self._on_cancels = on_cancels
        return self._first, slots

    def end(self, later: Any) -> None:
        """The batch is done. Gives back all but the requests whose result is `later`."""
        batch = self._batch
        if batch is None:
            return
        self._batch = None
        opened = self._open
        free = self._free
        number = self._first
        for request, slot, on_cancel, result in zip(
            batch.requests, self._slots, self._on_cancels, batch.results, strict=True
        ):
            open_ = opened.get(number) if opened else None
            if result is later and (open_ is None or not open_.ended):
                if open_ is None:
                    open_ = self._add(Open(request, number, slot, batch.emit, on_cancel))
                open_.left = True
            else:
                if open_ is not None:
                    del opened[number]
                    del self._of[request]
                request.on_cancel = on_cancel
                if slot >= 0:
                    free.append(slot)
            number += 1

    def abandon(self) -> None:
        """The process has seen nothing of the batch: its requests are as they were."""
        batch, self._batch = self._batch, None
        if batch is not None:
            for request, on_cancel in zip(batch.requests, self._on_cancels, strict=True):
                request.on_cancel = on_cancel
            self._free.extend(slot for slot in self._slots if slot >= 0)

    def has_ended(self, request: InferenceRequest) -> bool:
        """Whether a request of the batch has had its final response already."""
        open_ = self._of.get(request)
        return open_ is not None and open_.ended

    def find(self, number: int) -> InferenceRequest | None:
        if self._batch is not None and 0 <= number - self._first < len(self._slots):
            return self._batch.requests[number - self._first]
        open_ = self._open.get(number)
        return open_.request if open_ is not None else None

    def ask_to_stop(self, request: InferenceRequest) -> bool:
        """Tells the model only. False: it cannot be told, for want of a flag."""
        open_ = self._of.get(request)
        if open_ is not None:
            slot = open_.slot
        elif self._batch is not None and request in self._batch.requests:
            slot = self._slots[self._batch.requests.index(request)]
        else:
            return False
        if slot < 0:
            return False
        self._flags[slot] = ASKED_TO_STOP
        return True

    def cancel(self, request: InferenceRequest) -> int:
        """Tells the model, and whoever gave us the request. The request's number, or 0."""
        batch = self._batch
        open_ = self._of.get(request)
        if open_ is not None:
            number, slot, on_cancel = open_.number, open_.slot, open_.on_cancel
        elif batch is not None and request in batch.requests:
            i = batch.requests.index(request)
            number, slot, on_cancel = self._first + i, self._slots[i], self._on_cancels[i]
        else:
            return 0
        if slot >= 0:
            self._flags[slot] = CANCELLED
        if slot < 0 or open_ is not None:  # it may be waiting for room
            self._link.send(Kind.CANCEL, number)
        if on_cancel is not None:
            on_cancel(request)
        return number

    def fail(self, error: DoorstepError) -> None:
        """The process is no more: all that are open, but for those of the batch, get `error`."""
        failed = [open_ for open_ in self._open.values() if open_.left]
        for open_ in failed:
            self._remove(open_)
            open_.ended = True
        for open_ in failed:
            open_.emit(open_.request, error, True)

    def on_emit(self, meta: Any, data: bytearray) -> None:
        """An EMIT frame. Raises ProtocolError."""
        self.frame_count += 1
        try:
            bases = meta[0]
            said = [self._decode(meta[i], bases[i - 1], data) for i in range(1, len(meta))]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ProtocolError(f"a response that is none: {error!r}") from None
        for number, outputs, final, cost in said:
            open_ = self._open.get(number) or self._early(number)
            if open_ is None or open_.ended:
                continue
            if final:
                open_.ended = True
                if open_.left:
                    self._remove(open_)
            try:
                open_.emit(open_.request, outputs, final)
            except Exception:  # the server's own trouble; the other responses must not be lost with it
                logger.exception("a response could not be passed on")
            if not final:
                open_.taken += cost
                if open_.taken * 2 >= WINDOW_BYTES:
                    self._tell_taken(open_)

    def _decode(self, meta: Any, base: int, data: bytearray) -> tuple[int, Any, bool, int]:
        number, final, cost, segment, what, parameters = meta
        if type(number) is not int or type(cost) is not int or cost < 0:
            raise ValueError(meta)
        # Even if nobody waits for it: a segment that is opened is released in the end.
        memory = self._link.memory(segment, data)
        outputs: Any = None
        if type(what) is list:
            outputs = read_tensors(what, memory, base if segment < 0 else 0)
            if parameters:
                outputs = Outputs(outputs, parameters)
        elif what is not None:
            outputs = read_error(what)
            final = True
        return number, outputs, bool(final), cost

    def _early(self, number: int) -> Open | None:
        """The request of that number, if it is in the batch: its first response. None if it is over."""
        batch = self._batch
        if batch is not None and self._first <= number <= self._last:
            i = number - self._first
            return self._add(Open(batch.requests[i], number, self._slots[i], batch.emit, self._on_cancels[i]))
        if 0 < number <= self._last:
            return None
        raise ProtocolError(f"a response to request {number}")

    def _tell_taken(self, open_: Open) -> None:
        request = open_.request
        if request.stalled and not request.cancelled:
            request.on_room = self._on_room
            return
        taken, open_.taken = open_.taken, 0
        self._link.send(Kind.TAKEN, (open_.number, taken))

    def _room(self, request: InferenceRequest) -> None:
        """Its client reads again."""
        open_ = self._of.get(request)
        if open_ is not None and open_.taken:
            self._tell_taken(open_)

    def _add(self, open_: Open) -> Open:
        self._open[open_.number] = open_
        self._of[open_.request] = open_
        return open_

    def _remove(self, open_: Open) -> None:
        del self._open[open_.number]
        del self._of[open_.request]
        if open_.request.on_cancel is not None:
            open_.request.on_cancel = open_.on_cancel
        if open_.slot >= 0:
            self._free.append(open_.slot)
