"""All that goes on beside the batches of one worker process: responses one by one, calls of other models, readiness.

There from before the model is loaded until the process has ended. Knows no restart. `Side` is touched only from the
event loop.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from doorstep.backends.base import InstanceContext
from doorstep.services import NO_SERVICES, Services
from doorstep.workers.calls import Calls
from doorstep.workers.frames import Kind, ProtocolError
from doorstep.workers.loading import load_process
from doorstep.workers.side_link import SideLink
from doorstep.workers.spawn import Log, Process
from doorstep.workers.streams import Streams

READY_SECONDS = 5.0  # Triton's


class Side:
    def __init__(self, process: Process, model: str, services: Services, loop: asyncio.AbstractEventLoop) -> None:
        self._process = process
        self._loop = loop
        self.link = SideLink(process.take_side(), loop, on_frame=self._on_frame, on_bad=self._kill)
        self.streams = Streams(self.link, process.flags)
        self.calls = Calls(model, services, loop, self.streams.find)
        self.calls.link = self.link
        self._handlers = {
            **self.calls.handlers,
            Kind.EMIT: self.streams.on_emit,
            Kind.READINESS: self._on_readiness,
        }
        self._check = 0  # the number of the readiness check
        self._asked: list[Callable[[bool], None]] = []  # wait for its answer
        self._overdue: asyncio.TimerHandle | None = None

    def attach(self) -> None:
        self.link.attach()

    def end(self) -> None:
        """The process has ended; what it sent before still counts."""
        with suppress(ProtocolError):
            self.link.pause()
            self.link.drain()
        self.close()

    def close(self) -> None:
        self.link.close()
        self.calls.close()
        self._answer(ready=False)

    def quietly_close(self) -> None:
        """From any thread; the loop may be closed."""
        try:
            self._loop.call_soon_threadsafe(self.close)
        except RuntimeError:
            self.link.close()

    # Readiness

    def ready(self, done: Callable[[bool], None]) -> None:
        """Asks the model, once for all who ask meanwhile."""
        if self.link.closed:
            done(False)
            return
        self._asked.append(done)
        if len(self._asked) == 1:
            self._check += 1
            self._overdue = self._loop.call_later(READY_SECONDS, self._too_late)
            self.link.send(Kind.IS_READY, self._check)

    def _too_late(self) -> None:
        self._process.budget("WARNING", f"is_ready has not answered within {READY_SECONDS:g} s")
        self._answer(ready=False)

    def _on_readiness(self, meta: Any, _: bytearray) -> None:
        number, ready, why = meta
        if why:
            self._process.budget("ERROR", f"is_ready failed: {why}")
        if number == self._check:
            self._answer(ready=ready is True)

    def _answer(self, *, ready: bool) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None
        asked, self._asked = self._asked, []
        for done in asked:
            done(ready)

    # Frames

    def _on_frame(self, kind: int, meta: Any, data: bytearray) -> None:
        handler = self._handlers.get(kind)
        if handler is None:
            raise ProtocolError(f"a frame of kind {kind}")
        try:
            handler(meta, data)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ProtocolError(f"a frame that is none: {error!r}") from None

    def _kill(self, why: str) -> None:
        self._process.budget("ERROR", f"the process is killed: it sent {why}")
        self._process.signal(signal.SIGKILL)


Loaded = tuple[Process, Side, bool]  # and whether the model may say that it is not ready


def load(
    context: InstanceContext,
    backend: str,
    log: Log,
    loop: asyncio.AbstractEventLoop,
    services: Services,
    spare: Process | None = None,
) -> Loaded:
    """A process with the instance loaded. Blocking: for a loader's thread. Raises DoorstepError."""
    sides: list[Side] = []

    def begin(process: Process) -> None:
        side = Side(process, context.config.name, services, loop)
        sides.append(side)
        loop.call_soon_threadsafe(side.attach)  # the model may ask the server while it loads

    has_server = services.infer is not NO_SERVICES.infer
    try:
        process, asks = load_process(context, backend, log, spare, begin=begin, has_server=has_server)
    except BaseException:
        for side in sides:
            side.quietly_close()
        raise
    return process, sides[0], asks
