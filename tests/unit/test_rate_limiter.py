"""The rate limiter, as Triton core's rate_limiter.cc: what is available, who is first, and schedulers that must ask."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from doorstep import proto as messages
from doorstep.errors import ErrorCode, InvalidArgument
from doorstep.request import Batch, InferenceRequest
from doorstep.scheduler.dynamic import DynamicBatchScheduler
from doorstep.scheduler.plan import BatchPolicy
from doorstep.scheduler.rate_limiter import EVERY_DEVICE, RateLimiter, Resources, Ticket
from doorstep.scheduler.runner import Runner
from doorstep.stats import ModelStatistics
from doorstep.types import FP32, Tensor


def limits(*resources: tuple[str, int] | tuple[str, int, bool], priority: int = 0) -> Any:
    """An inference.ModelRateLimiter: (name, count) or (name, count, global)."""
    message = messages.ModelInstanceGroup().rate_limiter
    message.priority = priority
    for name, count, *is_global in resources:
        message.resources.add(name=name, count=count, **{"global": bool(is_global)})
    return message


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    found = asyncio.new_event_loop()
    yield found
    found.close()


def turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon(loop.stop)
    loop.run_forever()


# What there is


@pytest.mark.parametrize(
    ("available", "device", "asked", "error"),
    [
        ({}, 0, [("R1", 1000)], ""),  # nothing is said: there is as much as the largest asks for
        ({EVERY_DEVICE: {"R1": 4}}, 0, [("R1", 4)], ""),
        ({EVERY_DEVICE: {"R1": 4}}, 0, [("R1", 5)], ("R1", 4, 5)),
        ({EVERY_DEVICE: {"R1": 4}}, 0, [("R2", 1)], ("R2", 0, 1)),  # not named: there is none of it
        ({EVERY_DEVICE: {"R1": 4}, 0: {"R1": 6}}, 0, [("R1", 6)], ""),  # the larger of the two
        ({EVERY_DEVICE: {"R1": 4}, 0: {"R1": 6}}, 1, [("R1", 6)], ("R1", 4, 6)),
        ({1: {"R1": 4}}, 0, [("R1", 1)], ("R1", 0, 1)),
        ({1: {"R1": 4}}, 0, [("R1", 4, True)], ""),  # a global one: the device does not matter
        ({1: {"R1": 4}, 2: {"R1": 3}}, 0, [("R1", 5, True)], ("R1", 4, 5)),
        ({1: {"R1": 4}}, 0, [("r1", 1, True)], ("r1", 0, 1)),
    ],
)
def test_an_instance_that_could_never_run_is_refused(
    loop: asyncio.AbstractEventLoop, available: Resources, device: int, asked: list[Any], error: Any
) -> None:
    limiter = RateLimiter(loop, available)
    if not error:
        limiter.register(device, limits(*asked))
        return
    with pytest.raises(InvalidArgument) as caught:
        limiter.register(device, limits(*asked))
    name, there, needed = error
    assert caught.value.message == (
        f'Resource count for "{name}" is limited to {there} which will prevent scheduling of one or more model '
        f"instances, the minimum required count is {needed}"
    )
    assert caught.value.code is ErrorCode.INVALID_ARG
    limiter.register(device, limits())  # and nothing of it is left


def test_a_resource_is_global_or_of_devices(loop: asyncio.AbstractEventLoop) -> None:
    limiter = RateLimiter(loop)
    limiter.register(0, limits(("R1", 1, True)))
    with pytest.raises(InvalidArgument) as caught:
        limiter.register(0, limits(("R1", 1)))
    assert caught.value.message == (
        'Resource "R1" is present as both global and device-specific resource in the model configuration.'
    )


def test_what_is_there_by_default_is_what_the_largest_instance_needs(loop: asyncio.AbstractEventLoop) -> None:
    limiter = RateLimiter(loop)
    small, other = (limiter.register(0, limits(("R", 2))) for _ in range(2))
    large = limiter.register(0, limits(("R", 5)))
    assert [limiter.ask(t, lambda: None) for t in (small, other)] == [True, True]
    assert not limiter.ask(large, lambda: None)
    limiter.release(small)
    limiter.release(other)
    turn(loop)
    assert large.granted
    limiter.release(large)
    limiter.unregister([large])
    assert limiter.ask(small, lambda: None)
    assert not limiter.ask(other, lambda: None), "there are two of it again, no more"


# Who is first


def test_whoever_has_run_least_times_its_priority_is_first(loop: asyncio.AbstractEventLoop) -> None:
    limiter = RateLimiter(loop)
    often, seldom = limiter.register(0, limits(("R", 1), priority=1)), limiter.register(0, limits(("R", 1), priority=3))
    ran: list[str] = []

    def begin(name: str, ticket: Ticket) -> None:
        ran.append(name)
        loop.call_soon(end, name, ticket)

    def end(name: str, ticket: Ticket) -> None:
        limiter.release(ticket)
        ask(name, ticket)

    def ask(name: str, ticket: Ticket) -> None:
        if len(ran) < 40 and limiter.ask(ticket, lambda: begin(name, ticket)):
            begin(name, ticket)

    ask("often", often)
    ask("seldom", seldom)
    while len(ran) < 40:
        turn(loop)
    assert ran.count("often") == 30
    assert ran.count("seldom") == 10


def test_who_is_first_and_cannot_run_holds_up_the_others(loop: asyncio.AbstractEventLoop) -> None:
    limiter = RateLimiter(loop)
    a, large, small = (limiter.register(0, limits(*r)) for r in ([("R", 1)], [("R", 2)], [("S", 1)]))
    granted: list[str] = []
    assert limiter.ask(a, lambda: None)
    assert not limiter.ask(large, lambda: granted.append("large"))
    assert not limiter.ask(small, lambda: granted.append("small")), "though what it needs is free"
    turn(loop)
    assert granted == []
    limiter.release(a)
    turn(loop)
    assert granted == ["large", "small"]


def test_one_who_leaves_the_line_holds_up_nobody(loop: asyncio.AbstractEventLoop) -> None:
    limiter = RateLimiter(loop)
    a, large, small = (limiter.register(0, limits(*r)) for r in ([("R", 1)], [("R", 2)], [("S", 1)]))
    granted: list[str] = []
    limiter.ask(a, lambda: None)
    limiter.ask(large, lambda: granted.append("large"))
    limiter.ask(small, lambda: granted.append("small"))
    limiter.unregister([large])
    for _ in range(3):
        turn(loop)
    assert granted == ["small"]


def test_other_devices_have_their_own(loop: asyncio.AbstractEventLoop) -> None:
    limiter = RateLimiter(loop)
    tickets = [limiter.register(device, limits(("R", 1))) for device in (0, 1)]
    assert [limiter.ask(t, lambda: None) for t in tickets] == [True, True]
    shared = [limiter.register(device, limits(("G", 1, True))) for device in (0, 1)]
    assert [limiter.ask(t, lambda: None) for t in shared] == [True, False]


# Schedulers that must ask


class HeldWorker:
    """Holds its batch until `finish`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.batches: list[list[str]] = []
        self._current: tuple[Batch, Callable[[Batch], None]] | None = None

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        assert self._current is None
        self.batches.append([r.id for r in batch.requests])
        self._current = (batch, done)

    def ready(self, done: Callable[[bool], None]) -> None:
        done(True)

    def finish(self) -> None:
        assert self._current is not None
        (batch, done), self._current = self._current, None
        batch.results = [[Tensor("y", FP32, np.zeros(1, np.float32))] for _ in batch.requests]
        done(batch)

    def close(self) -> None: ...


class Inbox:
    def __init__(self) -> None:
        self.count = 0

    def send(self, response: Any, final: bool) -> None:
        self.count += 1


class Shop:
    """Models of which only one may run at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.limiter = RateLimiter(loop)
        self.schedulers: dict[str, DynamicBatchScheduler] = {}

    def worker(self, name: str, priority: int = 1) -> HeldWorker:
        worker = HeldWorker(name)
        self.limiter.assign(self.limiter.register(0, limits(("R", 1), priority=priority)), worker)
        return worker

    def model(self, name: str, *workers: HeldWorker, **options: Any) -> DynamicBatchScheduler:
        self.schedulers[name] = DynamicBatchScheduler(
            name, "1", list(workers), ModelStatistics(), BatchPolicy(max_rows=4), loop=self.loop,
            limiter=self.limiter, **options,
        )  # fmt: skip
        return self.schedulers[name]

    def send(self, model: str, id: str) -> InferenceRequest:
        request = InferenceRequest(model, {}, Inbox(), id=id)
        self.schedulers[model].enqueue(request)
        return request

    def turns(self) -> None:
        for _ in range(4):
            turn(self.loop)


def test_requests_stay_in_the_queue_until_their_instance_may_run(loop: asyncio.AbstractEventLoop) -> None:
    shop = Shop(loop)
    a, b = shop.worker("a"), shop.worker("b")
    first, second = shop.model("a", a), shop.model("b", b)
    shop.send("a", "1")
    shop.turns()
    shop.send("b", "2")
    shop.turns()
    shop.send("b", "3")
    leaving = shop.send("b", "4")
    shop.turns()
    assert (a.batches, b.batches) == ([["1"]], [])
    assert (second.queued_count, second.busy_workers) == (3, 0)
    leaving.cancel()
    a.finish()
    shop.turns()
    assert b.batches == [["2", "3"]], "the batch has grown meanwhile, and who left is not in it"
    b.finish()
    assert (first.inflight_count, second.inflight_count) == (0, 0)


def test_what_nobody_needs_any_more_is_given_back(loop: asyncio.AbstractEventLoop) -> None:
    shop = Shop(loop)
    a, b = shop.worker("a"), shop.worker("b")
    shop.model("a", a), shop.model("b", b)
    shop.send("a", "1")
    shop.turns()
    leaving = shop.send("b", "2")
    shop.turns()
    leaving.cancel()
    a.finish()
    shop.turns()
    shop.send("a", "3")
    shop.turns()
    assert (a.batches, b.batches) == ([["1"], ["3"]], [])


def test_instances_of_a_model_take_turns(loop: asyncio.AbstractEventLoop) -> None:
    shop = Shop(loop)
    workers = [shop.worker(n) for n in "abc"]
    shop.model("m", *workers)
    for i in range(6):
        shop.send("m", str(i))
        shop.turns()
        [busy] = [w for w in workers if w._current is not None]
        busy.finish()
    assert [len(w.batches) for w in workers] == [2, 2, 2]


def test_instances_come_and_go_under_the_rate_limiter(loop: asyncio.AbstractEventLoop) -> None:
    shop = Shop(loop)
    a, other = shop.worker("a"), shop.worker("other")
    model = shop.model("m", a)
    shop.model("o", other)
    shop.send("o", "0")
    shop.turns()
    shop.send("m", "1")
    shop.turns()
    b = shop.worker("b")
    model.add_worker(b)
    loop.run_until_complete(model.remove_worker(a))  # which was in line
    shop.limiter.unregister([shop.limiter.ticket_of(a)])
    other.finish()
    shop.turns()
    assert (a.batches, b.batches) == ([], [["1"]])


def test_a_batch_made_early_waits_and_is_dropped_if_nobody_does(loop: asyncio.AbstractEventLoop) -> None:
    """As sequence schedulers do: which worker runs what is settled before it may."""
    shop = Shop(loop)
    a, b = shop.worker("a"), shop.worker("b")
    runner = Runner("m", "1", [a, b], ModelStatistics(), loop, on_idle=lambda worker: None, limiter=shop.limiter)
    requests = [InferenceRequest("m", {}, Inbox(), id=i) for i in "12"]
    for worker, request in zip((a, b), requests, strict=True):
        runner.idle.remove(worker)
        request.on_cancel = runner.cancel
        runner.run(worker, [request], 1)
    assert (a.batches, b.batches) == ([["1"]], [])
    requests[1].cancel()
    a.finish()
    shop.turns()
    assert (b.batches, runner.running_count, len(runner.idle)) == ([], 0, 2)
    assert [r.sender.count for r in requests] == [1, 1]  # type: ignore[attr-defined]
    assert shop.limiter.ask(shop.limiter.ticket_of(a), lambda: None), "nothing is held"
