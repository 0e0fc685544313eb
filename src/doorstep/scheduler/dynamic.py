"""Queues a model's requests and hands them to its workers in batches. Knows no protocol, no library and no tensor.

`plan` decides, and the runner runs; this file keeps the queue and one timer. The queue is a deque, or a PriorityQueue
where the config asks for priorities or timeouts. All of it is touched only from the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from doorstep.errors import QueueRejected
from doorstep.request import InferenceRequest, cancelled_error
from doorstep.scheduler.plan import BatchPolicy, Dispatch, WaitUntil, plan
from doorstep.scheduler.queue import TIMEOUT_EXPIRED, Priorities, PriorityQueue, QueuePolicy, queue_full
from doorstep.scheduler.rate_limiter import RateLimiter
from doorstep.scheduler.runner import Runner
from doorstep.scheduler.timer import Alarm
from doorstep.stats import ModelStatistics
from doorstep.workers.base import Worker

STOPPING = "Server is stopping, scheduler for model has stopped accepting new inference requests"  # Triton's


_WAITS = "waits"  # the `slot` of a request while it is in the queue
NO_LIMITS = QueuePolicy()
NO_PRIORITIES = Priorities()


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
        priorities: Priorities = NO_PRIORITIES,
        preserve_ordering: bool = False,
        key_of: Callable[[InferenceRequest], object] | None = None,
        limiter: RateLimiter | None = None,
        hold_until: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`hold_until`: nothing runs, and no timeout expires, before so many requests wait; for tests of clients."""
        self.policy = policy
        self._loop = loop
        self._queue_policy = queue_policy
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
            limiter=limiter,
            clock=clock,
        )
        self._idle = self._runner.idle
        self._queue: deque[InferenceRequest] = deque()  # may hold cancelled requests until the next look
        self._dead_in_queue = 0  # cancelled, already answered, not yet taken out
        plain = not priorities.levels and not queue_policy.has_timeouts
        self._levels = None if plain else PriorityQueue(queue_policy, priorities)  # in place of `_queue`
        self._hold_until = hold_until
        self._is_limited = limiter is not None
        # Nothing that `plan` could decide makes a lonely request wait.
        self._runs_at_once = plain and limiter is None and not hold_until and not policy.max_delay_ns
        self._pump_soon = False
        self._pumping = False
        self._alarm = Alarm(loop, self._on_alarm)  # at the earliest time anything has to be looked at
        self._stopping = False
        self._on_cancel = self._cancel

    # What others see

    @property
    def queued_count(self) -> int:
        return len(self._queue) - self._dead_in_queue if self._levels is None else len(self._levels)

    @property
    def inflight_count(self) -> int:
        return self.queued_count + self._runner.running_count

    @property
    def busy_workers(self) -> int:
        return self._runner.busy_workers

    @property
    def queue_limit(self) -> int:
        return self._queue_policy.max_size if self._levels is None else self._levels.limit

    def enqueue(self, request: InferenceRequest) -> None:
        if self._stopping:
            raise QueueRejected(STOPPING)
        if self._key_of is not None:
            request.batch_key = self._key_of(request)
        request.queued_ns = self._clock()
        if self._levels is None:
            limit = self._queue_policy.max_size
            if limit and self.queued_count >= limit:
                raise queue_full(request)
            request.slot = _WAITS
            self._queue.append(request)
        else:
            expires_ns = self._levels.append(request)
            if expires_ns:
                self._alarm.set(expires_ns)
        request.on_cancel = self._on_cancel
        # Whatever else arrives in this turn of the loop can share the batch.
        if self._idle and not self._pump_soon:
            if request.at_once and self._runs_at_once and len(self._queue) == 1:
                self._queue.clear()
                request.slot = None
                self._runner.run(self._idle.pop(), [request], request.rows)
            elif request.at_once:
                self._pump()
            else:
                self._pump_soon = True
                self._loop.call_soon(self._pump)

    def stop(self) -> None:
        self._stopping = True
        if self._hold_until:
            self._hold_until = 0
            self._on_alarm()

    async def drained(self) -> None:
        """Returns when nothing is queued and nothing runs."""
        await self._runner.drained(lambda: not self.inflight_count)

    def close(self) -> None:
        """After the last answer."""
        self._alarm.close()

    def replace_worker(self, old: Worker, new: Worker) -> None:
        """Puts `new` where `old` was. Only while `old` is idle."""
        self._runner.replace_worker(old, new)

    def add_worker(self, worker: Worker) -> None:
        """One more, ready to run."""
        self._runner.add_worker(worker)

    async def remove_worker(self, worker: Worker) -> None:
        """Gives it nothing more to do; returns when it may be closed."""
        await self._runner.remove_worker(worker)

    # Decide, then act

    def _on_idle(self, worker: Worker) -> None:
        if not self._pumping and (self._queue or self._levels or self._is_limited):
            self._pump()

    def _pump(self) -> None:
        self._pump_soon = False
        if self._pumping:
            return
        if self._hold_until:
            if self.queued_count < self._hold_until:
                return
            self._hold_until = 0
        self._pumping = True
        try:
            while self._idle and (self._queue or self._levels):
                if self._dead_in_queue:
                    self._bury()
                now = self._clock()
                match plan(self._queue if self._levels is None else self._levels.walk(now), now, self.policy):
                    case Dispatch(count):
                        if self._is_limited and not self._runner.claim():
                            break
                        self._dispatch(count)
                    case WaitUntil(ns):
                        self._alarm.set(ns)
                        break
                    case None:
                        break
        finally:
            self._pumping = False
        if self._is_limited:
            self._runner.disclaim()
        if self._levels is not None and self._levels.rejected:
            self._refuse_expired(self._levels)

    def _dispatch(self, count: int) -> None:
        if self._levels is not None:
            requests = [self._levels.popleft() for _ in range(count)]
        elif count == len(self._queue):
            requests = list(self._queue)
            self._queue.clear()
        else:
            requests = [self._queue.popleft() for _ in range(count)]
        rows = 0
        is_timed = False
        for request in requests:
            rows += request.rows
            request.slot = None
            if request.deadline_ns:
                is_timed = True
        if is_timed:
            requests = self._in_time(requests)
            rows = sum(request.rows for request in requests)
            if not requests:
                return
        self._runner.run(self._idle.pop(), requests, rows)

    def _in_time(self, requests: list[InferenceRequest]) -> list[InferenceRequest]:
        """Without those whose clients wait no more: the sweep of deadlines, which comes every so often, is late."""
        now = self._clock()
        for request in requests:
            if 0 < request.deadline_ns <= now:
                self._runner.end_early(request, cancelled_error())
        return [request for request in requests if not request.cancelled]

    def _put_back(self, request: InferenceRequest) -> None:
        """Its model wants to see it again."""
        request.queued_ns = self._clock()
        request.on_cancel = self._on_cancel
        if self._levels is None:
            request.slot = _WAITS
            self._queue.append(request)
        else:
            self._levels.put_back(request)
        if not self._pump_soon:
            self._pump_soon = True
            self._loop.call_soon(self._pump)

    # Ends other than an answer from the model

    def _cancel(self, request: InferenceRequest) -> None:
        """Answers at once. In the queue it is skipped; in a batch its result is thrown away."""
        if self._levels is not None:
            self._levels.remove(request)
        elif request.slot is not None:
            request.slot = None
            self._dead_in_queue += 1
        self._runner.end_early(request, cancelled_error())

    def _bury(self) -> None:
        self._queue = deque(r for r in self._queue if not r.cancelled)
        self._dead_in_queue = 0

    # Time

    def _on_alarm(self) -> None:
        if self._hold_until:
            return
        if self._levels is not None:
            next_ns = self._levels.expire(self._clock())
            if next_ns:
                self._alarm.set(next_ns)
            self._refuse_expired(self._levels)
        self._pump()

    def _refuse_expired(self, levels: PriorityQueue) -> None:
        requests, levels.rejected = levels.rejected, []
        for request in requests:
            self._runner.end_early(request, QueueRejected(TIMEOUT_EXPIRED))
