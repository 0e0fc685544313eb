"""A worker: the place where one model instance runs. Knows no queue and no sender."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from doorstep.request import Batch

Done = Callable[[Batch], None]


class Worker(Protocol):
    """All methods are called on the event loop thread, and `done` comes back on it."""

    name: str

    def submit(self, batch: Batch, done: Done) -> None:
        """Takes the batch; calls `done(batch)` exactly once, with a result for every request. Never raises.

        May call `done` before it returns (inline). One batch at a time."""

    def ready(self, done: Callable[[bool], None]) -> None:
        """Calls `done` once, maybe before it returns: whether the instance can serve now."""

    def close(self) -> None:
        """Lets go of the instance and all it holds. Called off the loop, after the last batch is done; may block."""
