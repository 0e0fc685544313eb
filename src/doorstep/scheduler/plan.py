"""When to run a batch, and which requests are in it. Knows no clock, no thread, no tensor.

The rule is Triton's dynamic batcher's (model_configuration.md, "Dynamic Batcher"): requests are taken in order, never
split; the largest preferred size that can be had is sent at once; otherwise a batch waits for company until its oldest
request has waited `max_delay_ns`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
    """What to do with `queue`, oldest first and free of cancelled requests, while an instance is idle.

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
    rows = first.rows
    count = 1
    preferred_count = 1 if rows in preferred else 0
    closed = rows >= max_rows  # nothing more can join
    if not closed:
        key = first.batch_key
        for request in waiting:
            grown = rows + request.rows
            if grown > max_rows or request.batch_key != key:
                closed = True
                break
            rows = grown
            count += 1
            if rows in preferred:
                preferred_count = count
        closed = closed or rows >= max_rows
    if preferred_count:
        return _dispatch(preferred_count)
    due_ns = first.queued_ns + policy.max_delay_ns
    if closed or now_ns >= due_ns:
        return _dispatch(count)
    return WaitUntil(due_ns)


def _dispatch(count: int) -> Dispatch:
    return _DISPATCH[count] if count < len(_DISPATCH) else Dispatch(count)
