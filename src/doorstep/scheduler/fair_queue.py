"""Requests that wait for a slot: by priority, and in each priority by turns between those who ask (API keys), so that
nobody waits behind all that somebody else sent. Knows no clock, no worker and no tensor.

The policy of a level (how many, how long) is that of any model's queue (queue.py, ModelQueuePolicy in config.pbtxt).
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator

from doorstep.request import InferenceRequest
from doorstep.scheduler.queue import Priorities, QueuePolicy, queue_full

_FEW = 16  # places, or times, of those that are gone, which are not worth a tidying up


class FairQueue:
    """See the module. A request that waits has its `_Level` as its `slot`."""

    def __init__(self, default: QueuePolicy, priorities: Priorities) -> None:
        self._default = default
        self._priorities = priorities
        self._policies = dict(priorities.policies or {}) if priorities.levels else {}
        self._levels: dict[int, _Level] = {}  # those with requests
        self._expiries: list[tuple[int, int, InferenceRequest]] = []  # a heap; of those that left, too
        self._order = itertools.count()  # so that requests are never compared

    def __len__(self) -> int:
        return sum(level.size for level in self._levels.values())

    def __iter__(self) -> Iterator[InferenceRequest]:
        """In no order."""
        for level in self._levels.values():
            yield from level

    @property
    def limit(self) -> int:
        """How many may wait; 0: any number."""
        bounds = [policy.max_size for policy in self._policies.values()]
        others = max(self._priorities.levels, 1) - len(bounds)
        bounds += [self._default.max_size] * max(others, 0)
        return sum(bounds) if all(bounds) else 0

    def append(self, request: InferenceRequest) -> int:
        """Returns when it has to be looked at again, 0 for never. Raises QueueRejected where its level is full."""
        number = self._priorities.level_of(request)
        policy = self._policies.get(number, self._default)
        level = self._levels.get(number)
        if policy.max_size and level is not None and level.size >= policy.max_size:
            raise queue_full(request)
        if level is None:
            level = self._levels[number] = _Level(policy)
        level.append(request)
        expires_ns = _first(policy.expires_ns(request), request.deadline_ns)
        if expires_ns:
            if len(self._expiries) > 2 * len(self) + _FEW:  # most of them ran, or left
                self._expiries = [entry for entry in self._expiries if _waits(entry[2])]
                heapq.heapify(self._expiries)
            self._will_expire(expires_ns, request)
        return expires_ns

    def _will_expire(self, expires_ns: int, request: InferenceRequest) -> None:
        heapq.heappush(self._expiries, (expires_ns, next(self._order), request))

    def popleft(self) -> InferenceRequest | None:
        """The next one: of the highest priority, of whoever has waited longest for a turn."""
        for number in sorted(self._levels):
            level = self._levels[number]
            request = level.popleft()
            if not level.size:
                del self._levels[number]
            if request is not None:
                return request
        return None

    def remove(self, request: InferenceRequest) -> bool:
        """False: it is not here.

        Its place stays until its turn comes, or until half of the places are such: clients that come and leave while
        nobody else's turn ends are not kept."""
        level = request.slot
        if not isinstance(level, _Level):
            return False
        level.remove(request)
        return True

    def expire(self, now_ns: int) -> tuple[list[InferenceRequest], int]:
        """Takes out those that have waited too long (where the policy says DELAY they go behind the others instead),
        and says when the next will have, 0 for never."""
        over: list[InferenceRequest] = []
        while self._expiries and (self._expiries[0][0] <= now_ns or not _waits(self._expiries[0][2])):
            _, _, request = heapq.heappop(self._expiries)
            level = request.slot
            if not isinstance(level, _Level):
                continue
            if level.policy.delays and not 0 < request.deadline_ns <= now_ns:
                level.delay(request)
                if request.deadline_ns:
                    self._will_expire(request.deadline_ns, request)
            else:
                self.remove(request)
                over.append(request)
        return over, self._expiries[0][0] if self._expiries else 0

    def __repr__(self) -> str:
        return f"<FairQueue {', '.join(f'{n}: {level.size}' for n, level in sorted(self._levels.items())) or 'empty'}>"


class _Level:
    """One priority."""

    __slots__ = ("_delayed", "_gone", "_turns", "policy", "size")

    def __init__(self, policy: QueuePolicy) -> None:
        self.policy = policy
        self.size = 0  # without those that were taken out, whose places stay
        self._gone = 0  # such places
        self._turns: OrderedDict[str, deque[InferenceRequest]] = OrderedDict()  # who is next comes first
        self._delayed: deque[InferenceRequest] = deque()

    def __iter__(self) -> Iterator[InferenceRequest]:
        for waiting in (*self._turns.values(), self._delayed):
            yield from (request for request in waiting if request.slot is self)

    def append(self, request: InferenceRequest) -> None:
        request.slot = self
        self.size += 1
        self._turns.setdefault(request.tenant, deque()).append(request)

    def remove(self, request: InferenceRequest) -> None:
        request.slot = None
        self.size -= 1
        self._gone += 1
        if self._gone > self.size + _FEW:
            self._close_up()

    def _close_up(self) -> None:
        """Gives up the places of those that are gone."""
        kept = ((tenant, deque(r for r in waiting if r.slot is self)) for tenant, waiting in self._turns.items())
        self._turns = OrderedDict((tenant, waiting) for tenant, waiting in kept if waiting)
        self._delayed = deque(r for r in self._delayed if r.slot is self)
        self._gone = 0

    def delay(self, request: InferenceRequest) -> None:
        """Behind all the others; its old place is nobody's."""
        self._turns[request.tenant].remove(request)
        self._delayed.append(request)

    def popleft(self) -> InferenceRequest | None:
        while self._turns:
            tenant, waiting = self._turns.popitem(last=False)
            while waiting:
                request = waiting.popleft()
                if request.slot is self:
                    if waiting:
                        self._turns[tenant] = waiting  # at the end
                    self._taken(request)
                    return request
                self._gone -= 1
        while self._delayed:
            request = self._delayed.popleft()
            if request.slot is self:
                self._taken(request)
                return request
            self._gone -= 1
        return None

    def _taken(self, request: InferenceRequest) -> None:
        request.slot = None
        self.size -= 1


def _waits(request: InferenceRequest) -> bool:
    return isinstance(request.slot, _Level)


def _first(*times_ns: int) -> int:
    """The earliest of those that are not 0."""
    return min((ns for ns in times_ns if ns), default=0)
