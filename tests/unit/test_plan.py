"""The batching rule, as a table."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from doorstep.scheduler.plan import BatchPolicy, Dispatch, WaitUntil, plan


@dataclass
class Waiting:
    rows: int
    batch_key: object = None
    queued_ns: int = 0


def queue(*rows: int, keys: str = "") -> list[Waiting]:
    return [Waiting(r, keys[i] if keys else None, queued_ns=i) for i, r in enumerate(rows)]


AT_ONCE = BatchPolicy(max_rows=8)
PATIENT = BatchPolicy(max_rows=8, max_delay_ns=100)
CHOOSY = BatchPolicy(max_rows=8, max_delay_ns=100, preferred_rows=frozenset({2, 4}))


@pytest.mark.parametrize(
    ("requests", "now", "policy", "expected"),
    [
        ([], 0, AT_ONCE, None),
        (queue(1), 0, AT_ONCE, Dispatch(1)),
        (queue(1, 1, 1), 0, AT_ONCE, Dispatch(3)),
        (queue(*[1] * 20), 0, AT_ONCE, Dispatch(8)),
        (queue(5, 3), 0, AT_ONCE, Dispatch(2)),
        (queue(5, 4), 0, AT_ONCE, Dispatch(1)),  # rows are counted, not requests, and none is split
        (queue(9), 0, AT_ONCE, Dispatch(1)),
        (queue(1, 1, 1, keys="aab"), 0, AT_ONCE, Dispatch(2)),  # shapes that cannot be stacked
        (queue(1, 1, 1, keys="aba"), 0, AT_ONCE, Dispatch(1)),  # order is kept: nobody is overtaken
        (queue(1), 50, PATIENT, WaitUntil(100)),
        (queue(1, 1), 50, PATIENT, WaitUntil(100)),  # the oldest request's delay counts
        (queue(1), 100, PATIENT, Dispatch(1)),
        (queue(4, 4), 0, PATIENT, Dispatch(2)),  # full: nothing to wait for
        (queue(4, 5), 0, PATIENT, Dispatch(1)),  # the next does not fit: nothing to wait for
        (queue(1, 1, keys="ab"), 0, PATIENT, Dispatch(1)),  # the next cannot be stacked: nothing to wait for
        (queue(1), 0, CHOOSY, WaitUntil(100)),
        (queue(1, 1), 0, CHOOSY, Dispatch(2)),
        (queue(1, 1, 1), 0, CHOOSY, Dispatch(2)),
        (queue(1, 1, 1, 1, 1), 0, CHOOSY, Dispatch(4)),  # the largest preferred size
        (queue(3), 0, CHOOSY, WaitUntil(100)),
        (queue(3), 100, CHOOSY, Dispatch(1)),
        (queue(1, 1), 0, BatchPolicy(max_rows=0, together=False), Dispatch(1)),
    ],
)
def test_plan(requests: list[Waiting], now: int, policy: BatchPolicy, expected: object) -> None:
    assert plan(requests, now, policy) == expected


def test_oldest_request_is_never_held_past_its_delay() -> None:
    for now in range(300):
        decision = plan([Waiting(1, queued_ns=150), Waiting(1, queued_ns=160)], now, PATIENT)
        assert decision == (Dispatch(2) if now >= 250 else WaitUntil(250))
