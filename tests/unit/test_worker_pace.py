"""When a worker process stays awake for its next batch: by a clock of the test's own."""

from __future__ import annotations

import pytest

from doorstep.workers import pace
from doorstep.workers.pace import Pace

US = 1000


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ns = 10**12
        monkeypatch.setattr(pace, "monotonic_ns", lambda: self.ns)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(it: Pace, clock: Clock, waited_us: int, count: int = 1) -> int:
    """A batch that came so long after the last one ended; how long to stay awake after it, in µs."""
    clock.ns += waited_us * US
    it.begin(count)
    clock.ns += 20 * US
    it.end()
    return it.awake_ns // US


def test_it_stays_awake_while_single_requests_follow_each_other_closely(clock: Clock) -> None:
    it = Pace(200)
    assert run(it, clock, 1_000_000) == 0  # the first after a pause
    assert run(it, clock, 300) == 200  # close, for one that had to be woken
    assert run(it, clock, 90) == 200
    assert run(it, clock, 1_000_000) == 0


def test_batches_of_several_requests_let_it_sleep(clock: Clock) -> None:
    it = Pace(200)
    run(it, clock, 1_000_000)
    assert run(it, clock, 50, count=4) == 0
    assert run(it, clock, 50) == 200


def test_after_it_stayed_awake_in_vain_it_sleeps_for_a_while(clock: Clock) -> None:
    it = Pace(200)
    run(it, clock, 1_000_000)
    assert run(it, clock, 300) == 200
    assert run(it, clock, 250) == 0  # 50 µs too late
    slept = 0
    while run(it, clock, 100) == 0:
        slept += 1
    assert slept == pace._PATIENCE - 1


def test_it_can_be_told_never_to(clock: Clock) -> None:
    it = Pace(0)
    assert [run(it, clock, 10) for _ in range(5)] == [0] * 5
