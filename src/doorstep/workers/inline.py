"""Runs an instance on the event loop: for a model whose batch costs less than handing it to a thread would.

Knows no queue. A model that turns out slow holds up every connection, so the worker watches the time and says so."""

from __future__ import annotations

from collections.abc import Callable
from time import thread_time_ns

from doorstep.backends.base import ModelInstance
from doorstep.request import Batch
from doorstep.workers.base import Done
from doorstep.workers.execute import execute, is_ready

SLOW_NS = 1_000_000  # the loop's owner rule: nothing on it takes over a millisecond
SLOW_BATCHES = 3  # in a row; one may be the machine's hiccup


class InlineWorker:
    """Touched only from the event loop."""

    execution = "inline"

    def __init__(
        self, name: str, instance: ModelInstance, on_slow: Callable[[InlineWorker], None] | None = None
    ) -> None:
        self.name = name
        self.instance = instance
        self._on_slow = on_slow
        self._slow_count = 0

    def submit(self, batch: Batch, done: Done) -> None:
        # Time that passed may be the machine's fault, so after one slow batch it is the thread's own time that counts;
        # asking for that always would cost more than the rest of this function.
        cpu_ns = thread_time_ns() if self._slow_count else 0
        execute(self.instance, batch, self.name)
        if batch.compute_end_ns - batch.compute_start_ns <= SLOW_NS:
            self._slow_count = 0
        elif not self._slow_count or thread_time_ns() - cpu_ns > SLOW_NS:
            self._slow_count += 1
        done(batch)
        if self._slow_count >= SLOW_BATCHES and self._on_slow is not None:
            on_slow, self._on_slow = self._on_slow, None
            on_slow(self)

    def ready(self, done: Callable[[bool], None]) -> None:
        done(is_ready(self.instance, self.name))

    def close(self) -> None:
        self.instance.unload()
