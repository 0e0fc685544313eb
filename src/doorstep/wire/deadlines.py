"""When many calls' time is up, with one timer for all of them. Knows nothing of calls but `expire`.

Deadlines are rounded up to slots of some 16 ms, so that to set and to forget one costs a set operation each.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from typing import Protocol

_SLOT_BITS = 24  # a slot is 2**24 ns


class Expiring(Protocol):
    def expire(self) -> None:
        """Called once, when its deadline has passed, on the event loop."""


class Deadlines:
    """Touched only from the event loop."""

    __slots__ = ("_armed", "_clock", "_heap", "_loop", "_slots", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._loop = loop
        self._clock = clock
        self._slots: dict[int, set[Expiring]] = {}
        self._heap: list[int] = []  # slots, some of which may be gone
        self._timer: asyncio.TimerHandle | None = None
        self._armed = 0  # the slot the timer is for

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def add(self, deadline_ns: int, item: Expiring) -> int:
        """Returns what `discard` wants."""
        slot = (deadline_ns >> _SLOT_BITS) + 1
        items = self._slots.get(slot)
        if items is None:
            self._slots[slot] = {item}
            heap = self._heap
            if len(heap) > 64 + 2 * len(self._slots):
                heap[:] = self._slots
                heapq.heapify(heap)
            else:
                heapq.heappush(heap, slot)
            if self._timer is None or slot < self._armed:
                self._arm(slot)
        else:
            items.add(item)
        return slot

    def discard(self, slot: int, item: Expiring) -> None:
        items = self._slots.get(slot)
        if items is not None:
            items.discard(item)
            if not items:
                del self._slots[slot]

    def run(self) -> None:
        """Expires what is due, and sets the timer for what is next."""
        self._timer = None
        due = self._clock() >> _SLOT_BITS
        heap, slots = self._heap, self._slots
        while heap and heap[0] <= due:
            for item in slots.pop(heapq.heappop(heap), ()):
                item.expire()
        while heap and heap[0] not in slots:
            heapq.heappop(heap)
        if heap:
            self._arm(heap[0])

    def _arm(self, slot: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed = slot
        self._timer = self._loop.call_later(max(0, (slot << _SLOT_BITS) - self._clock()) / 1e9 + 0.001, self.run)
