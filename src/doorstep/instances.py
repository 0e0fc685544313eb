"""The instances of one loaded model version: starts them, changes how many there are, closes them. Knows no queue.

All of it runs in the loader pool, or another thread that may block, one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from doorstep.scheduler.rate_limiter import RateLimiter, Ticket
from doorstep.workers.base import Worker
from doorstep.workers.instances import Instance, difference
from doorstep.workers.starter import InstanceStarter


@dataclass(frozen=True, slots=True)
class Change:
    """From the instances there are to those there should be: `added` are ready, `removed` may still be busy."""

    added: Sequence[Worker]
    removed: Sequence[Worker]
    execution: str


class ModelInstances:
    """See the module."""

    def __init__(
        self, starter: InstanceStarter, warm_up: Callable[[Worker], None], limiter: RateLimiter | None = None
    ) -> None:
        """`warm_up` runs the config's samples on a worker, or raises."""
        self._starter = starter
        self._warm_up = warm_up
        self._limiter = limiter
        self._running: dict[Worker, Instance] = {}
        self._tickets: dict[Worker, Ticket] = {}

    def start(self, groups: Sequence[Any]) -> tuple[list[Worker], str]:
        """The workers, ready and warm, and where they run. On an error nothing is left of them."""
        instances = self._starter.wanted(groups)
        workers, execution = self._starter.start(instances)
        self._take_in(instances, workers)
        return workers, execution

    def prepare(self, groups: Sequence[Any]) -> Change:
        """Starts what new groups ask for beside what runs. On an error everything is as it was. The caller puts the
        added workers to work, lets the removed ones finish, and has those closed."""
        wanted = self._starter.wanted(groups)
        leaving = {w for w in self._running if self._starter.must_leave(w, len(wanted))}
        lacking, surplus = difference((i for w, i in self._running.items() if w not in leaving), wanted)
        leaving |= {w for w, instance in self._running.items() if instance in surplus}
        removed = [worker for worker in self._running if worker in leaving]
        added = self._starter.start_more(lacking)
        self._take_in(lacking, added)
        return Change(added, removed, self._starter.execution)

    def close(self, workers: Iterable[Worker]) -> None:
        """After their last batch."""
        for worker in workers:
            self._running.pop(worker, None)
            worker.close()
            if self._limiter is not None and worker in self._tickets:
                self._limiter.unregister([self._tickets.pop(worker)])

    def replaced(self, old: Worker, new: Worker) -> None:
        """The same instance runs elsewhere."""
        self._running = {new if worker is old else worker: i for worker, i in self._running.items()}
        self._tickets = {new if worker is old else worker: t for worker, t in self._tickets.items()}

    def _take_in(self, instances: Sequence[Instance], workers: Sequence[Worker]) -> None:
        """Begins to keep what has just been started, once it is warm and the rate limiter knows it."""
        try:
            for instance, worker in zip(instances, workers, strict=True):
                self._running[worker] = instance
                if self._limiter is not None:
                    self._tickets[worker] = self._limiter.register(instance.context.device_id, instance.limits)
                    self._limiter.assign(self._tickets[worker], worker)
            for worker in workers:
                self._warm_up(worker)
        except BaseException:
            self.close(workers)
            raise
