"""Which instance may run next, where instances of several models share resources. Knows no queue and no model.

The rules are Triton core's (rate_limiter.cc). An instance has a ticket with the resources that its config asks for; it
runs when it is first in line and all of them are free. First is whoever has run least, times its priority, so one of
priority 2 gets half the turns of one of priority 1. Who is first and cannot have what it needs holds up the others.

Without --rate-limit there is no RateLimiter and no ticket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush
from itertools import count
from threading import Lock
from typing import Any

from doorstep.errors import InvalidArgument
from doorstep.workers.base import Worker

GLOBAL = -2  # in place of a device: the resource is shared by all of them
EVERY_DEVICE = -1  # of --rate-limit-resource: so much of it on each device

Resources = Mapping[int, Mapping[str, int]]  # device → name → count


class Ticket:
    """What one instance asks for, and how often it has run. But for its making, touched only from the event loop."""

    __slots__ = ("device_id", "granted", "needs", "on_grant", "priority", "run_count")

    def __init__(self, device_id: int, limits: Any) -> None:
        """`limits`: an inference.ModelRateLimiter message."""
        self.device_id = device_id
        self.needs: dict[tuple[int, str], int] = {}
        for resource in limits.resources:
            device = GLOBAL if getattr(resource, "global") else device_id
            self.needs[device, resource.name] = resource.count
        self.priority: int = max(limits.priority, 1)  # 0 is not set
        self.run_count = 0
        self.granted = False
        self.on_grant: Callable[[], None] | None = None  # it waits in line

    @property
    def turn(self) -> int:
        """The smallest is first."""
        return self.run_count * self.priority


class RateLimiter:
    """Tickets are registered and taken back in the loader pool; all else is done on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, available: Resources | None = None) -> None:
        """`available`: as --rate-limit-resource says. Without it there is of each resource what the instance that
        needs most of it needs."""
        self._loop = loop
        self._available = available or {}
        self._lock = Lock()  # around the two below
        self._tickets: list[Ticket] = []
        self._limits: dict[tuple[int, str], int] = {}  # replaced, never changed
        self._taken: dict[tuple[int, str], int] = {}
        self._line: list[tuple[int, int, Ticket]] = []
        self._number = count()
        self._advance_soon = False
        self._of_worker: dict[Worker, Ticket] = {}

    # In the loader pool

    def register(self, device_id: int, limits: Any) -> Ticket:
        """A ticket for an instance. Raises InvalidArgument, in Triton's words, where it could never run."""
        ticket = Ticket(device_id, limits)
        with self._lock:
            self._limits = self._limits_for([*self._tickets, ticket])
            self._tickets.append(ticket)
        return ticket

    def unregister(self, tickets: Iterable[Ticket]) -> None:
        """Those whose instances have gone. Whoever still waits in line is passed over."""
        gone = set(tickets)
        with self._lock:
            self._tickets = [ticket for ticket in self._tickets if ticket not in gone]
            self._limits = self._limits_for(self._tickets)
            self._of_worker = {worker: ticket for worker, ticket in self._of_worker.items() if ticket not in gone}
        for ticket in gone:
            ticket.on_grant = None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._advance)

    def assign(self, ticket: Ticket, worker: Worker) -> None:
        """Where the ticket's instance runs."""
        with self._lock:
            self._of_worker = {**{w: t for w, t in self._of_worker.items() if t is not ticket}, worker: ticket}

    def ticket_of(self, worker: Worker) -> Ticket:
        return self._of_worker[worker]

    def _limits_for(self, tickets: Iterable[Ticket]) -> dict[tuple[int, str], int]:
        needed: dict[tuple[int, str], int] = {}
        for ticket in tickets:
            for resource, amount in ticket.needs.items():
                needed[resource] = max(needed.get(resource, 0), amount)
        if self._available:
            for resource, amount in needed.items():
                device, name = resource
                there = self._there_is(device, name)
                if there < amount:
                    raise InvalidArgument(
                        f'Resource count for "{name}" is limited to {there} which will prevent scheduling of one or '
                        f"more model instances, the minimum required count is {amount}"
                    )
                needed[resource] = there
        for device, name in needed:
            if device != GLOBAL and (GLOBAL, name) in needed:
                raise InvalidArgument(
                    f'Resource "{name}" is present as both global and device-specific resource in the model '
                    "configuration."
                )
        return needed

    def _there_is(self, device: int, name: str) -> int:
        """As --rate-limit-resource says; what it does not name, there is none of."""
        places = self._available.values() if device == GLOBAL else map(self._at, (device, EVERY_DEVICE))
        return max((place.get(name, 0) for place in places), default=0)

    def _at(self, device: int) -> Mapping[str, int]:
        return self._available.get(device, {})

    # On the event loop

    def ask(self, ticket: Ticket, on_grant: Callable[[], None]) -> bool:
        """True: it may run now. False: `on_grant` is called when it may."""
        if not self._line and self._take(ticket):
            return True
        ticket.on_grant = on_grant
        heappush(self._line, (ticket.turn, next(self._number), ticket))
        self._advance()
        return ticket.granted

    def release(self, ticket: Ticket, *, has_run: bool = True) -> None:
        """Gives back what `ticket` has been granted."""
        for resource, amount in ticket.needs.items():
            self._taken[resource] -= amount
        ticket.granted = False
        if has_run:
            ticket.run_count += 1
        self._advance()

    def _advance(self) -> None:
        """In a turn of the loop of its own: granting runs models, which release and ask again."""
        if self._line and not self._advance_soon:
            self._advance_soon = True
            self._loop.call_soon(self._serve_line)

    def _serve_line(self) -> None:
        self._advance_soon = False
        line = self._line
        while line:
            ticket = line[0][2]
            on_grant = ticket.on_grant
            if on_grant is None:  # its instance has gone
                heappop(line)
            elif self._take(ticket):
                heappop(line)
                ticket.on_grant = None
                on_grant()
            else:
                return

    def _take(self, ticket: Ticket) -> bool:
        taken, limits = self._taken, self._limits
        for resource, amount in ticket.needs.items():
            if taken.get(resource, 0) + amount > limits.get(resource, 0):
                return False
        for resource, amount in ticket.needs.items():
            taken[resource] = taken.get(resource, 0) + amount
        ticket.granted = True
        return True

    def __repr__(self) -> str:
        return f"<RateLimiter {len(self._tickets)} instances, {len(self._line)} in line>"
