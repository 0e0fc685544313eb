"""Queues a model's requests and hands them to its workers in batches. Knows no protocol, no library and no tensor.

`plan` decides, and the runner runs; this file keeps the queue and one timer. All of it is touched only from the event
loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from doorstep.errors import DoorstepError, FailureReason, QueueRejected
from doorstep.request import InferenceRequest, cancelled_error
from doorstep.scheduler.plan import BatchPolicy, Dispatch, WaitUntil, plan
from doorstep.scheduler.runner import Runner
from doorstep.scheduler.timer import Alarm
from doorstep.stats import ModelStatistics
from doorstep.workers.base import Worker

STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"  # Triton's


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How long, and how many, requests may wait (ModelQueuePolicy in config.pbtxt)."""

    max_size: int = 0  # 0: no bound of its own
    default_timeout_ns: int = 0  # 0: none
    allow_override: bool = False  # a request's own `timeout`, if shorter, counts


NO_LIMITS = QueuePolicy()


class DynamicBatchScheduler:
    """See the module. `key_of` tells which requests can be stacked; None where all of a model's can."""

    def __init__(
        self,
        name: str,
        version: str,
        workers: list[Worker],
        stats: ModelStatistics,
        policy: BatchPolicy,
        *,
        loop: asyncio.AbstractEventLoop,
        queue_policy: QueuePolicy = NO_LIMITS,
        preserve_ordering: bool = False,
        key_of: Callable[[InferenceRequest], object] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.policy = policy
        self._stats = stats
        self._loop = loop
        self._queue_policy = queue_policy
        self._has_timeouts = bool(queue_policy.default_timeout_ns or queue_policy.allow_override)
        self._key_of = key_of
        self._clock = clock
        self._runner = Runner(
            name,
            version,
            workers,
            stats,
            loop,
            on_idle=self._on_idle,
            on_reschedule=self._put_back,
            preserve_ordering=preserve_ordering,
            clock=clock,
        )
        self._idle = self._runner.idle
        self._queue: deque[InferenceRequest] = deque()  # may hold cancelled requests until the next look
        self._dead_in_queue = 0  # cancelled or expired, already answered, not yet taken out
        self._pump_soon = False
        self._pumping = False
        self._alarm = Alarm(loop, self._on_alarm)  # at the earliest time anything has to be looked at
        self._stopping = False
        self._on_cancel = self._cancel

    # What others see

    @property
    def queued_count(self) -> int:
        return len(self._queue) - self._dead_in_queue

    @property
    def inflight_count(self) -> int:
        return self.queued_count + self._runner.running_count

    @property
    def busy_workers(self) -> int:
        return self._runner.busy_workers

    @property
    def queue_limit(self) -> int:
        return self._queue_policy.max_size

    def enqueue(self, request: InferenceRequest) -> None:
        if self._stopping:
            raise QueueRejected(STOPPING)
        limit = self._queue_policy.max_size
        if limit and self.queued_count >= limit:
            raise QueueRejected("Exceeds maximum queue size")
        if self._key_of is not None:
            request.batch_key = self._key_of(request)
        request.queued_ns = self._clock()
        request.on_cancel = self._on_cancel
        if self._has_timeouts:
            self._set_deadline(request)
        self._queue.append(request)
        # Whatever else arrives in this turn of the loop can share the batch.
        if not self._pump_soon and self._idle:
            self._pump_soon = True
            self._loop.call_soon(self._pump)

    def stop(self) -> None:
        self._stopping = True

    async def drained(self) -> None:
        """Returns when nothing is queued and nothing runs."""
        await self._runner.drained(lambda: not self.inflight_count)

    def close(self) -> None:
        """After the last answer."""
        self._alarm.close()

    def replace_worker(self, old: Worker, new: Worker) -> None:
        """Puts `new` where `old` was. Only while `old` is idle."""
        self._idle[self._idle.index(old)] = new

    # Decide, then act

    def _on_idle(self, worker: Worker) -> None:
        if self._queue and not self._pumping:
            self._pump()

    def _pump(self) -> None:
        self._pump_soon = False
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._idle and self._queue:
                if self._dead_in_queue:
                    self._bury()
                match plan(self._queue, self._clock(), self.policy):
                    case Dispatch(count):
                        self._dispatch(count)
                    case WaitUntil(ns):
                        self._alarm.set(ns)
                        break
                    case None:
                        break
        finally:
            self._pumping = False

    def _dispatch(self, count: int) -> None:
        queue = self._queue
        if count == len(queue):
            requests = list(queue)
            queue.clear()
        else:
            requests = [queue.popleft() for _ in range(count)]
        rows = 0
        for request in requests:
            rows += request.rows
        self._runner.run(self._idle.pop(), requests, rows)

    def _put_back(self, request: InferenceRequest) -> None:
        """Its model wants to see it again."""
        request.queued_ns = self._clock()
        request.on_cancel = self._on_cancel
        self._queue.append(request)
        if not self._pump_soon:
            self._pump_soon = True
            self._loop.call_soon(self._pump)

    # Ends other than an answer from the model

    def _cancel(self, request: InferenceRequest) -> None:
        """Answers at once. In the queue it is skipped; in a batch its result is thrown away."""
        self._end_early(request, cancelled_error())

    def _end_early(self, request: InferenceRequest, error: DoorstepError) -> None:
        if request in self._queue:
            self._dead_in_queue += 1
        self._runner.end_early(request, error)

    def _bury(self) -> None:
        self._queue = deque(r for r in self._queue if not r.cancelled)
        self._dead_in_queue = 0

    # Time

    def _set_deadline(self, request: InferenceRequest) -> None:
        policy = self._queue_policy
        timeout_ns = policy.default_timeout_ns
        if policy.allow_override and request.timeout_us:
            asked_ns = request.timeout_us * 1000
            timeout_ns = min(asked_ns, timeout_ns) if timeout_ns else asked_ns
        if timeout_ns:
            request.deadline_ns = request.queued_ns + timeout_ns
            self._alarm.set(request.deadline_ns)

    def _on_alarm(self) -> None:
        now = self._clock()
        if self._has_timeouts:
            next_ns = 0
            for request in list(self._queue):
                if request.cancelled or not request.deadline_ns:
                    continue
                if request.deadline_ns <= now:
                    self._end_early(request, QueueRejected("Request timeout expired", reason=FailureReason.REJECTED))
                elif not next_ns or request.deadline_ns < next_ns:
                    next_ns = request.deadline_ns
            if self._dead_in_queue:
                self._bury()
            if next_ns:
                self._alarm.set(next_ns)
        self._pump()
