"""The oldest strategy: the sequences of an instance feed a dynamic batcher, one request each at a time.

As in Triton (sequence_batch_scheduler.cc, OldestSequenceBatch). Knows no tensor and no protocol.
"""

from __future__ import annotations

from collections import deque

from doorstep.scheduler.plan import BatchPolicy, Dispatch, WaitUntil, plan
from doorstep.scheduler.sequence_parts import Host, Slot, Ticket
from doorstep.workers.base import Worker


class OldestBatcher:
    def __init__(self, host: Host, worker: Worker, slot_count: int, policy: BatchPolicy, hold_until: int) -> None:
        self.worker = worker
        self.slots = [Slot(self, number) for number in range(slot_count)]
        self.leaving = 0
        self._host = host
        self._policy = policy
        self._clock = host.clock
        self._hold_until = hold_until  # nothing runs before so many are candidates; 0 once they were
        self._candidates: deque[Ticket] = deque()  # oldest first, at most one of each sequence

    def put(self, slot: Slot, ticket: Ticket | None) -> None:
        if ticket is not None:
            slot.sequence = ticket.request.correlation_id
        slot.queue.append(ticket)
        if slot.in_flight is None:
            self._next(slot)

    def finished(self, ticket: Ticket) -> None:
        slot = ticket.slot
        if slot is not None and slot.in_flight is ticket:
            slot.in_flight = None
            if ticket.request.cancelled:
                self._host.look_soon(self)
            self._next(slot)

    def _next(self, slot: Slot) -> None:
        """Makes the slot's next request a candidate. Where its sequence is over, the next sequence moves in."""
        while slot.queue and slot.in_flight is None:
            ticket = slot.queue[0]
            if ticket is None:
                slot.queue.popleft()
                self._host.release(slot)
            elif ticket.request.cancelled:
                self._host.release(slot)
            else:
                slot.queue.popleft()
                slot.in_flight = ticket
                ticket.queued_ns = self._clock()
                self._host.prepare(ticket)
                ticket.batch_key = self._host.key(ticket)
                self._candidates.append(ticket)
                self._host.look_soon(self)
                if ticket.request.sequence_end:
                    self._host.release(slot)

    def run_what_is_due(self) -> None:
        candidates = self._candidates
        if candidates and any(ticket.request.cancelled for ticket in candidates):
            candidates = self._candidates = deque(t for t in candidates if not t.request.cancelled)
        if not candidates or len(candidates) < self._hold_until:
            return
        self._hold_until = 0
        match plan(candidates, self._clock(), self._policy):
            case Dispatch(count):
                tickets = [candidates.popleft() for _ in range(count)]
                self._host.run(self, tickets, [ticket.request for ticket in tickets])
            case WaitUntil(ns):
                self._host.look_at(ns)
