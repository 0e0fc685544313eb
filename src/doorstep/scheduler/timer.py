"""One alarm with microseconds, for queue delays the event loop's millisecond timers are too coarse for. Knows no queue.

On Linux a timerfd that the loop watches; elsewhere the loop's own timer, rounded up to its resolution.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK = 0o4000
_TFD_CLOEXEC = 0o2000000
_TFD_TIMER_ABSTIME = 1


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


def _load_libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None, use_errno=True)
    except OSError:
        return None
    return libc if hasattr(libc, "timerfd_create") else None


_libc = _load_libc()


class Alarm:
    """Calls `ring` once, at or just after the earliest time it was set for. Touched only from the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._at_ns = 0  # 0: not set
        self._fd = -1
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at_ns: int) -> None:
        """Rings at `at_ns` (time.monotonic_ns) unless it is set for an earlier time already."""
        if self._at_ns and self._at_ns <= at_ns:
            return
        self._at_ns = at_ns
        if _libc is None:
            self._set_coarse(at_ns)
            return
        if self._fd < 0:
            self._fd = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
            if self._fd < 0:  # out of file descriptors: late is better than never
                self._set_coarse(at_ns)
                return
            self._loop.add_reader(self._fd, self._on_readable)
        # An absolute time in the past rings at once.
        spec = _Itimerspec(0, 0, at_ns // 1_000_000_000, at_ns % 1_000_000_000)
        _libc.timerfd_settime(self._fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _set_coarse(self, at_ns: int) -> None:
        if self._handle is not None:
            self._handle.cancel()
        delay_s = max(at_ns - time.monotonic_ns(), 0) / 1e9
        self._handle = self._loop.call_later(delay_s + 0.0005, self._on_time)

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._on_time()

    def _on_time(self) -> None:
        self._handle = None
        self._at_ns = 0
        self._ring()
