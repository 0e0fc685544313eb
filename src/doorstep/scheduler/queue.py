"""Requests that wait by priority, each level under a policy of its own. Knows no clock, no worker and no tensor.

The rules are Triton core's (scheduler_utils.cc): level 1 before level 2; in a level those whose timeout has expired
come last, where the policy says DELAY, and are refused where it says REJECT. An expired request moves when somebody
looks at its place, not before. A model with one level and no timeouts needs none of this: its queue is a deque.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from doorstep.errors import QueueRejected
from doorstep.request import InferenceRequest

TIMEOUT_EXPIRED = "Request timeout expired"  # Triton's


def queue_full(request: InferenceRequest) -> QueueRejected:
    """In Triton's words, which here begin with the request's id."""
    return QueueRejected(f"[request id: {request.id or '<id_unknown>'}] Exceeds maximum queue size")


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How long, and how many, requests may wait (ModelQueuePolicy in config.pbtxt)."""

    max_size: int = 0  # 0: no bound of its own
    default_timeout_ns: int = 0  # 0: none
    allow_override: bool = False  # a request's own `timeout` counts where it is shorter than the default
    delays: bool = False  # the action DELAY: who has waited too long goes behind the others. Else it is refused

    @property
    def has_timeouts(self) -> bool:
        """A request's own timeout can only shorten the default, so without one there is none."""
        return self.default_timeout_ns > 0

    def expires_ns(self, request: InferenceRequest) -> int:
        """When its timeout expires; 0: never."""
        timeout_ns = self.default_timeout_ns
        if self.allow_override and 0 < request.timeout_us * 1000 < timeout_ns:
            timeout_ns = request.timeout_us * 1000
        return request.queued_ns + timeout_ns if timeout_ns else 0


@dataclass(frozen=True, slots=True)
class Priorities:
    """The levels of a model's queue; 1 is the highest."""

    levels: int = 0  # 0: all requests are equal
    default_level: int = 0
    policies: Mapping[int, QueuePolicy] | None = None  # where they differ from the default one

    def level_of(self, request: InferenceRequest) -> int:
        """What is out of range means the default, as in Triton."""
        return request.priority if 0 < request.priority <= self.levels else self.default_level


class PriorityQueue:
    """See the module. `rejected` gathers those whose timeout had expired when their turn came: the caller answers
    them."""

    def __init__(self, default: QueuePolicy, priorities: Priorities) -> None:
        self.rejected: list[InferenceRequest] = []
        self._default = default
        self._priorities = priorities
        self._policies = dict(priorities.policies or {}) if priorities.levels else {}
        self._levels: dict[int, _Level] = {}  # those with requests
        self._order: list[int] = []  # their numbers, highest priority first
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def limit(self) -> int:
        """How many may wait; 0: any number."""
        bounds = [policy.max_size for policy in self._policies.values()]
        others = max(self._priorities.levels, 1) - len(bounds)
        if others:
            bounds.append(self._default.max_size * others)
        return sum(bounds) if all(bounds) else 0

    def append(self, request: InferenceRequest) -> int:
        """Returns when it has to be looked at again, 0 for never. Raises QueueRejected where its level is full."""
        number = self._priorities.level_of(request)
        policy = self._policies.get(number, self._default)
        if policy.max_size and number in self._levels and len(self._levels[number]) >= policy.max_size:
            raise queue_full(request)
        expires_ns = policy.expires_ns(request)
        self._put(request, number, expires_ns)
        return expires_ns

    def _level(self, number: int) -> _Level:
        level = self._levels.get(number)
        if level is None:
            level = self._levels[number] = _Level(number, self._policies.get(number, self._default))
            insort(self._order, number)
        return level

    def put_back(self, request: InferenceRequest) -> None:
        """One that has run, and is to run again: it was let in once, and its time in the queue is over."""
        self._put(request, self._priorities.level_of(request), 0)

    def _put(self, request: InferenceRequest, number: int, expires_ns: int) -> None:
        level = request.slot = self._level(number)
        level.waiting.append(request)
        level.expiries.append(expires_ns)
        self._size += 1

    def walk(self, now_ns: int) -> Iterator[InferenceRequest]:
        """The requests in the order in which `popleft` gives them. Whoever is looked at and has expired is moved."""
        for number in tuple(self._order):
            level = self._levels[number]
            at = 0
            while at < len(level.waiting):
                if level.waiting[at].slot is not level:
                    level.pop(at)
                    level.gone -= 1
                elif 0 < level.expiries[at] < now_ns:
                    request = level.pop(at)
                    if level.policy.delays:
                        level.delayed.append(request)
                    else:
                        self._size -= 1
                        request.slot = None
                        self.rejected.append(request)
                else:
                    yield level.waiting[at]
                    at += 1
            yield from [request for request in level.delayed if request.slot is level]
            self._forget_empty(number)

    def popleft(self) -> InferenceRequest:
        """Raises IndexError where there is none."""
        for number in self._order:
            level = self._levels[number]
            while level.waiting or level.delayed:
                request = level.pop(0) if level.waiting else level.delayed.popleft()
                if request.slot is not level:
                    level.gone -= 1
                    continue
                request.slot = None
                self._size -= 1
                self._forget_empty(number)
                return request
        raise IndexError("no request waits")

    def remove(self, request: InferenceRequest) -> bool:
        """Takes it out, wherever it is. False: it is not here.

        Its place stays until somebody passes it, or until half of the places are such: a client that leaves with
        thousands of requests is not looked for thousands of times."""
        level = request.slot
        if not isinstance(level, _Level):
            return False
        request.slot = None
        level.gone += 1
        self._size -= 1
        if level.gone * 2 > len(level.waiting) + len(level.delayed):
            level.close_up()
        self._forget_empty(level.number)
        return True

    def expire(self, now_ns: int) -> int:
        """Moves all that have waited too long, to `rejected` or behind the others of their level: what is left may be a
        batch. Returns when the next one will have waited too long, 0 for never."""
        next_ns = 0
        for number in tuple(self._order):
            level = self._levels[number]
            level.close_up()
            over = [r for r, at_ns in zip(level.waiting, level.expiries, strict=True) if 0 < at_ns < now_ns]
            if over:
                level.keep(lambda expires_ns: not 0 < expires_ns < now_ns)
                if level.policy.delays:
                    level.delayed.extend(over)
                else:
                    for request in over:
                        request.slot = None
                    self.rejected += over
                    self._size -= len(over)
            for at_ns in level.expiries:
                if at_ns and (not next_ns or at_ns < next_ns):
                    next_ns = at_ns
            self._forget_empty(number)
        return next_ns

    def _forget_empty(self, number: int) -> None:
        """A client may name as many levels as there are; only those with requests take memory."""
        level = self._levels.get(number)
        if level is not None and not len(level):
            del self._levels[number]
            self._order.remove(number)

    def __repr__(self) -> str:
        return f"<PriorityQueue {', '.join(f'{n}: {len(self._levels[n])}' for n in self._order) or 'empty'}>"


class _Level:
    """One priority: `waiting` with the times they expire, and those that have expired and still may run.

    A request that waits here has the level as its `slot`; the place of one that was taken out is still held."""

    __slots__ = ("delayed", "expiries", "gone", "number", "policy", "waiting")

    def __init__(self, number: int, policy: QueuePolicy) -> None:
        self.number = number
        self.policy = policy
        self.gone = 0  # places of requests that were taken out
        self.waiting: deque[InferenceRequest] = deque()
        self.expiries: deque[int] = deque()
        self.delayed: deque[InferenceRequest] = deque()

    def __len__(self) -> int:
        return len(self.waiting) + len(self.delayed) - self.gone

    def close_up(self) -> None:
        """Gives up the places of those that are gone."""
        if self.gone:
            places = [(r, at_ns) for r, at_ns in zip(self.waiting, self.expiries, strict=True) if r.slot is self]
            self.waiting = deque(r for r, _ in places)
            self.expiries = deque(at_ns for _, at_ns in places)
            self.delayed = deque(r for r in self.delayed if r.slot is self)
            self.gone = 0

    def keep(self, wanted: Callable[[int], bool]) -> None:
        """Only those whose time of expiry is wanted go on waiting."""
        places = [(r, at_ns) for r, at_ns in zip(self.waiting, self.expiries, strict=True) if wanted(at_ns)]
        self.waiting = deque(r for r, _ in places)
        self.expiries = deque(at_ns for _, at_ns in places)

    def pop(self, at: int) -> InferenceRequest:
        request = self.waiting[at]
        del self.waiting[at], self.expiries[at]
        return request
