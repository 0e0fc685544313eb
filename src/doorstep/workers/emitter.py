"""`Batch.emit` for threads of the server's own process: responses get to the event loop, and not faster than it takes
them. Knows no instance and no scheduler."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Sequence

from doorstep.errors import DoorstepError
from doorstep.request import Emit, InferenceRequest
from doorstep.types import Tensor

MOST_WAITING = 1000  # responses the loop has not seen; then whoever makes them waits
LOOK_AGAIN_SECONDS = 0.5  # whether the loop is still there

_Said = tuple[InferenceRequest, Sequence[Tensor] | DoorstepError | None, bool]


class Emitter:
    """One batch's. What several responses say in one turn of the loop wakes it once."""

    __slots__ = ("_changed", "_emit", "_loop", "_told", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop, emit: Emit) -> None:
        self._loop = loop
        self._emit = emit
        self._waiting: deque[_Said] = deque()
        self._told = False  # two threads may tell the loop at once: the second time it finds nothing
        self._changed: threading.Condition | None = None  # made by the first thread that has to wait

    def __call__(
        self, request: InferenceRequest, outputs: Sequence[Tensor] | DoorstepError | None, final: bool
    ) -> None:
        if (request.stalled or len(self._waiting) >= MOST_WAITING) and not final:
            self._wait(request)
        self._waiting.append((request, outputs, final))
        if not self._told:
            self._told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """On the loop."""
        self._told = False
        waiting = self._waiting
        while waiting:
            request, outputs, final = waiting.popleft()
            self._emit(request, outputs, final)
            if request.stalled and request.on_room is None:
                request.on_room = self._room
        self._wake()

    def _room(self, request: InferenceRequest) -> None:
        request.on_room = None
        self._wake()

    def _wake(self) -> None:
        changed = self._changed
        if changed is not None:
            with changed:
                changed.notify_all()

    def _wait(self, request: InferenceRequest) -> None:
        with contextlib.suppress(RuntimeError):
            if asyncio.get_running_loop() is self._loop:
                return  # the loop would wait for itself
        changed = self._changed
        if changed is None:
            changed = self._changed = threading.Condition()
        with changed:
            while (request.stalled or len(self._waiting) >= MOST_WAITING) and not request.cancelled:
                if self._loop.is_closed():
                    return
                changed.wait(LOOK_AGAIN_SECONDS)
