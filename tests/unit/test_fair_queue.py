"""Who waits for a slot and who is next: priorities, turns between tenants, timeouts, as tables. Times are numbers."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from doorstep.errors import QueueRejected
from doorstep.request import InferenceRequest
from doorstep.scheduler.fair_queue import FairQueue
from doorstep.scheduler.queue import Priorities, QueuePolicy


class Nobody:
    def send(self, response: Any, final: bool) -> None: ...


class Request(InferenceRequest):
    """One that can be seen to be gone."""

    __slots__ = ("__weakref__",)


def request(name: str, *, tenant: str = "", priority: int = 0, at_ns: int = 0, deadline_ns: int = 0,
            timeout_us: int = 0) -> InferenceRequest:  # fmt: skip
    found = Request("m", {}, Nobody(), id=name)
    found.tenant, found.priority, found.queued_ns = tenant, priority, at_ns
    found.deadline_ns, found.timeout_us = deadline_ns, timeout_us
    return found


def fair(policy: QueuePolicy | None = None, priorities: Priorities | None = None) -> FairQueue:
    return FairQueue(policy or QueuePolicy(), priorities or Priorities())


def drain(queue: FairQueue) -> str:
    found = []
    while (one := queue.popleft()) is not None:
        found.append(one.id)
    assert len(queue) == 0
    return " ".join(found)


@pytest.mark.parametrize(
    ("arriving", "order"),
    [
        ("a1 a2 a3", "a1 a2 a3"),  # one tenant: first come, first served
        ("a1 a2 a3 b1", "a1 b1 a2 a3"),  # b need not wait for all of a's
        ("a1 a2 a3 b1 b2 c1", "a1 b1 c1 a2 b2 a3"),
        ("b1 a1 a2 b2", "b1 a1 b2 a2"),
        ("a1 b1 a2 b2 a3 b3", "a1 b1 a2 b2 a3 b3"),
    ],
)
def test_tenants_take_turns(arriving: str, order: str) -> None:
    queue = fair()
    for name in arriving.split():
        queue.append(request(name, tenant=name[0]))
    assert drain(queue) == order


def test_who_comes_back_goes_to_the_end_of_the_turns() -> None:
    queue = fair()
    for name in ("a1", "b1", "c1"):
        queue.append(request(name, tenant=name[0]))
    first = queue.popleft()
    assert first is not None
    assert first.id == "a1"
    queue.append(request("a2", tenant="a"))
    assert drain(queue) == "b1 c1 a2"


def test_priorities_go_before_turns() -> None:
    queue = fair(priorities=Priorities(3, 2))
    for name, priority in (("a1", 3), ("a2", 2), ("b1", 1), ("c1", 0), ("a3", 1), ("d1", 99)):
        queue.append(request(name, tenant=name[0], priority=priority))
    assert drain(queue) == "b1 a3 a2 c1 d1 a1"  # 0 and 99 are the default, 2


@pytest.mark.parametrize(
    ("default", "levels", "policies", "limit"),
    [
        (0, 0, {}, 0),
        (5, 0, {}, 5),
        (5, 3, {}, 15),
        (5, 3, {1: 2}, 12),
        (0, 3, {1: 2}, 0),  # one level without a bound
        (5, 1, {1: 7}, 7),
    ],
)
def test_how_many_may_wait(default: int, levels: int, policies: dict[int, int], limit: int) -> None:
    made = {level: QueuePolicy(max_size=size) for level, size in policies.items()}
    assert fair(QueuePolicy(max_size=default), Priorities(levels, 1 if levels else 0, made)).limit == limit


def test_a_full_level_refuses_and_others_do_not() -> None:
    queue = fair(QueuePolicy(max_size=2), Priorities(2, 2))
    gone = request("a2", tenant="b")
    for one in (request("a1", tenant="a"), gone):
        queue.append(one)
    with pytest.raises(QueueRejected, match="Exceeds maximum queue size"):
        queue.append(request("a3", tenant="c"))
    queue.append(request("urgent", priority=1))
    assert queue.remove(gone)
    queue.append(request("a4", tenant="a"))
    assert drain(queue) == "urgent a1 a4"


def test_one_that_left_is_passed_over_and_counted_no_more() -> None:
    queue = fair()
    waiting = [request(name, tenant=name[0]) for name in ("a1", "a2", "b1")]
    for one in waiting:
        queue.append(one)
    assert queue.remove(waiting[0])
    assert not queue.remove(waiting[0])
    assert not queue.remove(request("stranger"))
    assert [one.id for one in queue] == ["a2", "b1"]
    assert len(queue) == 2
    assert drain(queue) == "a2 b1"


@pytest.mark.parametrize("timeout_ns", [0, 10**12])
def test_those_who_come_and_leave_while_nobody_runs_are_not_kept(timeout_ns: int) -> None:
    """A client that sends and breaks off, again and again, behind a long answer."""
    queue = fair(QueuePolicy(default_timeout_ns=timeout_ns))
    queue.append(request("first", tenant="a"))
    seen: list[weakref.ref[InferenceRequest]] = []
    for number in range(1000):
        one = request("", tenant=f"t{number % 7}")
        queue.append(one)
        queue.remove(one)
        seen.append(weakref.ref(one))
    del one
    assert sum(ref() is not None for ref in seen) < 100
    queue.append(request("last", tenant="a"))
    assert drain(queue) == "first last"


def test_those_who_ran_are_not_kept_until_they_would_have_expired() -> None:
    queue = fair(QueuePolicy(default_timeout_ns=10**12))
    seen: list[weakref.ref[InferenceRequest]] = []
    for _ in range(1000):
        queue.append(request(""))
        one = queue.popleft()
        assert one is not None
        seen.append(weakref.ref(one))
    del one
    assert sum(ref() is not None for ref in seen) < 100


def test_timeouts_are_those_of_the_level_and_of_the_request() -> None:
    queue = fair(QueuePolicy(default_timeout_ns=100, allow_override=True), Priorities())
    assert queue.append(request("a", at_ns=1000)) == 1100
    assert queue.append(request("b", at_ns=1000, deadline_ns=1050)) == 1050
    assert queue.append(request("c", at_ns=1000, deadline_ns=5000)) == 1100
    assert fair().append(request("d")) == 0


def test_who_has_waited_too_long_is_taken_out() -> None:
    queue = fair(QueuePolicy(default_timeout_ns=100))
    for at_ns in (0, 50, 200):
        queue.append(request(str(at_ns), tenant=str(at_ns), at_ns=at_ns))
    over, next_ns = queue.expire(149)
    assert ([one.id for one in over], next_ns) == (["0"], 150)
    over, next_ns = queue.expire(150)
    assert ([one.id for one in over], next_ns) == (["50"], 300)
    assert drain(queue) == "200"
    assert queue.expire(10_000) == ([], 0)


def test_one_that_ran_or_left_does_not_expire() -> None:
    queue = fair(QueuePolicy(default_timeout_ns=100))
    ran, left = request("ran"), request("left")
    queue.append(ran)
    queue.append(left)
    assert queue.popleft() is ran
    queue.remove(left)
    assert queue.expire(1000) == ([], 0)


def test_where_the_policy_delays_they_go_behind_the_others() -> None:
    queue = fair(QueuePolicy(default_timeout_ns=100, delays=True))
    for name, at_ns in (("a1", 0), ("a2", 1000), ("b1", 1000)):
        queue.append(request(name, tenant=name[0], at_ns=at_ns))
    assert queue.expire(500)[0] == []
    assert len(queue) == 3
    assert drain(queue) == "a2 b1 a1"


def test_a_deadline_ends_even_one_that_was_put_behind() -> None:
    queue = fair(QueuePolicy(default_timeout_ns=100, delays=True))
    late = request("late", deadline_ns=400)
    queue.append(late)
    queue.append(request("other", at_ns=1000))
    queue.expire(200)
    over, _ = queue.expire(400)
    assert over == [late]
    assert drain(queue) == "other"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 4)), max_size=60))
def test_nobody_waits_for_more_than_a_turn_of_each_other(arriving: list[tuple[str, int]]) -> None:
    """Between two of one tenant's requests no other tenant gets two, while both wait."""
    queue = fair(priorities=Priorities(3, 2))
    for number, (tenant, priority) in enumerate(arriving):
        queue.append(request(f"{tenant}{number}", tenant=tenant, priority=priority))
    waiting = Counter((2 if p in (0, 4) else p, t) for t, p in arriving)
    level, since = 0, Counter[str]()
    while (one := queue.popleft()) is not None:
        now = one.priority if one.priority in (1, 2, 3) else 2
        assert now >= level
        if now != level:
            level, since = now, Counter()
        waiting[level, one.tenant] -= 1
        since[one.tenant] += 1
        for (other_level, tenant), left in waiting.items():
            if other_level == level and left and tenant != one.tenant:
                assert since[one.tenant] <= since[tenant] + 1


class AsAList(RuleBasedStateMachine):
    """Whatever is done to it: it holds what was put in and not taken out."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(QueuePolicy(default_timeout_ns=50, delays=True), Priorities(2, 1, {
            2: QueuePolicy(max_size=3, default_timeout_ns=30)}))  # fmt: skip
        self.held: set[InferenceRequest] = set()
        self.now = 0

    @rule(target=requests, tenant=st.sampled_from("ab"), priority=st.integers(0, 2), deadline=st.integers(0, 60))
    def append(self, tenant: str, priority: int, deadline: int) -> InferenceRequest:
        one = request(
            "", tenant=tenant, priority=priority, at_ns=self.now, deadline_ns=deadline and self.now + deadline
        )
        try:
            self.queue.append(one)
        except QueueRejected:
            assert priority == 2
            assert sum(held.priority == 2 for held in self.held) == 3
        else:
            self.held.add(one)
        return one

    @rule()
    def popleft(self) -> None:
        one = self.queue.popleft()
        assert (one is None) == (not self.held)
        if one is not None:
            self.held.remove(one)

    @rule(one=requests)
    def remove(self, one: InferenceRequest) -> None:
        assert self.queue.remove(one) == (one in self.held)
        self.held.discard(one)

    @rule(passed=st.integers(0, 40))
    def expire(self, passed: int) -> None:
        self.now += passed
        over, next_ns = self.queue.expire(self.now)
        assert set(over) <= self.held
        assert len(set(over)) == len(over)
        self.held -= set(over)
        assert not any(0 < held.deadline_ns <= self.now for held in self.held)
        assert next_ns == 0 or next_ns > self.now

    @invariant()
    def counts(self) -> None:
        assert len(self.queue) == len(self.held)
        assert set(self.queue) == self.held


TestAsAList = AsAList.TestCase
