"""The direct strategy: a sequence keeps one row of its instance's batches. Knows no tensor and no protocol.

As in Triton (sequence_batch_scheduler.cc, DirectSequenceBatch): a batch goes from slot 0 to the last slot that has
something to run, and a slot between that has nothing is filled with a request that says it is not READY.
"""

from __future__ import annotations

from dataclasses import dataclass

from doorstep.request import InferenceRequest
from doorstep.scheduler.sequence_parts import Host, Slot, Ticket
from doorstep.workers.base import Worker


@dataclass(frozen=True, slots=True)
class DirectPolicy:
    max_delay_ns: int = 0
    minimum_utilization: float = 0.0  # a batch does not wait for more once this share of the slots is filled


class DirectBatcher:
    def __init__(self, host: Host, worker: Worker, slot_count: int, policy: DirectPolicy) -> None:
        self.worker = worker
        self.slots = [Slot(self, number) for number in range(slot_count)]
        self.leaving = 0
        self._host = host
        self._policy = policy
        self._clock = host.clock
        self._top = -1  # the last slot that has a sequence

    def put(self, slot: Slot, ticket: Ticket | None) -> None:
        if ticket is not None:
            slot.sequence = ticket.request.correlation_id
            self._top = max(self._top, slot.number)
        slot.queue.append(ticket)
        self._host.look_soon(self)

    def finished(self, ticket: Ticket) -> None:
        """Nothing: the next of the sequence has its row in the next batch whatever became of this one's answer."""

    def run_what_is_due(self) -> None:
        waiting = sum(len(slot.queue) for slot in self.slots[: self._top + 1])
        if not waiting or self._host.held_back(self, waiting):
            return
        ready = self._look()
        if ready and self._is_due(ready):
            self._run(ready)
        self._lower_top()

    def _look(self) -> list[Ticket]:
        """The first request of each slot that has one; slots whose sequence is over get the next sequence."""
        ready = []
        for slot in self.slots[: self._top + 1]:
            queue = slot.queue
            if queue:
                first = queue[0]
                if first is None:
                    queue.popleft()
                    self._host.release(slot)
                elif first.request.cancelled:
                    self._host.release(slot)
                if queue and queue[0] is not None:
                    ready.append(queue[0])
        return ready

    def _is_due(self, ready: list[Ticket]) -> bool:
        policy = self._policy
        if not policy.max_delay_ns or not policy.minimum_utilization:
            return True
        due_ns = min(ticket.queued_ns for ticket in ready) + policy.max_delay_ns
        if len(ready) / len(self.slots) >= policy.minimum_utilization or self._clock() >= due_ns:
            return True
        self._host.look_at(due_ns)
        return False

    def _run(self, ready: list[Ticket]) -> None:
        last = ready[-1].slot
        assert last is not None
        model = ready[0]  # its shapes are the batch's
        tickets: list[Ticket] = []
        requests: list[InferenceRequest] = []
        key = self._host.key(model)
        chosen = {ticket.slot: ticket for ticket in ready if ticket is model or self._host.key(ticket) == key}
        holes = []
        for slot in self.slots[: last.number + 1]:
            ticket = chosen.get(slot)
            if ticket is None:
                holes.append(len(requests))
                requests.append(model.request)  # replaced below, once the model request has its states
                continue
            slot.queue.popleft()
            self._host.prepare(ticket)
            tickets.append(ticket)
            requests.append(ticket.request)
            if ticket.request.sequence_end:
                self._host.release(slot)
        for hole in holes:
            requests[hole] = self._host.padding(model)
        self._host.run(self, tickets, requests)

    def _lower_top(self) -> None:
        while self._top >= 0 and self.slots[self._top].sequence is None:
            self._top -= 1
