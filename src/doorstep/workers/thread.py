"""Runs an instance in a thread of its own, so that the event loop goes on while the library computes. Knows no queue.

The thread owns the instance and its current batch; the loop is woken once per batch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue

from doorstep.backends.base import ModelInstance
from doorstep.config.host_policy import ANYWHERE, HostPolicy
from doorstep.errors import DoorstepError
from doorstep.request import Batch
from doorstep.workers.base import Done
from doorstep.workers.emitter import Emitter
from doorstep.workers.execute import execute, is_ready
from doorstep.workers.host_policy import pin

READY_SECONDS = 5.0  # Triton's


class ThreadWorker:
    execution = "thread"

    def __init__(
        self,
        name: str,
        instance: ModelInstance,
        loop: asyncio.AbstractEventLoop,
        host_policy: HostPolicy = ANYWHERE,
    ) -> None:
        self.name = name
        self._host_policy = host_policy
        self.instance = instance
        self._loop = loop
        self._work: SimpleQueue[tuple[Batch, Done] | None] = SimpleQueue()
        self._asked: list[Callable[[bool], None]] = []  # wait for the answer of is_ready
        self._checking = False
        self._overdue: asyncio.TimerHandle | None = None
        # A daemon, so that a library that never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"doorstep-{name}", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch, done: Done) -> None:
        batch.emit = Emitter(self._loop, batch.emit)
        self._work.put((batch, done))

    def ready(self, done: Callable[[bool], None]) -> None:
        if not self.instance.may_be_unready():
            done(True)
            return
        self._asked.append(done)
        if len(self._asked) == 1:
            self._overdue = self._loop.call_later(READY_SECONDS, self._said_ready, False)
        if not self._checking:
            self._checking = True
            threading.Thread(target=self._check, name=f"doorstep-ready-{self.name}", daemon=True).start()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
        self.instance.unload()

    def _check(self) -> None:
        """In a thread of its own: the answer may take long, and the instance's own thread may be busy."""
        ready = is_ready(self.instance, self.name)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._checked, ready)

    def _checked(self, ready: bool) -> None:
        self._checking = False
        self._said_ready(ready)

    def _said_ready(self, ready: bool) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
        asked, self._asked = self._asked, []
        for done in asked:
            done(ready)

    def _run(self) -> None:
        if self._host_policy:
            with contextlib.suppress(DoorstepError):  # it was possible when the instance was loaded
                pin(self._host_policy)
        while (item := self._work.get()) is not None:
            batch, done = item
            execute(self.instance, batch, self.name)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self._loop.call_soon_threadsafe(done, batch)
            del item, batch, done  # a waiting thread must not keep the last batch's tensors alive
