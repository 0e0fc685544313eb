"""Priorities and queue policies: Triton core's PriorityQueue, as tables. Times are the test's own numbers."""

from __future__ import annotations

import random
from typing import Any

import pytest

from doorstep.errors import ErrorCode, FailureReason, QueueRejected
from doorstep.request import InferenceRequest
from doorstep.scheduler.delays import backlog_delay, scheduler_delay
from doorstep.scheduler.queue import Priorities, PriorityQueue, QueuePolicy


class Nobody:
    def send(self, response: Any, final: bool) -> None: ...


def request(name: str, *, priority: int = 0, timeout_us: int = 0, at_ns: int = 0) -> InferenceRequest:
    found = InferenceRequest("m", {}, Nobody(), id=name)
    found.priority, found.timeout_us, found.queued_ns = priority, timeout_us, at_ns
    return found


def ids(requests: Any) -> str:
    return "".join(r.id for r in requests)


THREE = Priorities(3, 2)
REJECT = QueuePolicy(default_timeout_ns=10_000)
DELAY = QueuePolicy(default_timeout_ns=10_000, delays=True)
OVERRIDE = QueuePolicy(default_timeout_ns=10_000, allow_override=True)


@pytest.mark.parametrize(
    ("priorities", "expected"),
    [
        ([1, 1, 1], "abc"),
        ([3, 2, 1], "cba"),
        ([2, 1, 2], "bac"),
        ([0, 3, 1], "cab"),  # 0 is the default, 2
        ([4, 1, 3], "bac"),  # out of range is the default, and no error
        ([2**64 - 1, 3, 2], "acb"),
    ],
)
def test_the_highest_priority_runs_first_and_equals_run_in_order(priorities: list[int], expected: str) -> None:
    queue = PriorityQueue(QueuePolicy(), THREE)
    for name, priority in zip("abc", priorities, strict=True):
        queue.append(request(name, priority=priority))
    assert ids(queue.walk(0)) == expected
    assert len(queue) == 3
    assert "".join(queue.popleft().id for _ in range(3)) == expected
    assert not queue
    with pytest.raises(IndexError):
        queue.popleft()


@pytest.mark.parametrize(
    ("policy", "timeout_us", "expires_ns"),
    [
        (QueuePolicy(), 5, 0),
        (QueuePolicy(allow_override=True), 5, 0),  # only shorter than the default counts, and there is no default
        (REJECT, 5, 10_100),
        (OVERRIDE, 5, 5_100),
        (OVERRIDE, 0, 10_100),
        (OVERRIDE, 10, 10_100),
        (OVERRIDE, 11, 10_100),
        (OVERRIDE, 2**64 - 1, 10_100),
    ],
)
def test_when_a_request_expires(policy: QueuePolicy, timeout_us: int, expires_ns: int) -> None:
    assert policy.expires_ns(request("a", timeout_us=timeout_us, at_ns=100)) == expires_ns


def test_reject_takes_out_who_has_waited_too_long() -> None:
    queue = PriorityQueue(OVERRIDE, Priorities())
    assert queue.append(request("a")) == 10_000
    assert queue.append(request("b", timeout_us=2)) == 2_000
    assert queue.append(request("c", at_ns=5_000)) == 15_000
    assert queue.expire(2_000) == 2_000, "not before the time is over"
    assert (queue.expire(2_001), ids(queue.rejected), len(queue)) == (10_000, "b", 2)
    assert (queue.expire(16_000), ids(queue.rejected), len(queue)) == (0, "bac", 0)


def test_reject_also_when_a_batch_is_looked_for() -> None:
    queue = PriorityQueue(OVERRIDE, Priorities())
    for one in (request("a", timeout_us=1), request("b"), request("c", timeout_us=1)):
        queue.append(one)
    walk = queue.walk(5_000)
    assert next(walk).id == "b"
    assert (ids(queue.rejected), len(queue)) == ("a", 2), "c has not been looked at"
    assert ids(walk) == ""
    assert (ids(queue.rejected), len(queue)) == ("ac", 1)


def test_delay_goes_behind_the_others_of_its_level_and_before_the_next() -> None:
    queue = PriorityQueue(QueuePolicy(), Priorities(2, 1, {1: DELAY}))
    assert queue.append(request("a", priority=1)) == 10_000
    queue.append(request("b", priority=1, at_ns=5_000))
    queue.append(request("x", priority=2))
    assert ids(queue.walk(10_001)) == "bax"
    assert queue.expire(10_002) == 15_000
    assert queue.rejected == []
    queue.append(request("c", priority=1, at_ns=10_001))
    assert ids(queue.walk(10_002)) == "bcax"
    assert "".join(queue.popleft().id for _ in range(4)) == "bcax"


def test_delay_moves_a_request_when_its_time_is_over() -> None:
    """Those before it may be a batch of a preferred size without it."""
    queue = PriorityQueue(DELAY, Priorities(2, 2, {1: QueuePolicy(default_timeout_ns=20_000)}))
    for one in (request("a"), request("b", at_ns=5_000), request("x", priority=1)):
        queue.append(one)
    assert queue.expire(10_001) == 15_000
    assert (ids(queue.walk(10_001)), len(queue)) == ("xba", 3)
    assert queue.expire(15_001) == 20_000
    assert (ids(queue.walk(15_001)), ids(queue.rejected)) == ("xab", "")
    assert queue.expire(20_001) == 0
    assert (ids(queue.walk(20_001)), ids(queue.rejected), len(queue)) == ("ab", "x", 2)


def test_delay_moves_a_request_when_its_place_is_looked_at() -> None:
    queue = PriorityQueue(QueuePolicy(default_timeout_ns=10_000, allow_override=True, delays=True), Priorities())
    for one in (request("a"), request("b", timeout_us=9), request("c", timeout_us=1), request("d", timeout_us=10)):
        queue.append(one)
    assert next(queue.walk(5_000)).id == "a"
    assert queue.popleft().id == "a"
    assert ids(queue.walk(9_500)) == "dbc", "c expired first, but b's place came first"


def test_a_level_has_a_bound_of_its_own_and_delayed_requests_count() -> None:
    queue = PriorityQueue(QueuePolicy(max_size=1), Priorities(2, 1, {1: QueuePolicy(2, 10_000, delays=True)}))
    assert queue.limit == 3
    queue.append(request("a", priority=1))
    queue.append(request("b", priority=1))
    assert ids(queue.walk(20_000)) == "ab"
    queue.append(request("x", priority=2))
    for priority in (1, 2):
        with pytest.raises(QueueRejected, match=r"^\[request id: c\] Exceeds maximum queue size$") as caught:
            queue.append(request("c", priority=priority))
        assert (caught.value.code, caught.value.reason) == (ErrorCode.UNAVAILABLE, FailureReason.REJECTED)
    assert len(queue) == 3
    assert queue.popleft().id == "a"
    queue.append(request("c", priority=1))


def test_without_levels_the_policies_of_levels_mean_nothing() -> None:
    queue = PriorityQueue(REJECT, Priorities(0, 0, {1: DELAY}))
    for name in "ab":
        assert queue.append(request(name, priority=1)) == 10_000
    assert queue.expire(10_001) == 0
    assert ids(queue.rejected) == "ab"


def test_remove_finds_a_request_wherever_it_is() -> None:
    queue = PriorityQueue(DELAY, THREE)
    a, b, c, x = (
        request(n, priority=p, at_ns=t) for n, p, t in (("a", 1, 0), ("b", 1, 9_000), ("c", 1, 9_000), ("x", 3, 0))
    )
    for one in (a, b, c, x):
        queue.append(one)
    assert ids(queue.walk(12_000)) == "bcax"
    assert [queue.remove(one) for one in (a, b, x, x)] == [True, True, True, False]
    assert (ids(queue.walk(0)), len(queue)) == ("c", 1)


def test_levels_take_memory_only_while_they_have_requests() -> None:
    queue = PriorityQueue(REJECT, Priorities(2**64 - 1, 1))
    for priority in range(1, 500):
        queue.append(request("a", priority=priority * 10**15))
    queue.popleft()
    assert len(queue._levels) == 498
    queue.expire(10_001)
    assert (len(queue), queue._levels, queue._order) == (0, {}, [])


def test_what_is_put_back_comes_last_and_does_not_expire() -> None:
    queue = PriorityQueue(QueuePolicy(max_size=1, default_timeout_ns=1), THREE)
    queue.put_back(request("a", priority=1))
    queue.put_back(request("b", priority=1))
    assert queue.expire(10_000) == 0
    assert ids(queue.walk(10_000)) == "ab"


@pytest.mark.parametrize(("value", "expected"), [("", 0), ("8", 8), (" 12x", 12), ("-3", 0), ("many", 0)])
def test_the_variables_of_tests_are_read_as_atoi_does(monkeypatch: Any, value: str, expected: int) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", value)
    monkeypatch.setenv("TRITONSERVER_BACKLOG_DELAY_SCHEDULER", value)
    assert (scheduler_delay(), backlog_delay()) == (expected, expected)


@pytest.mark.parametrize("seed", range(20))
def test_requests_that_are_taken_out_leave_the_others_as_they_were(seed: int) -> None:
    """Against lists, in any order of what can happen: places of those taken out are given up later, and unseen."""
    draw = random.Random(seed)
    queue = PriorityQueue(DELAY if seed % 2 else REJECT, THREE)
    levels: dict[int, list[InferenceRequest]] = {1: [], 2: [], 3: []}
    for number in range(600):
        waiting = [r for level in levels.values() for r in level]
        action = draw.random()
        if action < 0.5 or not waiting:
            one = request(str(number), priority=draw.randint(1, 3))
            queue.append(one)
            levels[one.priority].append(one)
        elif action < 0.85:
            one = draw.choice(waiting)
            assert queue.remove(one)
            assert not queue.remove(one)
            levels[one.priority].remove(one)
        else:
            one = queue.popleft()
            assert one is waiting[0]
            levels[one.priority].remove(one)
        if draw.random() < 0.1:
            assert queue.expire(1) == (10_000 if queue else 0)
        expected = [r.id for level in levels.values() for r in level]
        assert len(queue) == len(expected)
        if draw.random() < 0.2:
            assert [r.id for r in queue.walk(1)] == expected


def test_what_has_expired_can_be_taken_out_too() -> None:
    queue = PriorityQueue(DELAY, THREE)
    requests = [request(name) for name in "abcd"]
    for one in requests:
        queue.append(one)
    assert ids(queue.walk(20_000)) == "abcd"  # all delayed now
    assert queue.remove(requests[1])
    assert ids(queue.walk(20_000)) == "acd"
    assert "".join(queue.popleft().id for _ in range(3)) == "acd"
    assert not queue
