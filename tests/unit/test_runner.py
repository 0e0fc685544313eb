"""The runner's streams, its order of answers, and workers that come and go; everything at the test's word."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from doorstep.errors import BackendError, ErrorCode, FailureReason
from doorstep.request import LATER, RESCHEDULE, Batch, InferenceRequest, InferenceResponse, Outputs
from doorstep.scheduler.runner import Runner
from doorstep.stats import ModelStatistics
from doorstep.types import FP32, Tensor

Done = Callable[[Batch], None]


class TestWorker:
    __test__ = False

    def __init__(self) -> None:
        self.name = "w"
        self.batches: list[tuple[Batch, Done]] = []

    def submit(self, batch: Batch, done: Done) -> None:
        self.batches.append((batch, done))

    def ready(self, done: Callable[[bool], None]) -> None:
        done(True)

    def close(self) -> None: ...


class Inbox:
    """What one client was sent, as text: "1" is an output, "." the news that no more comes, "!" an error; the final
    one is marked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def send(self, response: InferenceResponse, final: bool) -> None:
        what = "!" if response.error else "." if response.flag_only else str(int(response.outputs[0].array[0]))
        self.log.append(f"{self.name}{what}{'#' if final else ''}")


class Bench:
    def __init__(self, workers: int = 1, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.log: list[str] = []
        self.workers = [TestWorker() for _ in range(workers)]
        self.stats = ModelStatistics()
        self.rescheduled: list[InferenceRequest] = []
        self.finished: list[str] = []
        self.runner = Runner(
            "m", "1", list(self.workers), self.stats, self.loop,
            on_idle=lambda worker: None,
            on_reschedule=self.rescheduled.append,
            on_finished=lambda request: self.finished.append(request.id),
            **options,
        )  # fmt: skip

    def run(self, *names: str, worker: int = 0) -> list[InferenceRequest]:
        requests = [InferenceRequest("m", {}, Inbox(name, self.log), id=name) for name in names]
        self.again(*requests, worker=worker)
        return requests

    def again(self, *requests: InferenceRequest, worker: int = 0) -> None:
        for request in requests:
            request.on_cancel = self.runner.cancel
        self.runner.idle.remove(self.workers[worker])
        self.runner.run(self.workers[worker], list(requests), len(requests))

    def emit(self, request: InferenceRequest, what: Any, *, final: bool = False, worker: int = 0) -> None:
        batch, _ = next(b for b in reversed(self.workers[worker].batches) if request in b[0].requests)
        batch.emit(request, what, final)

    def done(self, *results: Any, worker: int = 0) -> None:
        batch, done = self.workers[worker].batches[-1]
        batch.results = list(results)
        done(batch)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.loop.close()


def out(value: int) -> list[Tensor]:
    return [Tensor("y", FP32, np.full(1, value, np.float32))]


BOOM = BackendError("boom")


# Streams


def test_responses_come_during_the_batch_and_after_it(bench: Callable[..., Bench]) -> None:
    b = bench()
    [a] = b.run("a")
    b.emit(a, out(1))
    b.done(LATER)
    assert (b.runner.running_count, b.runner.busy_workers) == (1, 0), "the worker is free, the request is not over"
    b.emit(a, Outputs(out(2), {"k": 1}))
    assert b.finished == []
    b.emit(a, None, final=True)
    assert b.log == ["a1", "a2", "a.#"]
    assert (b.runner.running_count, b.finished, b.runner._streams) == (0, ["a"], {})
    assert (b.stats.success_count, b.stats.execution_count, b.stats.fail_count) == (1, 1, 0)
    assert [b.stats.responses[i].success_count for i in range(2)] == [1, 1]
    assert b.stats.responses[2].empty_count == 1


def test_all_may_be_said_before_the_batch_is_done(bench: Callable[..., Bench]) -> None:
    b = bench()
    [a] = b.run("a")
    b.emit(a, out(1))
    b.emit(a, out(2), final=True)
    b.emit(a, out(3), final=True)
    assert (b.log, b.runner.running_count) == (["a1", "a2#"], 1)
    b.done(LATER)
    assert (b.log, b.runner.running_count, b.runner._streams) == (["a1", "a2#"], 0, {})
    assert (b.stats.success_count, b.finished) == (1, ["a"])


def test_an_error_is_final_whatever_else_is_said(bench: Callable[..., Bench]) -> None:
    b = bench()
    [a] = b.run("a")
    b.done(LATER)
    b.emit(a, BOOM)
    b.emit(a, out(1))
    assert (b.log, b.runner.running_count) == (["a!#"], 0)
    assert (b.stats.failures[FailureReason.BACKEND], b.stats.success_count) == (1, 0)


@pytest.mark.parametrize(("first_is_final", "expected"), [(False, ["a1", "a!#"]), (True, ["a1#"])])
def test_a_batch_that_fails_after_some_responses_ends_each_stream_once(
    bench: Callable[..., Bench], first_is_final: bool, expected: list[str]
) -> None:
    b = bench()
    [a] = b.run("a")
    b.emit(a, out(1), final=first_is_final)
    b.done(BOOM)
    assert (b.log, b.runner.running_count, b.runner._streams) == (expected, 0, {})
    assert b.stats.success_count + b.stats.fail_count == 1
    assert b.finished == ["a"]


def test_the_requests_of_a_batch_end_each_in_its_own_way(bench: Callable[..., Bench]) -> None:
    b = bench()
    one, two, three = b.run("a", "b", "c")
    b.emit(two, out(1))
    b.done(out(7), LATER, BOOM)
    assert b.log == ["b1", "a7#", "c!#"]
    assert b.runner.running_count == 1
    b.emit(two, out(2), final=True)
    assert b.log[-1] == "b2#"
    assert b.runner.running_count == 0
    assert not any(r.cancelled for r in (one, two, three))


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_cancelling_a_stream_answers_it_once(bench: Callable[..., Bench], when: str) -> None:
    b = bench()
    [a] = b.run("a")
    if when == "before":
        a.cancel()
    b.emit(a, out(1))
    if when == "between":
        a.cancel()
    b.done(LATER)
    if when == "after":
        a.cancel()
    b.emit(a, out(2))
    b.emit(a, None, final=True)
    assert b.log == (["a!#"] if when == "before" else ["a1", "a!#"])
    assert (b.runner.running_count, b.runner._streams, b.finished) == (0, {}, ["a"])
    assert b.stats.failures[FailureReason.CANCELED] == 1
    assert b.stats.success_count == 0


def test_a_request_may_be_seen_again_after_it_has_said_something(bench: Callable[..., Bench]) -> None:
    b = bench()
    [a] = b.run("a")
    b.emit(a, out(1))
    b.done(RESCHEDULE)
    assert (b.rescheduled, b.runner.running_count, b.finished) == ([a], 0, [])
    b.again(a)
    b.done(out(2))
    assert (b.log, b.finished, b.runner._streams) == (["a1", "a2#"], ["a"], {})
    assert b.stats.success_count == 1


def test_drained_waits_for_streams(bench: Callable[..., Bench]) -> None:
    b = bench()
    [a] = b.run("a")
    b.done(LATER)
    waiting = b.loop.create_task(b.runner.drained(lambda: not b.runner.running_count))
    b.loop.run_until_complete(asyncio.sleep(0))
    assert not waiting.done()
    b.emit(a, None, final=True)
    b.loop.run_until_complete(waiting)


# The order of answers


def test_streams_keep_the_order_too(bench: Callable[..., Bench]) -> None:
    b = bench(2, preserve_ordering=True)
    [a] = b.run("a", worker=0)
    [z] = b.run("z", worker=1)
    b.emit(z, out(1), worker=1)
    b.emit(a, out(1), worker=0)
    assert b.log == ["a1"]
    b.done(LATER, worker=1)
    b.emit(z, out(2), final=True, worker=1)
    assert b.log == ["a1"]
    b.done(LATER, worker=0)
    b.emit(a, None, final=True, worker=0)
    assert b.log == ["a1", "a.#", "z1", "z2#"]


def test_order_holds_where_a_stream_outlives_its_batch_on_the_only_worker(bench: Callable[..., Bench]) -> None:
    b = bench(preserve_ordering=True)
    [a] = b.run("a")
    b.done(LATER)
    b.run("z")
    b.done(out(5))
    assert b.log == []
    b.emit(a, out(1), final=True)
    assert b.log == ["a1#", "z5#"]


@pytest.mark.parametrize("leaves", [True, False])
def test_order_is_not_stuck_by_one_that_leaves_or_runs_again(bench: Callable[..., Bench], leaves: bool) -> None:
    b = bench(2, preserve_ordering=True)
    [a] = b.run("a", worker=0)
    [z] = b.run("z", worker=1)
    b.emit(z, out(1), worker=1)
    if leaves:
        a.cancel()
        assert b.log == ["a!#", "z1"]
        b.done(out(0), worker=0)
    else:
        b.done(RESCHEDULE, worker=0)
        assert b.log == ["z1"]
        b.again(a, worker=0)
        b.done(out(3), worker=0)
        assert b.log == ["z1"], "it has a new place, behind the other"
    b.done(out(2), worker=1)
    assert b.log == (["a!#", "z1", "z2#"] if leaves else ["z1", "z2#", "a3#"])


# Workers that come and go


def test_a_worker_that_leaves_finishes_its_batch_and_its_streams(bench: Callable[..., Bench]) -> None:
    b = bench(2)
    [a, z] = b.run("a", "z", worker=0)
    removing = b.loop.create_task(b.runner.remove_worker(b.workers[0]))
    b.loop.run_until_complete(asyncio.sleep(0))
    assert not removing.done()
    b.done(out(1), LATER)
    b.loop.run_until_complete(asyncio.sleep(0))
    assert not removing.done(), "a stream still comes from it"
    assert b.runner.idle == [b.workers[1]]
    b.emit(z, out(2), final=True)
    b.loop.run_until_complete(removing)
    assert b.log == ["a1#", "z2#"]
    assert (b.runner.worker_count, b.runner.busy_workers, a.cancelled) == (1, 0, False)


def test_an_idle_worker_leaves_at_once_and_a_new_one_is_offered(bench: Callable[..., Bench]) -> None:
    b = bench()
    offered: list[Any] = []
    b.runner._on_idle = offered.append
    new = TestWorker()
    b.runner.add_worker(new)
    assert (offered, b.runner.worker_count) == ([new], 2)
    b.loop.run_until_complete(b.runner.remove_worker(b.workers[0]))
    assert (b.runner.idle, b.runner.worker_count) == ([new], 1)


def test_a_worker_that_gives_no_result_is_an_error_of_the_server(bench: Callable[..., Bench]) -> None:
    b = bench()
    responses: list[InferenceResponse] = []
    [a] = b.run("a")
    a.sender = type("S", (), {"send": lambda self, response, final: responses.append(response)})()
    b.done(None)
    assert responses[0].error is not None
    assert responses[0].error.code is ErrorCode.INTERNAL
