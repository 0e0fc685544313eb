"""Runs batches on a model's workers and answers their requests. Decides nothing; knows no queue.

What every scheduler has in common: idle workers, batches on their way, responses that come one by one, statistics,
cancellation, and the order of answers. All of it is touched only from the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from doorstep.errors import DoorstepError, Internal
from doorstep.request import LATER, Batch, InferenceRequest, InferenceResponse, Outputs, Verdict, cancelled_error
from doorstep.stats import ModelStatistics
from doorstep.types import Tensor
from doorstep.workers.base import Worker

Settle = Callable[[InferenceRequest, Sequence[Tensor]], Sequence[Tensor]]


class Runner:
    """See the module. The scheduler that owns it says what happens between: `on_idle` when a worker is free,
    `on_reschedule` for a request its model wants to see again, `on_finished` when a request taken by `run` has had its
    last answer, and `settle` to take from the outputs what the client must not see (the state of a sequence)."""

    def __init__(
        self,
        name: str,
        version: str,
        workers: list[Worker],
        stats: ModelStatistics,
        loop: asyncio.AbstractEventLoop,
        *,
        on_idle: Callable[[Worker], None],
        on_reschedule: Callable[[InferenceRequest], None] | None = None,
        on_finished: Callable[[InferenceRequest], None] | None = None,
        settle: Settle | None = None,
        preserve_ordering: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.idle: list[Worker] = list(workers)
        self.worker_count = len(workers)
        self.running_count = 0  # requests that workers have, or have still to answer
        self.name = name
        self.version = version
        self.stats = stats
        self._loop = loop
        self._clock = clock
        self._on_idle = on_idle
        self._on_reschedule = on_reschedule
        self._on_finished = on_finished
        self._settle = settle
        self._streams: dict[InferenceRequest, _Stream] = {}  # requests that get their responses one by one
        # With one worker batches end in the order they began, so order needs no help.
        self._in_order: deque[_Answer] | None = deque() if preserve_ordering and len(workers) > 1 else None
        self._empty: list[asyncio.Future[None]] = []  # somebody waits until nothing runs
        self._on_cancel = self.cancel
        self._on_done = self._complete
        self._on_emit = self._emit

    @property
    def busy_workers(self) -> int:
        return self.worker_count - len(self.idle)

    def run(self, worker: Worker, requests: list[InferenceRequest], rows: int) -> None:
        """Runs `requests` on `worker`, which is no longer idle. The worker may be done before this returns."""
        batch = Batch(requests, rows)
        batch.worker = worker
        batch.emit = self._on_emit
        self.running_count += len(requests)
        if self._in_order is not None:
            self._in_order.extend(_Answer(r) for r in requests)
        worker.submit(batch, self._on_done)

    def _complete(self, batch: Batch) -> None:
        """The worker is free first, the answers second: the next batch should not wait for encoding."""
        requests = batch.requests
        self.running_count -= len(requests)
        self.idle.append(batch.worker)
        settle = self._settle
        if settle is None:
            self._on_idle(batch.worker)
        end_ns, start_ns = batch.compute_end_ns, batch.compute_start_ns
        name, version = self.name, self.version
        waits = []
        responses = []
        later = False
        for request, result in zip(requests, batch.results, strict=True):
            if request.cancelled:  # answered when it was cancelled
                continue
            if result is None:
                result = Internal(f"model '{name}' gave no result for the request")
            if isinstance(result, DoorstepError):
                self.stats.record_failure(end_ns - request.received_ns, result.reason)
                response = InferenceResponse(name, version, request.id, (), result)
            elif isinstance(result, Verdict):
                later = True
                continue
            else:
                waits.append((end_ns - request.received_ns, start_ns - request.queued_ns))
                if settle is not None:
                    result = settle(request, result)
                response = InferenceResponse(name, version, request.id, result)
                if type(result) is Outputs:
                    response.parameters = result.parameters
            if request.trace is not None:
                request.trace.executed(request, batch)
            request.on_cancel = None
            responses.append((request, response))
        if waits or later:
            self._record(batch, waits)
        if later:
            self._leave_open(batch)
        if settle is not None:
            self._on_idle(batch.worker)
        for request, response in responses:
            self._answer(request, response)
        if self._empty:
            self._tell_empty()

    def _answer(self, request: InferenceRequest, response: InferenceResponse) -> None:
        """The last response of a request."""
        if self._in_order is None:
            request.sender.send(response, True)
        else:
            self._answer_in_order(request, response)
        if self._on_finished is not None:
            self._on_finished(request)

    def _record(self, batch: Batch, waits: list[tuple[int, int]]) -> None:
        """The statistics of a batch of which at least one request succeeded."""
        start_ns, end_ns = batch.compute_start_ns, batch.compute_end_ns
        input_ns = max(batch.input_end_ns - start_ns, 0)
        output_ns = max(end_ns - batch.output_start_ns, 0) if batch.output_start_ns else 0
        infer_ns = max(end_ns - start_ns - input_ns - output_ns, 0)
        self.stats.record_batch(batch.rows, input_ns, infer_ns, output_ns)
        if waits:
            self.stats.record_successes(waits, input_ns, infer_ns, output_ns)

    # Responses that come one by one

    def _leave_open(self, batch: Batch) -> None:
        """The batch is done, but some of its requests are not."""
        for request, result in zip(batch.requests, batch.results, strict=True):
            if request.cancelled or not isinstance(result, Verdict):
                continue
            if result is LATER:
                stream = self._stream(request, batch.compute_start_ns)
                if stream.ended:
                    del self._streams[request]
                else:
                    self.running_count += 1
                    stream.counted = True
            elif self._on_reschedule is not None:
                self._on_reschedule(request)
            else:
                error = Internal(f"model '{self.name}' asked for a request again, and its scheduler keeps none")
                self.stats.record_failure(self._clock() - request.received_ns, error.reason)
                request.on_cancel = None
                self._answer(request, InferenceResponse(self.name, self.version, request.id, (), error))

    def _stream(self, request: InferenceRequest, start_ns: int) -> _Stream:
        stream = self._streams.get(request)
        if stream is None:
            stream = self._streams[request] = _Stream(start_ns)
        return stream

    def _emit(self, request: InferenceRequest, outputs: Sequence[Tensor] | DoorstepError | None, final: bool) -> None:
        """One response of a request whose result is, or will be, LATER."""
        if request.cancelled:  # answered when it was cancelled
            return
        now = self._clock()
        stream = self._stream(request, now)
        if stream.ended:
            return
        number = stream.count
        stream.count += 1
        numbers = self.stats.response(number)
        infer_ns = max(now - stream.last_ns, 0)
        stream.last_ns = now
        name, version = self.name, self.version
        parameters = outputs.parameters if type(outputs) is Outputs else None
        if isinstance(outputs, DoorstepError):
            final = True
            response = InferenceResponse(name, version, request.id, (), outputs)
            numbers.fail_count += 1
            numbers.fail_ns += infer_ns
        elif outputs is None:
            response = InferenceResponse(name, version, request.id, flag_only=True)
            numbers.empty_count += 1
            numbers.empty_ns += infer_ns
        else:
            if self._settle is not None:
                outputs = self._settle(request, outputs)
            response = InferenceResponse(name, version, request.id, outputs, parameters=parameters)
            numbers.success_count += 1
            numbers.success_ns += infer_ns
            numbers.compute_infer_count += 1
            numbers.compute_infer_ns += infer_ns
        if not final:
            request.sender.send(response, False)
            numbers.compute_output_count += 1
            numbers.compute_output_ns += self._clock() - now
            return
        stream.ended = True
        if stream.counted:
            del self._streams[request]
            self.running_count -= 1
        request.on_cancel = None
        if response.error is not None:
            self.stats.record_failure(now - request.received_ns, response.error.reason)
        else:
            queue_ns = max(stream.start_ns - request.queued_ns, 0)
            self.stats.record_successes([(now - request.received_ns, queue_ns)], 0, now - stream.start_ns, 0)
        if request.trace is not None:
            request.trace.streamed(request, stream.start_ns, now)
        self._answer(request, response)
        if self._empty:
            self._tell_empty()

    # Cancellation, and the order of answers

    def cancel(self, request: InferenceRequest) -> None:
        """Answers a running request at once; what its batch makes of it is thrown away."""
        self.end_early(request, cancelled_error())

    def end_early(self, request: InferenceRequest, error: DoorstepError) -> None:
        """Answers with `error` a request that its model need not, or no longer, answer."""
        request.cancelled = True
        request.on_cancel = None
        now = self._clock()
        stream = self._streams.get(request)
        if stream is not None:
            numbers = self.stats.response(stream.count)
            numbers.cancel_count += 1
            numbers.cancel_ns += max(now - stream.last_ns, 0)
            if stream.counted:
                del self._streams[request]
                self.running_count -= 1
            else:
                stream.ended = True  # its batch is not done yet, and finds it cancelled
                del self._streams[request]
        self.stats.record_failure(now - request.received_ns, error.reason)
        request.sender.send(InferenceResponse(self.name, self.version, request.id, error=error), True)
        if self._in_order:
            self._send_in_order()
        if self._on_finished is not None:
            self._on_finished(request)
        if self._empty:
            self._tell_empty()

    def _answer_in_order(self, request: InferenceRequest, response: InferenceResponse) -> None:
        """Notes the answer at its place, and sends what has become due."""
        assert self._in_order is not None
        for answer in self._in_order:
            if answer.request is request:
                answer.response = response
                break
        self._send_in_order()

    def _send_in_order(self) -> None:
        order = self._in_order
        while order and (order[0].response is not None or order[0].request.cancelled):
            answer = order.popleft()
            if answer.response is not None:  # None: cancelled, and answered then
                answer.request.sender.send(answer.response, True)

    # Ends

    async def drained(self, is_empty: Callable[[], bool]) -> None:
        """Returns when `is_empty()`, asked again after every answer."""
        while not is_empty():
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._empty.append(waiter)
            await waiter

    def _tell_empty(self) -> None:
        waiters, self._empty = self._empty, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Stream:
    """What has been said to a request that gets several responses."""

    __slots__ = ("count", "counted", "ended", "last_ns", "start_ns")

    def __init__(self, start_ns: int) -> None:
        self.count = 0
        self.counted = False  # its batch is done, and it counts as running by itself
        self.ended = False
        self.start_ns = start_ns
        self.last_ns = start_ns


class _Answer:
    """A place in the order of answers."""

    __slots__ = ("request", "response")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.response: InferenceResponse | None = None
