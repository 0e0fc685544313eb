"""Queues a model's requests and hands them to its workers in batches. Knows no protocol, no library and no tensor.

`plan` decides; this file acts: it keeps the queue, the idle workers and one timer, and answers requests when their
batch comes back. All of it is touched only from the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from doorstep.errors import DoorstepError, FailureReason, Internal, QueueRejected
from doorstep.request import Batch, InferenceRequest, InferenceResponse, cancelled_error
from doorstep.scheduler.plan import BatchPolicy, Dispatch, WaitUntil, plan
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
        self._name = name
        self._version = version
        self._stats = stats
        self._loop = loop
        self._queue_policy = queue_policy
        self._has_timeouts = bool(queue_policy.default_timeout_ns or queue_policy.allow_override)
        self._key_of = key_of
        self._clock = clock
        self._queue: deque[InferenceRequest] = deque()  # may hold cancelled requests until the next look
        self._idle: list[Worker] = list(workers)
        self._worker_count = len(workers)
        self._dead_in_queue = 0  # cancelled or expired, already answered, not yet taken out
        self._running_count = 0  # requests in batches that workers have
        self._pump_soon = False
        self._pumping = False
        self._alarm = Alarm(loop, self._on_alarm)  # at the earliest time anything has to be looked at
        self._stopping = False
        self._empty: asyncio.Future[None] | None = None  # somebody waits for the last answer
        # With one worker batches end in the order they began, so order needs no help.
        self._in_order: deque[_Answer] | None = deque() if preserve_ordering and len(workers) > 1 else None
        self._on_cancel = self._cancel
        self._on_done = self._complete

    # What others see

    @property
    def queued_count(self) -> int:
        return len(self._queue) - self._dead_in_queue

    @property
    def inflight_count(self) -> int:
        return self.queued_count + self._running_count

    @property
    def busy_workers(self) -> int:
        return self._worker_count - len(self._idle)

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
        while self.inflight_count:
            if self._empty is None:
                self._empty = self._loop.create_future()
            await self._empty

    def close(self) -> None:
        """After the last answer."""
        self._alarm.close()

    def replace_worker(self, old: Worker, new: Worker) -> None:
        """Puts `new` where `old` was. Only while `old` is idle."""
        self._idle[self._idle.index(old)] = new

    # Decide, then act

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
        worker = self._idle.pop()
        batch = Batch(requests, rows)
        batch.worker = worker
        self._running_count += count
        if self._in_order is not None:
            self._in_order.extend(_Answer(r) for r in requests)
        worker.submit(batch, self._on_done)

    def _complete(self, batch: Batch) -> None:
        """The worker is free first, the answers second: the next batch should not wait for encoding."""
        self._idle.append(batch.worker)
        if self._queue and not self._pumping:
            self._pump()
        requests = batch.requests
        self._running_count -= len(requests)
        start_ns, end_ns = batch.compute_start_ns, batch.compute_end_ns
        name, version, in_order = self._name, self._version, self._in_order
        waits = []
        responses = []
        for request, result in zip(requests, batch.results, strict=True):
            if request.cancelled:  # answered when it was cancelled
                continue
            if result is None:
                result = Internal(f"model '{name}' gave no result for the request")
            if isinstance(result, DoorstepError):
                self._stats.record_failure(end_ns - request.received_ns, result.reason)
                response = InferenceResponse(name, version, request.id, (), result)
            else:
                waits.append((end_ns - request.received_ns, start_ns - request.queued_ns))
                response = InferenceResponse(name, version, request.id, result)
            request.on_cancel = None
            responses.append((request, response))
        if waits:
            self._record(batch, waits)
        for request, response in responses:
            if in_order is None:
                request.sender.send(response, True)
            else:
                self._answer_in_order(request, response)
        if self._in_order is not None:
            self._send_in_order()
        if self._empty is not None:
            self._tell_empty()

    def _record(self, batch: Batch, waits: list[tuple[int, int]]) -> None:
        """The statistics of a batch of which at least one request succeeded."""
        start_ns, end_ns = batch.compute_start_ns, batch.compute_end_ns
        input_ns = max(batch.input_end_ns - start_ns, 0)
        output_ns = max(end_ns - batch.output_start_ns, 0) if batch.output_start_ns else 0
        infer_ns = max(end_ns - start_ns - input_ns - output_ns, 0)
        self._stats.record_batch(batch.rows, input_ns, infer_ns, output_ns)
        self._stats.record_successes(waits, input_ns, infer_ns, output_ns)

    # Ends other than an answer from the model

    def _answer_in_order(self, request: InferenceRequest, response: InferenceResponse) -> None:
        """Notes the answer at its place; `_send_in_order` sends what has become due."""
        assert self._in_order is not None
        for answer in self._in_order:
            if answer.request is request:
                answer.response = response
                return

    def _send_in_order(self) -> None:
        order = self._in_order
        while order and (order[0].response is not None or order[0].request.cancelled):
            answer = order.popleft()
            if answer.response is not None:  # None: cancelled, and answered then
                answer.request.sender.send(answer.response, True)

    def _cancel(self, request: InferenceRequest) -> None:
        """Answers at once. In the queue it is skipped; in a batch its result is thrown away."""
        self._end_early(request, cancelled_error())

    def _end_early(self, request: InferenceRequest, error: DoorstepError) -> None:
        if request in self._queue:
            self._dead_in_queue += 1
        request.cancelled = True
        request.on_cancel = None
        self._stats.record_failure(self._clock() - request.received_ns, error.reason)
        request.sender.send(InferenceResponse(self._name, self._version, request.id, error=error), True)
        if self._empty is not None:
            self._tell_empty()

    def _tell_empty(self) -> None:
        if self._empty is not None and not self.inflight_count:
            self._empty.set_result(None)
            self._empty = None

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


class _Answer:
    """A place in the order of answers."""

    __slots__ = ("request", "response")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.response: InferenceResponse | None = None
