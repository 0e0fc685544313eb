"""Runs batches on a model's workers and answers their requests. Decides nothing; knows no queue.

What every scheduler has in common: idle workers, batches on their way, responses that come one by one, statistics,
cancellation, and the order of answers. All of it is touched only from the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from functools import partial

from doorstep.errors import DoorstepError, Internal, InvalidArgument
from doorstep.request import LATER, Batch, InferenceRequest, InferenceResponse, Outputs, Verdict, cancelled_error
from doorstep.scheduler.order import AnswersInOrder
from doorstep.scheduler.rate_limiter import RateLimiter, Ticket
from doorstep.stats import ModelStatistics
from doorstep.types import Tensor
from doorstep.workers.base import Worker

Settle = Callable[[InferenceRequest, Sequence[Tensor]], Sequence[Tensor]]
NOT_RESCHEDULED = (  # Triton's
    "Request is released with TRITONSERVER_REQUEST_RELEASE_RESCHEDULE, while the model is not configured to handle "
    "such a flag."
)


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
        limiter: RateLimiter | None = None,
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
        self._in_order = AnswersInOrder() if preserve_ordering else None
        self._limiter = limiter
        self._tickets: dict[Worker, Ticket] = {} if limiter is None else {w: limiter.ticket_of(w) for w in workers}
        self._leaving: set[Worker] = set()  # busy ones that get no other batch
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
            self._in_order.begin(requests)
        if self._limiter is not None:
            self._submit_when_granted(worker, batch, self._limiter)
        else:
            worker.submit(batch, self._on_done)

    def _complete(self, batch: Batch) -> None:
        """The worker is free first, the answers second: the next batch should not wait for encoding."""
        requests = batch.requests
        self.running_count -= len(requests)
        settle = self._settle
        is_idle = self._is_idle_again(batch.worker) if self._limiter is not None or self._leaving else True
        if is_idle:
            self.idle.append(batch.worker)
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
            if isinstance(result, Verdict):
                later = True
                continue
            if result is None:
                result = Internal(f"model '{name}' gave no result for the request")
            if self._streams and request in self._streams:
                # It had responses before; where the last was among them, this is none.
                self._emit(request, result, True)
                self._streams.pop(request, None)
                continue
            if isinstance(result, DoorstepError):
                self.stats.record_failure(end_ns - request.received_ns, result.reason)
                response = InferenceResponse(name, version, request.id, (), result)
            else:
                waits.append((end_ns - request.received_ns, start_ns - request.queued_ns))
                if request.tally is not None:
                    request.tally.count(batch)
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
        if settle is not None and is_idle:
            self._on_idle(batch.worker)
        self._answer_all(responses)
        if self._empty:
            self._tell_empty()

    def _answer_all(self, responses: list[tuple[InferenceRequest, InferenceResponse]]) -> None:
        if self._in_order is None and self._on_finished is None:
            for request, response in responses:
                request.sender.send(response, True)
        else:
            for request, response in responses:
                self._answer(request, response)

    def _answer(self, request: InferenceRequest, response: InferenceResponse) -> None:
        """The last response of a request."""
        if self._in_order is None:
            request.sender.send(response, True)
        else:
            self._in_order.add(request, response, True)
        if self._on_finished is not None:
            self._on_finished(request)

    def _record(self, batch: Batch, waits: list[tuple[int, int]]) -> None:
        """The statistics of a batch of which at least one request succeeded."""
        start_ns, end_ns = batch.compute_start_ns, batch.compute_end_ns
        input_ns = max(batch.input_end_ns - start_ns, 0)
        output_ns = max(end_ns - batch.output_start_ns, 0) if batch.output_start_ns else 0
        infer_ns = max(end_ns - start_ns - input_ns - output_ns, 0)
        self.stats.record_batch(batch.rows, input_ns, infer_ns, output_ns, batch.padding)
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
                    stream.worker = batch.worker
            elif self._on_reschedule is not None:
                if self._in_order is not None:
                    self._in_order.forget(request)
                self._on_reschedule(request)
            else:
                error = InvalidArgument(NOT_RESCHEDULED)
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
        stream = self._streams.get(request)
        if stream is None:
            if request.on_cancel is None:  # it has had its last response: nobody can cancel it any more
                return
            stream = self._stream(request, now)
        if stream.ended:
            return
        number = stream.count
        stream.count += 1
        numbers = self.stats.response(number)
        if number == 0 and self.stats.latencies is not None:
            self.stats.latencies.first_response(now - request.received_ns)
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
            if self._in_order is None:
                request.sender.send(response, False)
            else:
                self._in_order.add(request, response, False)
            numbers.compute_output_count += 1
            numbers.compute_output_ns += self._clock() - now
            return
        self._end_stream(request, stream, response, now)

    def _end_stream(self, request: InferenceRequest, stream: _Stream, response: InferenceResponse, now: int) -> None:
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
            if request.tally is not None:
                request.tally.add(0, now - stream.start_ns, 0)
        if request.trace is not None:
            request.trace.streamed(request, stream.start_ns, now)
        self._answer(request, response)
        if self._empty:
            self._tell_empty()

    # Cancellation

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
        if self._in_order is not None:
            self._in_order.advance()
        if self._on_finished is not None:
            self._on_finished(request)
        if self._empty:
            self._tell_empty()

    # Workers that must ask the rate limiter first

    def claim(self) -> bool:
        """Whether the last of the idle workers may run a batch now. If not, `on_idle` is called when one may."""
        limiter = self._limiter
        if limiter is None:
            return True
        tickets, idle = self._tickets, self.idle
        granted = next((w for w in idle if tickets[w].granted), None)
        if granted is None:
            if any(tickets[w].on_grant is not None for w in idle):
                return False  # one is in line: it says so when the time has come
            first = min(idle, key=lambda w: tickets[w].turn)
            if not limiter.ask(tickets[first], partial(self._on_idle, first)):
                return False
            granted = first
        idle.remove(granted)
        idle.append(granted)
        return True

    def disclaim(self) -> None:
        """Gives back what idle workers have been granted, as nothing is left to run."""
        if self._limiter is not None:
            for worker in self.idle:
                if self._tickets[worker].granted:
                    self._limiter.release(self._tickets[worker], has_run=False)

    def _submit_when_granted(self, worker: Worker, batch: Batch, limiter: RateLimiter) -> None:
        ticket = self._tickets[worker]
        if ticket.granted or limiter.ask(ticket, partial(self._submit_granted, worker, batch)):
            worker.submit(batch, self._on_done)

    def _submit_granted(self, worker: Worker, batch: Batch) -> None:
        if all(request.cancelled for request in batch.requests):  # while they were in line
            self._complete(batch)
        else:
            worker.submit(batch, self._on_done)

    def _is_idle_again(self, worker: Worker) -> bool:
        """After a batch. False: it was its last."""
        if self._limiter is not None:
            self._limiter.release(self._tickets[worker])
        if worker in self._leaving:
            self._leaving.remove(worker)
            return False
        return True

    # Workers that come and go

    def add_worker(self, worker: Worker) -> None:
        """One more, ready to run."""
        self.worker_count += 1
        if self._limiter is not None:
            self._tickets[worker] = self._limiter.ticket_of(worker)
        self.idle.append(worker)
        self._on_idle(worker)

    async def remove_worker(self, worker: Worker) -> None:
        """Gives it nothing more to do; returns when all it has been given is answered, and it may be closed."""
        self.worker_count -= 1
        if worker in self.idle:
            self.idle.remove(worker)
            ticket = self._tickets.get(worker)
            if ticket is not None and ticket.on_grant is not None:  # in line: another must take its place
                ticket.on_grant = None
                self._on_idle(worker)
        else:
            self._leaving.add(worker)
        await self.drained(lambda: worker not in self._leaving and not self._has_streams(worker))
        self._tickets.pop(worker, None)

    def replace_worker(self, old: Worker, new: Worker) -> None:
        """Puts `new` where `old` was. Only while `old` is idle."""
        self.idle[self.idle.index(old)] = new
        if self._limiter is not None:
            ticket = self._tickets[new] = self._tickets.pop(old)
            self._limiter.assign(ticket, new)

    def _has_streams(self, worker: Worker) -> bool:
        return any(stream.worker is worker for stream in self._streams.values())

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

    __slots__ = ("count", "counted", "ended", "last_ns", "start_ns", "worker")

    def __init__(self, start_ns: int) -> None:
        self.count = 0
        self.counted = False  # its batch is done, and it counts as running by itself
        self.worker: Worker | None = None  # then: where it runs
        self.ended = False
        self.start_ns = start_ns
        self.last_ns = start_ns
