"""The responses to a model's call of another model, between whoever brings them and the thread that waits for them.

Knows no socket, process or loop."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from doorstep.errors import DoorstepError
from doorstep.types import Tensor

Answer = tuple[Sequence[Tensor] | DoorstepError | None, bool]


class Responses:
    """A `CallResponses`: see backends/base.py."""

    def __init__(self, on_read: Callable[[int], None], on_cancel: Callable[[bool], None]) -> None:
        """`on_read(cost)` hears what has been taken out, `on_cancel` that nobody wants the rest:
        True if it is not to come."""
        self._on_read = on_read
        self._on_cancel = on_cancel
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Answer, int]] = deque()
        self._ready: Callable[[], None] | None = None
        self._ended = False  # the final one has been put
        self._cancelled = False

    def put(self, outputs: Sequence[Tensor] | DoorstepError | None, final: bool, cost: int = 0) -> None:
        with self._changed:
            if self._ended:
                return
            self._ended = final
            self._waiting.append(((outputs, final), cost))
            ready, self._ready = self._ready, None
            self._changed.notify()
        if ready is not None:
            with suppress(Exception):  # the asyncio loop that waited is closed: not the bringer's trouble
                ready()

    def get(self, timeout: float | None = None) -> Answer:
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting, timeout):
                raise TimeoutError(f"no response within {timeout} s")
            answer, cost = self._waiting.popleft()
        if not answer[1]:
            self._on_read(cost)
        return answer

    def notify(self, ready: Callable[[], None]) -> None:
        with self._changed:
            if not self._waiting:
                self._ready = ready
                return
        ready()

    def cancel(self) -> None:
        with self._changed:
            if self._cancelled or self._ended:
                return
            self._cancelled = True
        self._on_cancel(True)

    def stop(self) -> None:
        with self._changed:
            if self._cancelled or self._ended:
                return
        self._on_cancel(False)
