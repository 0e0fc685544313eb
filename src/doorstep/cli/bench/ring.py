"""Latencies on their way from a load process to the one that counts and shows them: a ring in shared memory.

Writing costs a load process two stores per request and never waits. Knows nothing of what is measured.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

CAPACITY = 1 << 21  # latencies; the reader comes by ten times a second
_SLOTS = 16


class Slot(IntEnum):
    """Numbers beside the latencies, each written by one side only."""

    START_NS = 0  # by the reader: when to begin, monotonic; 0: not yet
    CONNECTED = 1  # 1: ready to begin
    MEASURING = 2  # 1: warm-up is over
    COUNT = 3  # latencies written since then
    ERRORS = 4
    LATE = 5  # requests that are due and wait for a free connection
    DONE = 6


class Ring:
    """One load process writes, one other process reads."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), (_SLOTS + CAPACITY) * 8)
        words = memoryview(self._memory).cast("q")
        self.slots = words[:_SLOTS]
        self.latencies = words[_SLOTS:]  # nanoseconds; number n is at n % CAPACITY

    def since(self, position: int) -> tuple[Sequence[memoryview], int]:
        """What was written after `position`, in pieces, and the new position. What was overwritten is left out."""
        count = self.slots[Slot.COUNT]
        if count < position:  # the writer has begun again, after its warm-up
            position = 0
        position = max(position, count - CAPACITY)
        first, last = position % CAPACITY, count % CAPACITY
        if position == count:
            return (), count
        if first < last:
            return (self.latencies[first:last],), count
        return (self.latencies[first:], self.latencies[:last]), count


def create_ring_file() -> str:
    """An empty ring's file, in memory where the system has such a place."""
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108  private: made by mkstemp
    handle, path = tempfile.mkstemp(prefix="doorstep-bench-", dir=folder)
    os.ftruncate(handle, (_SLOTS + CAPACITY) * 8)
    os.close(handle)
    return path


def remove_ring_file(path: str) -> None:
    Path(path).unlink(missing_ok=True)
