"""Gives requests of one sequence to one instance, in order: Triton's sequence batcher. Knows no protocol, no library.

This file keeps the sequences: which slot each has, the backlog of those that have none, and when one has been idle too
long. What runs, and when, is the batchers' (sequence_direct.py, sequence_oldest.py); what the requests get besides
their inputs is sequence_tensors.py's. The rules are those of core's sequence_batch_scheduler.cc. All of it is touched
only from the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush

from doorstep.errors import DoorstepError, FailureReason, InvalidArgument, QueueRejected
from doorstep.request import Batch, InferenceRequest, cancelled_error
from doorstep.scheduler.dynamic import STOPPING
from doorstep.scheduler.rate_limiter import RateLimiter
from doorstep.scheduler.sequence_parts import NEVER, Backlog, Batcher, SequenceId, Slot, Ticket
from doorstep.scheduler.sequence_runner import SequenceRunner
from doorstep.scheduler.sequence_tensors import SequenceTensors
from doorstep.scheduler.timer import Alarm
from doorstep.stats import ModelStatistics
from doorstep.types import Tensor
from doorstep.workers.base import Worker

logger = logging.getLogger("doorstep.scheduler")

BACKLOG_LOOK_NS = 50_000_000  # how soon an idle sequence of the backlog is looked at again
EXPIRED = "timeout of the corresponding sequence has been expired"  # Triton's


class SequenceScheduler:
    """See the module. `make_batcher` makes what runs the sequences of one worker."""

    def __init__(
        self,
        name: str,
        version: str,
        workers: list[Worker],
        stats: ModelStatistics,
        tensors: SequenceTensors,
        make_batcher: Callable[[SequenceScheduler, Worker], Batcher],
        *,
        loop: asyncio.AbstractEventLoop,
        idle_ns: int,
        iterative: bool = False,
        preserve_ordering: bool = False,
        limiter: RateLimiter | None = None,
        key_of: Callable[[InferenceRequest], object] | None = None,
        hold_until: int = 0,
        hold_until_backlog: int = 0,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._name = name
        self._tensors = tensors
        self._make_batcher = make_batcher
        self._loop = loop
        self._idle_ns = idle_ns
        self._iterative = iterative
        self._key_of = key_of
        self.clock = clock
        self._runner = SequenceRunner(
            self,
            name,
            version,
            workers,
            stats,
            loop,
            on_idle=self._on_idle,
            on_reschedule=self._run_again if iterative else None,
            on_finished=self._on_finished,
            settle=self._settle if tensors.keeps_states else None,
            preserve_ordering=preserve_ordering,
            limiter=limiter,
            clock=clock,
        )
        self._batchers: dict[Worker, Batcher] = {}
        self._ready: list[Slot] = []  # a heap: free slots, the lowest first
        self._slot_of: dict[SequenceId, Slot] = {}
        self._backlog: deque[Backlog] = deque()
        self._backlog_of: dict[SequenceId, Backlog] = {}  # those that still grow
        self._touched_ns: dict[SequenceId, int] = {}  # when a sequence was last heard of
        self._idle_due_ns = NEVER
        self._expiry_due_ns = NEVER
        self._look_due_ns = NEVER
        self._alarm = Alarm(loop, self._on_alarm)
        self._waiting = 0  # requests taken, not answered and not in a batch
        self._padding = 0  # requests in batches that are nobody's
        self._to_look: list[Batcher] = []
        self._dropped: list[InferenceRequest] = []
        self._next_id = 1
        self._stopping = False
        self._on_cancel = self._cancel
        # For tests that want certain batches, as in Triton: nothing runs before so many requests are there.
        self._hold_until = hold_until
        self._hold_until_backlog = hold_until_backlog
        self._held: dict[Batcher, int] = {}
        for worker in workers:
            self._add_batcher(worker)

    # What others see

    @property
    def queued_count(self) -> int:
        return self._waiting

    @property
    def inflight_count(self) -> int:
        return self._waiting + self._runner.running_count - self._padding

    @property
    def sequence_count(self) -> int:
        """Sequences that have begun and not ended, those of the backlog included."""
        return len(self._slot_of.keys() | self._backlog_of.keys())

    @property
    def busy_workers(self) -> int:
        return self._runner.busy_workers

    @property
    def queue_limit(self) -> int:
        return 0

    def enqueue(self, request: InferenceRequest) -> None:
        if request.rows > 1:
            raise InvalidArgument(
                f"inference request to model '{self._name}' must specify batch-size 1 due to requirements of sequence "
                "batcher"
            )
        if not request.correlation_id:
            if not self._iterative:
                raise InvalidArgument(
                    f"inference request to model '{self._name}' must specify a non-zero or non-empty correlation ID"
                )
            request.correlation_id = self._next_id
            self._next_id += 1
            request.sequence_start, request.sequence_end = True, False
        self._tensors.check_id(request)
        if self._stopping and request.sequence_start:
            raise QueueRejected(STOPPING)
        self._take(request)

    def stop(self) -> None:
        """Refuses new sequences; those that have begun may go on."""
        self._stopping = True

    async def drained(self) -> None:
        await self._runner.drained(lambda: not self.inflight_count)

    async def ended(self) -> None:
        await self._runner.drained(lambda: not self.inflight_count and not self.sequence_count)

    def close(self) -> None:
        self._alarm.close()

    def replace_worker(self, old: Worker, new: Worker) -> None:
        self._runner.replace_worker(old, new)
        batcher = self._batchers.pop(old)
        batcher.worker = new
        self._batchers[new] = batcher

    def add_worker(self, worker: Worker) -> None:
        self._add_batcher(worker)
        self._runner.add_worker(worker)
        self._fill_ready_slots()

    async def remove_worker(self, worker: Worker) -> None:
        """Gives it no new sequence; returns when those it has have ended and it may be closed."""
        batcher = self._batchers[worker]
        batcher.leaving = len(batcher.slots)
        free = [slot for slot in self._ready if slot.batcher is batcher]
        self._ready = [slot for slot in self._ready if slot.batcher is not batcher]
        heapify(self._ready)
        batcher.leaving -= len(free)
        await self._runner.drained(lambda: batcher.leaving == 0)
        await self._runner.remove_worker(batcher.worker)
        del self._batchers[batcher.worker]
        self._held.pop(batcher, None)

    # A request's way to its slot

    def _take(self, request: InferenceRequest) -> None:
        """Raises InvalidArgument for a request whose sequence has not begun."""
        sequence = request.correlation_id
        start, end = request.sequence_start, request.sequence_end
        slot = self._slot_of.get(sequence)
        backlog = self._backlog_of.get(sequence)
        if slot is None and backlog is None:
            if not start:
                raise InvalidArgument(
                    f"inference request for sequence {sequence} to model '{self._name}' must specify the START flag on "
                    "the first request of the sequence"
                )
        elif start:
            logger.warning(
                "sequence %s for model '%s' has a conflict. The previous sequence did not end before this sequence "
                "start. Previous sequence will be terminated early.",
                sequence,
                self._name,
            )
        now = self.clock()
        ticket = Ticket(request)
        ticket.queued_ns = now
        if self._key_of is not None:
            ticket.batch_key = self._key_of(request)
        request.slot = ticket
        request.queued_ns = now
        request.on_cancel = self._on_cancel
        self._waiting += 1
        self._touch(sequence, now)
        if slot is None and backlog is None and self._ready:
            slot = heappop(self._ready)
        if slot is None:
            self._put_in_backlog(ticket, backlog)
            return
        if end:
            self._slot_of.pop(sequence, None)
            self._touched_ns.pop(sequence, None)
        else:
            self._slot_of[sequence] = slot
        ticket.slot = slot
        slot.batcher.put(slot, ticket)

    def _put_in_backlog(self, ticket: Ticket, backlog: Backlog | None) -> None:
        request = ticket.request
        if backlog is None:
            backlog = Backlog()
            self._backlog.append(backlog)
            self._backlog_of[request.correlation_id] = backlog
        if request.timeout_us:
            backlog.expires_ns = min(backlog.expires_ns, ticket.queued_ns + request.timeout_us * 1000)
            if backlog.expires_ns < self._expiry_due_ns:
                self._expiry_due_ns = backlog.expires_ns
                self._alarm.set(backlog.expires_ns)
        backlog.tickets.append(ticket)
        if request.sequence_end:
            del self._backlog_of[request.correlation_id]
            self._touched_ns.pop(request.correlation_id, None)
        for batcher in self._held:
            self.look_soon(batcher)

    def _run_again(self, request: InferenceRequest) -> None:
        """Its model wants to see the request again: it goes on in its sequence, neither first nor last."""
        ticket = request.slot
        request.sequence_start = request.sequence_end = False
        try:
            self._take(request)
            request.slot.asked = ticket.asked
        except InvalidArgument as error:  # idle for too long, or at its end
            self._runner.end_early(request, error)
        if ticket.slot is not None:
            ticket.slot.batcher.finished(ticket)

    def _add_batcher(self, worker: Worker) -> None:
        batcher = self._batchers[worker] = self._make_batcher(self, worker)
        for slot in batcher.slots:
            heappush(self._ready, slot)
        if self._hold_until:
            self._held[batcher] = 0

    def _fill_ready_slots(self) -> None:
        """Sequences of the backlog move into slots that have come."""
        while self._ready and self._backlog:
            slot = heappop(self._ready)
            self._move_in(slot)
            if slot.sequence is None:
                heappush(self._ready, slot)
                return
            slot.batcher.put(slot, slot.queue.pop())

    # What batchers ask for

    def release(self, slot: Slot) -> None:
        sequence = slot.sequence
        if sequence is not None and slot.queue and self._slot_of.get(sequence) is slot:  # cancelled: it is over
            del self._slot_of[sequence]
            self._touched_ns.pop(sequence, None)
        self._drop(slot.queue)
        slot.queue.clear()
        slot.sequence = None
        if slot.batcher.leaving:
            slot.batcher.leaving -= 1
        else:
            self._move_in(slot)
            if slot.sequence is None:
                heappush(self._ready, slot)
        self._runner.tell()

    def _move_in(self, slot: Slot) -> None:
        """Gives the slot the first sequence of the backlog that nobody has cancelled."""
        while self._backlog:
            backlog = self._backlog.popleft()
            tickets = backlog.tickets
            sequence = tickets[-1].request.correlation_id
            grows = self._backlog_of.get(sequence) is backlog
            if grows:
                del self._backlog_of[sequence]
            if any(ticket.request.cancelled for ticket in tickets):
                self._drop(tickets)
                continue
            if grows:
                self._slot_of[sequence] = slot
                self._touch(sequence, self.clock())  # it could not go on before (Triton would end it any moment now)
            for ticket in tickets:
                ticket.slot = slot
            slot.queue.extend(tickets)
            slot.sequence = sequence
            return

    def prepare(self, ticket: Ticket) -> None:
        self._tensors.give(ticket)

    def key(self, ticket: Ticket) -> object:
        return self._tensors.key(ticket)

    def padding(self, like: Ticket) -> InferenceRequest:
        return self._tensors.padding(like.request)

    def run(self, batcher: Batcher, tickets: list[Ticket], requests: list[InferenceRequest]) -> None:
        for ticket in tickets:
            ticket.waiting = False
            ticket.running = True
        self._waiting -= len(tickets)
        self._padding += len(requests) - len(tickets)
        self._runner.idle.remove(batcher.worker)
        self._runner.run(batcher.worker, requests, len(requests))

    def look_soon(self, batcher: Batcher) -> None:
        if not self._to_look:
            self._loop.call_soon(self._look)
        if batcher not in self._to_look:
            self._to_look.append(batcher)

    def look_at(self, ns: int) -> None:
        self._look_due_ns = min(self._look_due_ns, ns)
        self._alarm.set(ns)

    def held_back(self, batcher: Batcher, count: int) -> bool:
        if batcher not in self._held:
            return False
        self._held[batcher] = count
        if sum(self._held.values()) < self._hold_until or self._backlog_count() < self._hold_until_backlog:
            return True
        for other in self._held:
            if other is not batcher:
                self.look_soon(other)
        self._held.clear()  # the condition is for the first batch of all; what it runs must not hold the others back
        return False

    def _backlog_count(self) -> int:
        return sum(len(backlog.tickets) for backlog in self._backlog)

    def _look(self) -> None:
        """Whatever arrived in this turn of the loop can share a batch."""
        batchers, self._to_look = self._to_look, []
        idle = self._runner.idle
        for batcher in batchers:
            if batcher.worker in idle:
                batcher.run_what_is_due()

    def _on_idle(self, worker: Worker) -> None:
        batcher = self._batchers.get(worker)
        if batcher is not None:
            self.look_soon(batcher)

    # Endings

    def before_answers(self, batch: Batch) -> list[Ticket]:
        """A batch is done. Returns those of its requests that had their last answer before."""
        over = []
        for request, result in zip(batch.requests, batch.results, strict=True):
            ticket: Ticket | None = request.slot
            if ticket is None:  # padding: nobody is to hear of it
                request.cancelled = True
                batch.padding += 1  # nor is it counted as an inference
                self._padding -= 1
                continue
            ticket.running = False
            if request.cancelled:
                if ticket.states is not None and isinstance(result, Sequence):
                    self._tensors.keep(ticket, result)  # the model has seen the request, whoever waits for it
                over.append(ticket)
            elif ticket.ended_early:
                over.append(ticket)
        return over

    def over(self, ticket: Ticket) -> None:
        """The last answer has gone, and no batch has the request any more."""
        slot = ticket.slot
        if slot is None:
            return
        slot.batcher.finished(ticket)
        sequence = ticket.request.correlation_id
        if self._iterative and not ticket.request.sequence_end and self._slot_of.get(sequence) is slot:
            del self._slot_of[sequence]
            self._touched_ns.pop(sequence, None)
            slot.batcher.put(slot, None)

    def _on_finished(self, request: InferenceRequest) -> None:
        ticket: Ticket | None = request.slot
        if ticket is None:
            return
        if ticket.running:
            ticket.ended_early = True
        else:
            self.over(ticket)

    def _settle(self, request: InferenceRequest, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        ticket: Ticket = request.slot
        self._tensors.keep(ticket, outputs)
        return self._tensors.without_states(outputs, ticket.asked)

    def _cancel(self, request: InferenceRequest) -> None:
        """Answers at once. Where it waits, its sequence ends when its turn comes, as in Triton."""
        self._end_early(request, cancelled_error())

    def _end_early(self, request: InferenceRequest, error: DoorstepError) -> None:
        ticket: Ticket = request.slot
        if ticket.waiting:
            ticket.waiting = False
            self._waiting -= 1
        if ticket.slot is not None:
            self.look_soon(ticket.slot.batcher)
        self._runner.end_early(request, error)

    def _drop(self, tickets: deque[Ticket | None] | deque[Ticket]) -> None:
        """They are cancelled with their sequence: soon, because whoever is answered may send the next request."""
        dropped = [t.request for t in tickets if t is not None and not t.request.cancelled]
        if dropped:
            if not self._dropped:
                self._loop.call_soon(self._answer_dropped)
            self._dropped += dropped

    def _answer_dropped(self) -> None:
        dropped, self._dropped = self._dropped, []
        for request in dropped:
            if not request.cancelled:
                self._end_early(request, cancelled_error())

    # Time

    def _touch(self, sequence: SequenceId, now: int) -> None:
        self._touched_ns[sequence] = now
        if self._idle_due_ns == NEVER:
            self._idle_due_ns = now + self._idle_ns
            self._alarm.set(self._idle_due_ns)

    def _on_alarm(self) -> None:
        now = self.clock()
        if now >= self._idle_due_ns:
            self._end_idle(now)
        if now >= self._expiry_due_ns:
            self._expire(now)
        if now >= self._look_due_ns:
            self._look_due_ns = NEVER
            for batcher in self._batchers.values():
                self.look_soon(batcher)
        due_ns = min(self._idle_due_ns, self._expiry_due_ns, self._look_due_ns)
        if due_ns != NEVER:
            self._alarm.set(due_ns)

    def _end_idle(self, now: int) -> None:
        """Ends the sequences nothing has been heard of. What is queued of them still runs."""
        due_ns = NEVER
        for sequence, touched_ns in list(self._touched_ns.items()):
            at = touched_ns + self._idle_ns
            if at > now:
                due_ns = min(due_ns, at)
                continue
            slot = self._slot_of.pop(sequence, None)
            if slot is None and sequence in self._backlog_of:  # its time counts from when it gets a slot
                due_ns = min(due_ns, now + BACKLOG_LOOK_NS)
                continue
            del self._touched_ns[sequence]
            if slot is not None:
                slot.batcher.put(slot, None)
        self._idle_due_ns = due_ns

    def _expire(self, now: int) -> None:
        """Refuses the sequences of the backlog of which a request has waited as long as it would."""
        expired = [backlog for backlog in self._backlog if backlog.expires_ns <= now]
        self._backlog = deque(backlog for backlog in self._backlog if backlog.expires_ns > now)
        self._expiry_due_ns = min((backlog.expires_ns for backlog in self._backlog), default=NEVER)
        for backlog in expired:
            sequence = backlog.tickets[0].request.correlation_id
            if self._backlog_of.get(sequence) is backlog:
                del self._backlog_of[sequence]
                self._touched_ns.pop(sequence, None)
        for backlog in expired:
            for ticket in backlog.tickets:
                if not ticket.request.cancelled:
                    self._end_early(ticket.request, QueueRejected(EXPIRED, reason=FailureReason.REJECTED))
