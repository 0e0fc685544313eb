"""When to run a batch, and which requests are in it. Knows no clock, no thread, no tensor.

The rule is Triton's dynamic batcher's (GetDynamicBatch in core): requests are taken in order, never split; the largest
preferred size that can be had is sent at once; otherwise a batch waits for company until its oldest request has waited
`max_delay_ns`, and then takes all that fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


class Queued(Protocol):
    """What a decision needs to know of a request."""

    rows: int
    batch_key: object
    queued_ns: int


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    max_rows: int  # the model's max_batch_size; 0: it has no batch dimension and requests run alone
    preferred_rows: frozenset[int] = frozenset()
    max_delay_ns: int = 0
    together: bool = True  # False: every request is a batch of its own
    # The largest preferred size: a batch that has got so far does not wait for more, and one that would go beyond it
    # is cut before that, unless it is overdue.
    largest_rows: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "largest_rows", max(self.preferred_rows, default=self.max_rows))


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Run the first `count` requests, now."""

    count: int


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Ask again then, or when another request arrives."""

    ns: int


_DISPATCH = tuple(Dispatch(count) for count in range(257))  # made once: a decision is made for every batch
_ALONE = _DISPATCH[1]


def plan(queue: Iterable[Queued], now_ns: int, policy: BatchPolicy) -> Dispatch | WaitUntil | None:
    """What to do with `queue`, in the order its requests would run, without cancelled ones, while an instance is idle.

    None: the queue is empty. A single request larger than `max_rows` is sent alone; refusing it is validation's task.
    """
    waiting = iter(queue)
    first = next(waiting, None)
    if first is None:
        return None
    if not policy.together:
        return _ALONE
    max_rows = policy.max_rows
    preferred = policy.preferred_rows
    largest = policy.largest_rows
    delay_ns = policy.max_delay_ns
    rows = first.rows
    count = 1
    best = 1 if rows in preferred else 0  # requests of the best size so far; what goes beyond it waits for more
    oldest_ns = first.queued_ns
    closed = rows >= max_rows  # nothing more can join
    if not closed:
        key = first.batch_key
        for request in waiting:
            grown = rows + request.rows
            if grown > largest and not best:
                best = count
            if grown > max_rows or request.batch_key != key:
                closed = True
                break
            rows = grown
            count += 1
            if delay_ns and request.queued_ns < oldest_ns:  # by priority, the first need not be the oldest
                oldest_ns = request.queued_ns
            if rows in preferred:
                best = count
            if rows >= max_rows:
                break
    due_ns = oldest_ns + delay_ns
    overdue = delay_ns != 0 and now_ns >= due_ns
    if best and not overdue:
        return _dispatch(best)
    if closed or overdue or not delay_ns or rows >= largest:
        return _dispatch(count)
    return WaitUntil(due_ns)


def _dispatch(count: int) -> Dispatch:
    return _DISPATCH[count] if count < len(_DISPATCH) else Dispatch(count)
