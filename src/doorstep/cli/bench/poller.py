"""Waiting for sockets, to the microsecond: epoll where there is one, poll elsewhere. Knows no protocol."""

from __future__ import annotations

import ctypes
import select
import sys
from typing import Any

_PR_SET_TIMERSLACK = 29  # linux/prctl.h


class Poller:
    """`poll(seconds)` gives (fd, events). An open loop is only as good as its alarm clock, and epoll's ticks in ms."""

    def __init__(self) -> None:
        self._epoll: Any = select.epoll() if hasattr(select, "epoll") else None
        self._poll: Any = self._epoll or select.poll()
        self.register = self._poll.register
        self.modify = self._poll.modify
        self.unregister = self._poll.unregister
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # this thread's sleeps end on time, not 50 µs late

    def wait(self, timeout_s: float) -> list[tuple[int, int]]:
        """Ends at the first event, or after `timeout_s`."""
        if timeout_s <= 0:
            return self._poll.poll(0)  # type: ignore[no-any-return]
        if self._epoll is None:
            return self._poll.poll(timeout_s * 1000)  # type: ignore[no-any-return]
        if timeout_s < 0.05:
            if not select.select((self._epoll,), (), (), timeout_s)[0]:
                return []
            return self._epoll.poll(0)  # type: ignore[no-any-return]
        return self._epoll.poll(timeout_s)  # type: ignore[no-any-return]

    def wait_idly(self, timeout_s: float) -> list[tuple[int, int]]:
        """As `wait`, for who has nothing to do before an event; `timeout_s` is only about right."""
        return self._poll.poll(timeout_s if self._epoll is not None else timeout_s * 1000)  # type: ignore[no-any-return]

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
