"""Runs an instance in a thread of its own, so that the event loop goes on while the library computes. Knows no queue.

The thread owns the instance and its current batch; the loop is woken once per batch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from queue import SimpleQueue
from typing import Any

from doorstep.backends.base import ModelInstance
from doorstep.config.host_policy import ANYWHERE, HostPolicy
from doorstep.errors import DoorstepError
from doorstep.request import Batch, Emit
from doorstep.workers.base import Done
from doorstep.workers.execute import execute
from doorstep.workers.host_policy import pin


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
        # A daemon, so that a library that never returns cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"doorstep-{name}", daemon=True)
        self._thread.start()

    def submit(self, batch: Batch, done: Done) -> None:
        batch.emit = on_the_loop(self._loop, batch.emit)
        self._work.put((batch, done))

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()
        self.instance.unload()

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


def on_the_loop(loop: asyncio.AbstractEventLoop, emit: Emit) -> Emit:
    """`emit` for any thread: what several responses say in one turn of the loop wakes it once."""
    waiting: deque[Any] = deque()
    told = False  # two threads may tell the loop at once: the second time it finds nothing

    def deliver() -> None:
        nonlocal told
        told = False
        while waiting:
            emit(*waiting.popleft())

    def emit_from_any_thread(*response: Any) -> None:
        nonlocal told
        waiting.append(response)
        if not told:
            told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                loop.call_soon_threadsafe(deliver)

    return emit_from_any_thread
