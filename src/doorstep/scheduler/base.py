"""What every scheduler offers. Knows no protocol and no library."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from doorstep.request import InferenceRequest
from doorstep.workers.base import Worker


class Scheduler(Protocol):
    """Touched only from the event loop."""

    @property
    def inflight_count(self) -> int:
        """Requests taken and not yet answered, queued ones included."""

    @property
    def queued_count(self) -> int:
        """Requests taken and not yet started."""

    @property
    def busy_workers(self) -> int:
        """Workers that run a batch now."""

    @property
    def queue_limit(self) -> int:
        """How many requests may be queued; 0: any number."""

    def enqueue(self, request: InferenceRequest) -> None:
        """Takes the request. On return it belongs to the scheduler, which answers it through its sender; if this
        raises (QueueRejected), it is still yours."""

    def stop(self) -> None:
        """Refuses new requests; those taken are still answered."""

    async def drained(self) -> None:
        """Returns when every request taken has been answered."""

    def replace_worker(self, old: Worker, new: Worker) -> None:
        """Puts `new` where `old` was. Only while `old` is idle."""

    def close(self) -> None:
        """Lets go of timers. On the loop, after the last answer."""


@runtime_checkable
class Resizable(Protocol):
    """A scheduler whose workers may come and go while it runs. Without it, another number of instances is a reload."""

    def add_worker(self, worker: Worker) -> None:
        """One more, ready to run."""

    async def remove_worker(self, worker: Worker) -> None:
        """Gives it nothing more to do; returns when all it has been given is answered, and it may be closed."""


@runtime_checkable
class Sequential(Protocol):
    """A scheduler whose requests belong to sequences. A server that stops lets those go on that have begun."""

    @property
    def sequence_count(self) -> int:
        """Sequences that have begun and not ended."""

    async def ended(self) -> None:
        """Returns when every sequence has ended, and every request has been answered."""
