"""What the two strategies of sequence batching have in common: slots, tickets and where they meet. Decides nothing.

A slot is a place for one sequence at one instance. All of it is touched only from the event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from doorstep.request import InferenceRequest
from doorstep.types import Tensor
from doorstep.workers.base import Worker

SequenceId = int | str
NEVER = 2**63  # ns


class Ticket:
    """A request on its way to a worker, and what `plan` wants to know of it."""

    __slots__ = (
        "asked",
        "batch_key",
        "ended_early",
        "queued_ns",
        "request",
        "rows",
        "running",
        "slot",
        "states",
        "waiting",
    )

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.rows = 1
        self.batch_key: object = None
        self.queued_ns = 0  # since when it waits, as far as a batch's delay is concerned
        self.slot: Slot | None = None  # None: its sequence is in the backlog
        self.waiting = True  # in some queue, and not answered
        self.running = False  # in a batch that a worker has
        self.ended_early = False  # it had its last answer before its batch was done
        self.asked = request.requested_outputs  # by the client; the backend is asked for states too
        self.states: dict[str, Tensor] | None = None  # of its sequence: what the model gave last


class Slot:
    """A place for a sequence. `queue` holds what has not been given to a batch; None stands for the sequence's end."""

    __slots__ = ("batcher", "in_flight", "number", "queue", "sequence", "states")

    def __init__(self, batcher: Batcher, number: int) -> None:
        self.batcher = batcher
        self.number = number
        self.queue: deque[Ticket | None] = deque()
        self.sequence: SequenceId | None = None  # None: it is free
        self.in_flight: Ticket | None = None  # oldest strategy: one request of a sequence runs at a time
        self.states: dict[str, Tensor] | None = None

    def __lt__(self, other: Slot) -> bool:
        """Low slots are taken first: that keeps direct batches short."""
        return self.number < other.number


class Backlog:
    """A sequence that has no slot yet."""

    __slots__ = ("expires_ns", "tickets")

    def __init__(self) -> None:
        self.tickets: deque[Ticket] = deque()
        self.expires_ns = NEVER


class Batcher(Protocol):
    """The sequences of one worker."""

    worker: Worker
    slots: list[Slot]
    leaving: int  # slots still to be emptied before the worker can go; 0: it stays, or has none left

    def put(self, slot: Slot, ticket: Ticket | None) -> None:
        """Takes a request, or the news that the sequence has ended, for one of its slots."""

    def run_what_is_due(self) -> None:
        """Makes a batch if there is one to be made. Only while the worker is idle."""

    def finished(self, ticket: Ticket) -> None:
        """The request has had its last answer, or wants to be run again."""


class Host(Protocol):
    """What a batcher asks of the scheduler."""

    clock: Callable[[], int]

    def release(self, slot: Slot) -> None:
        """The slot's sequence is over: what is left in its queue is cancelled, and a sequence of the backlog moves in
        where there is one."""

    def prepare(self, ticket: Ticket) -> None:
        """Gives the request the controls and states it is to run with."""

    def key(self, ticket: Ticket) -> object:
        """What requests that share a batch have in common."""

    def padding(self, like: Ticket) -> InferenceRequest:
        """A request that holds a slot's place in a batch."""

    def run(self, batcher: Batcher, tickets: list[Ticket], requests: list[InferenceRequest]) -> None:
        """Runs `requests`, which are those of `tickets` and padding."""

    def look_soon(self, batcher: Batcher) -> None:
        """`run_what_is_due` is to be called in the next turn of the loop, if the worker is idle then."""

    def look_at(self, ns: int) -> None:
        """…or at that time."""

    def held_back(self, batcher: Batcher, count: int) -> bool:
        """Whether batches wait for more requests to be queued, as the environment asks."""
