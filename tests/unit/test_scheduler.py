"""The dynamic scheduler with workers that finish when the test says so: no threads, no sleeping, a clock by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from doorstep.errors import BackendError, ErrorCode, FailureReason, QueueRejected
from doorstep.request import Batch, InferenceRequest, InferenceResponse
from doorstep.scheduler.default import ALONE, DefaultScheduler
from doorstep.scheduler.dynamic import DynamicBatchScheduler
from doorstep.scheduler.plan import BatchPolicy
from doorstep.scheduler.queue import QueuePolicy
from doorstep.stats import ModelStatistics
from doorstep.types import FP32, Tensor


class SlowWorker:
    """Holds its batch until `finish`."""

    def __init__(self, name: str = "w") -> None:
        self.name = name
        self.batches: list[list[str]] = []  # ids, of every batch it was given
        self.current: tuple[Batch, Callable[[Batch], None]] | None = None

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        assert self.current is None, "one batch at a time"
        self.batches.append([r.id for r in batch.requests])
        self.current = (batch, done)

    def finish(self, error: Exception | None = None) -> None:
        assert self.current is not None
        batch, done = self.current
        self.current = None
        for i, request in enumerate(batch.requests):
            batch.results[i] = error or [Tensor("out", FP32, np.zeros((request.rows, 1), np.float32))]  # type: ignore[call-overload]
        done(batch)

    def close(self) -> None: ...


@dataclass
class Inbox:
    """A sender that keeps what it is sent."""

    responses: list[InferenceResponse] = field(default_factory=list)
    order: list[str] | None = None

    def send(self, response: InferenceResponse, final: bool) -> None:
        assert final
        self.responses.append(response)
        if self.order is not None:
            self.order.append(response.id)


class Bench:
    """A scheduler under test, its workers, and the order of answers."""

    def __init__(self, policy: BatchPolicy, workers: int = 1, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.workers = [SlowWorker(f"w{i}") for i in range(workers)]
        self.stats = ModelStatistics()
        self.now = 1_000
        make = DefaultScheduler if policy is ALONE else DynamicBatchScheduler
        self.scheduler = make(
            "m", "1", list(self.workers), self.stats, policy, loop=self.loop, clock=lambda: self.now, **options
        )  # fmt: skip
        self.answered: list[str] = []

    def send(self, id: str, rows: int = 1, **attributes: Any) -> tuple[InferenceRequest, Inbox]:
        inbox = Inbox(order=self.answered)
        request = InferenceRequest("m", {"in": Tensor("in", FP32, np.zeros((rows, 4), np.float32))}, inbox, id=id)
        request.rows = rows
        for name, value in attributes.items():
            setattr(request, name, value)
        self.scheduler.enqueue(request)
        return request, inbox

    def turn(self) -> None:
        """One turn of the event loop: whatever is due now happens."""
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*args: Any, **options: Any) -> Bench:
        made.append(Bench(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.scheduler.close()
        one.loop.close()


EIGHT = BatchPolicy(max_rows=8)


def test_requests_of_one_turn_share_a_batch(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT)
    inboxes = [b.send(str(i))[1] for i in range(3)]
    assert b.workers[0].batches == []
    b.turn()
    assert b.workers[0].batches == [["0", "1", "2"]]
    assert (b.scheduler.queued_count, b.scheduler.inflight_count) == (0, 3)
    b.workers[0].finish()
    assert [len(i.responses) for i in inboxes] == [1, 1, 1]
    assert b.scheduler.inflight_count == 0
    assert (b.stats.success_count, b.stats.execution_count, b.stats.inference_count) == (3, 1, 3)


def test_requests_gather_while_the_only_worker_is_busy(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT)
    b.send("a")
    b.turn()
    for i in "bcd":
        b.send(i, rows=3)
    b.turn()
    assert b.workers[0].batches == [["a"]]
    b.workers[0].finish()
    assert b.workers[0].batches == [["a"], ["b", "c"]]  # 3 + 3 rows; another 3 would be nine
    b.workers[0].finish()
    assert b.workers[0].batches[-1] == ["d"]


def test_without_batching_every_request_runs_alone_and_in_order(bench: Callable[..., Bench]) -> None:
    b = bench(ALONE, workers=2)
    for i in "abc":
        b.send(i)
    b.turn()
    assert sorted(w.batches[0][0] for w in b.workers) == ["a", "b"]
    b.workers[0].finish()
    assert b.scheduler.queued_count == 0


def test_a_full_queue_refuses_and_the_request_stays_the_callers(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT, queue_policy=QueuePolicy(max_size=2))
    b.send("a")
    b.turn()
    b.send("b"), b.send("c")
    with pytest.raises(QueueRejected, match="Exceeds maximum queue size") as caught:
        b.send("d")
    assert (caught.value.code, caught.value.reason) == (ErrorCode.UNAVAILABLE, FailureReason.REJECTED)
    assert b.scheduler.queued_count == 2


def test_a_cancelled_request_is_answered_at_once_and_skipped(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT)
    b.send("a")
    b.turn()
    request, inbox = b.send("b")
    b.send("c")
    request.cancel()
    assert inbox.responses[0].error is not None
    assert inbox.responses[0].error.code is ErrorCode.CANCELLED
    assert b.scheduler.queued_count == 1
    b.workers[0].finish()
    assert b.workers[0].batches == [["a"], ["c"]]
    assert b.stats.failures[FailureReason.CANCELED] == 1


@pytest.mark.parametrize("policy", [EIGHT, ALONE])
def test_a_request_whose_deadline_has_passed_does_not_run(bench: Callable[..., Bench], policy: BatchPolicy) -> None:
    b = bench(policy)
    b.send("a", deadline_ns=2_000)
    b.turn()
    late, passing = b.send("b", deadline_ns=2_000)[1], b.send("c", deadline_ns=2_001)[1]
    b.now = 2_000
    b.workers[0].finish()
    assert b.workers[0].batches == [["a"], ["c"]]
    assert late.responses[0].error is not None
    assert late.responses[0].error.code is ErrorCode.CANCELLED
    later = b.send("d", deadline_ns=2_001)[1]
    b.now = 2_001
    b.workers[0].finish()
    assert [len(inbox.responses) for inbox in (late, passing, later)] == [1, 1, 1]
    assert b.workers[0].batches == [["a"], ["c"]], "nobody is left"
    assert (b.scheduler.queued_count, b.scheduler.inflight_count, b.scheduler.busy_workers) == (0, 0, 0)
    assert b.stats.failures[FailureReason.CANCELED] == 2
    b.send("e", deadline_ns=2_002)
    b.turn()
    assert b.workers[0].batches[-1] == ["e"]


def test_cancelling_a_running_request_answers_it_once_and_leaves_the_others(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT)
    request, inbox = b.send("a")
    _, other = b.send("b")
    b.turn()
    request.cancel()
    request.cancel()
    b.workers[0].finish()
    assert len(inbox.responses) == 1
    assert other.responses[0].error is None
    assert b.scheduler.inflight_count == 0


def test_a_failing_batch_answers_everyone_and_the_next_one_runs(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT)
    inboxes = [b.send(i)[1] for i in "ab"]
    b.turn()
    b.send("c")
    b.workers[0].finish(BackendError("boom"))
    assert all(i.responses[0].error is not None for i in inboxes)
    assert b.stats.failures[FailureReason.BACKEND] == 2
    assert b.workers[0].batches[-1] == ["c"]


def test_requests_that_cannot_be_stacked_go_in_batches_of_their_own(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT, key_of=lambda r: r.id[0])
    for i in ("x1", "x2", "y1", "x3"):
        b.send(i)
    b.turn()
    while b.workers[0].current:
        b.workers[0].finish()
    assert b.workers[0].batches == [["x1", "x2"], ["y1"], ["x3"]]


def test_preserve_ordering_holds_an_early_answer_back(bench: Callable[..., Bench]) -> None:
    b = bench(BatchPolicy(max_rows=1), workers=2, preserve_ordering=True)
    b.send("a"), b.send("b")
    b.turn()
    first, second = sorted(b.workers, key=lambda w: w.batches[0])
    second.finish()
    assert b.answered == []
    first.finish()
    assert b.answered == ["a", "b"]


def test_preserve_ordering_is_not_stuck_by_a_cancelled_or_failed_request(bench: Callable[..., Bench]) -> None:
    b = bench(BatchPolicy(max_rows=1), workers=3, preserve_ordering=True)
    request, _ = b.send("a")
    b.send("b"), b.send("c")
    b.turn()
    one, two, three = sorted(b.workers, key=lambda w: w.batches[0])
    three.finish()
    two.finish(BackendError("boom"))
    request.cancel()
    one.finish()
    assert b.answered == ["a", "b", "c"]
    assert b.scheduler.inflight_count == 0


def test_a_queue_timeout_ends_a_request_before_it_runs(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT, queue_policy=QueuePolicy(default_timeout_ns=5_000))
    b.send("a")
    b.turn()
    _, inbox = b.send("b")
    b.now += 6_000
    b.scheduler._on_alarm()
    assert inbox.responses[0].error is not None
    assert inbox.responses[0].error.message.endswith("Request timeout expired")
    b.workers[0].finish()
    assert b.workers[0].batches == [["a"]]


def test_a_delayed_batch_is_sent_by_the_alarm(bench: Callable[..., Bench]) -> None:
    import time

    b = bench(BatchPolicy(max_rows=8, max_delay_ns=200_000))
    b.now = time.monotonic_ns()
    b.send("a")
    b.turn()
    assert b.workers[0].batches == []
    b.now += 200_000
    while not b.workers[0].batches:  # the alarm rings by the real clock
        b.turn()
    assert b.workers[0].batches == [["a"]]


def test_drained_returns_after_the_last_answer(bench: Callable[..., Bench]) -> None:
    b = bench(EIGHT)
    b.send("a")
    b.turn()
    b.scheduler.stop()
    with pytest.raises(QueueRejected, match="stopping"):
        b.send("b")
    waiting = b.loop.create_task(b.scheduler.drained())
    b.turn()
    assert not waiting.done()
    b.workers[0].finish()
    b.loop.run_until_complete(waiting)


def test_a_worker_that_answers_at_once_runs_the_whole_queue_in_one_turn(bench: Callable[..., Bench]) -> None:
    b = bench(BatchPolicy(max_rows=4))

    def submit(batch: Batch, done: Callable[[Batch], None]) -> None:
        SlowWorker.submit(b.workers[0], batch, done)
        b.workers[0].finish()

    b.workers[0].submit = submit  # type: ignore[method-assign]
    for i in range(10):
        b.send(str(i))
    b.turn()
    assert [len(ids) for ids in b.workers[0].batches] == [4, 4, 2]
    assert len(b.answered) == 10
