"""Memory that the server and one worker process both see. Knows no tensor, frame or process.

The server makes every segment: unnamed (memfd, so nobody else can open it), and sealed against shrinking, so that no
misbehaving process can make the server's reads fault. A segment is written by one side and read by the other; it is
free again when the reader's last view of it is gone, which a weak reference tells. So an output leaves for the network
straight from here, and a model may keep an input as long as it likes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from doorstep.types import Array
from doorstep.workers.frames import ProtocolError

SMALLEST_BYTES = 64 * 1024
UNUSED_SECONDS = 10.0  # after which a segment's memory goes back to the system
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def make_memory(size: int, name: str) -> int:
    """A descriptor of `size` bytes of zeros that can neither shrink nor grow. They cost memory only once written."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def segment_size(needed: int) -> int:
    """Powers of two up to 16 MiB, then multiples of it: a larger tensor now and then does not mean a new segment."""
    if needed <= SMALLEST_BYTES:
        return SMALLEST_BYTES
    step = 16 * 1024 * 1024
    return 1 << (needed - 1).bit_length() if needed <= step else -(-needed // step) * step


class Segment:
    """One piece of shared memory, mapped."""

    __slots__ = ("id", "map", "size", "used_at")

    def __init__(self, id: int, fd: int, size: int, *, writable: bool = True) -> None:
        """Takes `fd` and closes it: the mapping keeps the memory."""
        self.id = id
        self.size = size
        self.used_at = 0.0  # time.monotonic()
        try:
            self.map = mmap.mmap(fd, size, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))
        finally:
            os.close(fd)

    def __repr__(self) -> str:
        return f"<Segment {self.id} of {self.size} bytes>"


class Writer:
    """The segments this side writes. Touched by one thread, but for `release`, which a garbage collector may call."""

    def __init__(self) -> None:
        self._all: dict[int, Segment] = {}
        self._free: list[int] = []

    def add(self, segment: Segment) -> None:
        self._all[segment.id] = segment
        self._free.append(segment.id)

    def take(self, size: int) -> Segment | None:
        """The smallest free segment of at least `size` bytes, now in use; None if one has to be made first."""
        best: Segment | None = None
        for id in self._free:
            segment = self._all[id]
            if segment.size >= size and (best is None or segment.size < best.size):
                best = segment
        if best is not None:
            self._free.remove(best.id)
            best.used_at = time.monotonic()
        return best

    def release(self, ids: Iterable[int]) -> None:
        for id in ids:
            if id in self._all and id not in self._free:
                self._free.append(id)

    def unused(self, before: float) -> list[int]:
        """Free segments not used since `before`, forgotten by this call."""
        ids = [id for id in self._free if self._all[id].used_at < before]
        self.forget(ids)
        return ids

    def forget(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._all.pop(id, None)
            if id in self._free:
                self._free.remove(id)

    def __len__(self) -> int:
        return len(self._all)


class Reader:
    """The segments this side reads."""

    def __init__(self) -> None:
        self._all: dict[int, Segment] = {}
        self._views: dict[int, Any] = {}  # id → weak reference to the array that all views are made from
        self._released: list[int] = []  # appended to by the garbage collector, in whatever thread

    def add(self, segment: Segment) -> None:
        self._all[segment.id] = segment

    def open(self, id: int) -> Array:
        """The bytes of a segment. When this array and every array made from it are gone, the segment is released.

        Raises KeyError for a segment that is not there, or is still open."""
        segment = self._all[id]
        if id in self._views:
            raise KeyError(id)
        segment.used_at = time.monotonic()
        array: Array = np.frombuffer(segment.map, np.uint8)
        self._views[id] = weakref.ref(array, self._closer(id))
        return array

    def size(self, id: int) -> int:
        """Of a segment; 0 if it is not there."""
        segment = self._all.get(id)
        return segment.size if segment is not None else 0

    def released(self) -> list[int]:
        """The segments released since the last call: to be told to the writer."""
        if not self._released:
            return []
        count = len(self._released)
        ids, self._released[:count] = self._released[:count], []
        return ids

    def put_back(self, ids: Iterable[int]) -> None:
        """What `released` said could not be told; it will say so again."""
        self._released.extend(ids)

    def unused(self, before: float) -> list[int]:
        """Segments nobody looks at and that were not used since `before`, forgotten by this call."""
        ids = [id for id, s in self._all.items() if id not in self._views and s.used_at < before]
        self.forget(ids)
        return ids

    def forget(self, ids: Iterable[int]) -> None:
        """A view that is still there keeps its memory; only the name goes."""
        for id in ids:
            self._all.pop(id, None)
            if id in self._released:
                self._released.remove(id)

    def _closer(self, id: int) -> Callable[[Any], None]:
        views, released = self._views, self._released

        def close(_: Any) -> None:
            views.pop(id, None)
            released.append(id)

        return close

    def __len__(self) -> int:
        return len(self._all)


def memory_of(reader: Reader, segment: int, data: bytearray) -> Any:
    """Where the tensors of a frame are: in its own data, or in a segment. Raises ProtocolError."""
    if segment < 0:
        return data
    try:
        return reader.open(segment)
    except KeyError:
        raise ProtocolError(f"tensors in segment {segment}, which is not there") from None
