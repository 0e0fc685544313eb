"""Slots, with workers that answer when the test says so: who runs where, who is refused, cancelled, counted. A clock by
hand, no thread, no sleeping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from doorstep.backends.llm.counts import counts_tensor
from doorstep.backends.llm.job import DELTA, JOB, Delta, Job, Usage
from doorstep.errors import BackendError, DoorstepError, ErrorCode, QueueRejected
from doorstep.llm_stats import LLMStatistics
from doorstep.request import LATER, Batch, InferenceRequest, InferenceResponse
from doorstep.scheduler import slots
from doorstep.scheduler.affinity import BLOCK_BYTES
from doorstep.scheduler.queue import Priorities, QueuePolicy
from doorstep.scheduler.slots import MOST_RETRY_S, SlotScheduler
from doorstep.stats import ModelStatistics
from doorstep.types import BYTES, INT32, Tensor, object_array

MS = 1_000_000


@dataclass
class Inbox:
    responses: list[InferenceResponse] = field(default_factory=list)
    final: bool = False
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, response: InferenceResponse, final: bool) -> None:
        assert not self.final
        self.responses.append(response)
        self.final = final
        if final:
            self.answered.set()

    @property
    def error(self) -> DoorstepError | None:
        return self.responses[-1].error if self.responses else None


class Engine:
    """A worker that holds its requests until the test says what becomes of them; each batch is one request."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.running: dict[str, tuple[InferenceRequest, Batch]] = {}
        self.seen: list[str] = []

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        (request,) = batch.requests
        self.seen.append(request.id)
        self.running[request.id] = (request, batch)
        batch.results[0] = LATER
        batch.compute_start_ns = batch.compute_end_ns = 1
        done(batch)

    def say(self, id: str, *, tokens: int = 1, usage: Usage | None = None, finish: str = "", kv: float = 0.0) -> None:
        request, batch = self.running[id]
        delta = Delta("x" * tokens, tokens=tokens, usage=usage, finish=finish)
        outputs = [Tensor(DELTA, BYTES, object_array([delta.to_json()], (1,))), counts_tensor(delta, kv)]
        if finish:
            del self.running[id]
        batch.emit(request, outputs, bool(finish))

    def finish(self, id: str) -> None:
        self.say(id, usage=Usage(prompt=10, completion=3, cached=4), finish="stop")

    def fail(self, id: str, error: DoorstepError) -> None:
        request, batch = self.running.pop(id)
        batch.emit(request, error, True)

    def close(self) -> None: ...

    def __repr__(self) -> str:
        return self.name


class Bench:
    def __init__(self, *, slots: int = 1, workers: int = 1, policy: QueuePolicy | None = None,
                 priorities: Priorities | None = None) -> None:  # fmt: skip
        self.loop = asyncio.new_event_loop()
        self.engines = [Engine(f"w{i}") for i in range(workers)]
        self.stats = ModelStatistics()
        self.now = 1000 * MS
        self.scheduler = SlotScheduler(
            "m", "1", list(self.engines), self.stats, slots, 1024, loop=self.loop,  # type: ignore[arg-type]
            queue_policy=policy or QueuePolicy(), priorities=priorities or Priorities(), clock=lambda: self.now,
        )  # fmt: skip
        self.requests: dict[str, InferenceRequest] = {}
        self.inboxes: dict[str, Inbox] = {}

    @property
    def engine(self) -> Engine:
        return self.engines[0]

    @property
    def running(self) -> str:
        return " ".join(id for engine in self.engines for id in engine.running)

    def ask(self, id: str, *, prompt: str = "", tenant: str = "", light: bool = False, priority: int = 0,
            deadline_ns: int = 0, adapter: str = "") -> Inbox:  # fmt: skip
        job = Tensor(JOB, BYTES, object_array([Job("chat", {"messages": prompt}).to_json()], (1,)))
        inbox = self.inboxes[id] = Inbox()
        request = self.requests[id] = InferenceRequest("m", {JOB: job}, inbox, id=id, received_ns=self.now)
        request.tenant, request.priority, request.deadline_ns = tenant, priority, deadline_ns
        request.batch_key = adapter or None
        if light:
            request.rows = 0
        self.scheduler.enqueue(request)
        return inbox

    @property
    def rejected(self) -> dict[str, int]:
        return {reason: count for reason, count in self.scheduler.llm.rejected.items() if count}

    def cancel(self, id: str) -> None:
        self.requests[id].cancel()

    def alarm(self) -> None:
        """What the alarm does when it goes off."""
        self.scheduler._on_alarm()

    def run(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 20))


@pytest.fixture
def make() -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def build(**rest: Any) -> Bench:
        made.append(Bench(**rest))
        return made[-1]

    yield build
    for bench in made:
        bench.scheduler.close()
        bench.loop.close()


Make = Callable[..., Bench]


def test_as_many_run_as_there_are_slots_and_the_next_when_one_ends(make: Make) -> None:
    bench = make(slots=2)
    for id in "abcd":
        bench.ask(id)
    assert bench.running == "a b"
    assert (bench.scheduler.queued_count, bench.scheduler.inflight_count, bench.scheduler.busy_workers) == (2, 4, 1)
    bench.engine.finish("b")
    assert bench.running == "a c"
    bench.engine.finish("a")
    bench.engine.finish("c")
    bench.engine.finish("d")
    assert all(inbox.final and inbox.error is None for inbox in bench.inboxes.values())
    assert (bench.scheduler.inflight_count, bench.scheduler.busy_workers) == (0, 0)


def test_clients_get_the_pieces_without_the_counts(make: Make) -> None:
    bench = make()
    inbox = bench.ask("a")
    bench.engine.say("a")
    bench.engine.finish("a")
    assert [[tensor.name for tensor in response.outputs] for response in inbox.responses] == [[DELTA], [DELTA]]
    assert [inbox.final, len(inbox.responses)] == [True, 2]


def test_a_tensor_of_a_models_own_stays(make: Make) -> None:
    bench = make()
    inbox = bench.ask("a")
    request, batch = bench.engine.running["a"]
    batch.emit(request, [Tensor("own", INT32, np.array([1], np.int32))], True)
    assert [tensor.name for tensor in inbox.responses[0].outputs] == ["own"]
    assert bench.scheduler.inflight_count == 0


@pytest.mark.parametrize("error", [BackendError("broken"), BackendError("gone", code=ErrorCode.UNAVAILABLE)])
def test_one_that_fails_gives_its_slot_back(make: Make, error: DoorstepError) -> None:
    bench = make()
    inbox = bench.ask("a")
    bench.ask("b")
    bench.engine.say("a")
    bench.engine.fail("a", error)
    assert inbox.error is error
    assert bench.running == "b"
    assert bench.scheduler.llm.finished["error"] == 1


def test_one_that_is_cancelled_while_it_runs_gives_its_slot_back(make: Make) -> None:
    bench = make()
    inbox = bench.ask("a")
    bench.ask("b")
    bench.engine.say("a")
    bench.cancel("a")
    assert inbox.error is not None
    assert inbox.error.code is ErrorCode.CANCELLED
    assert "b" in bench.running
    assert bench.scheduler.llm.finished["abort"] == 1
    bench.engine.say("a", finish="stop")  # what the engine had on its way goes nowhere
    assert len(inbox.responses) == 2
    bench.engine.finish("b")
    assert bench.scheduler.inflight_count == 0
    assert bench.scheduler.llm.running == 0


def test_one_that_is_cancelled_while_it_waits_never_runs(make: Make) -> None:
    bench = make()
    for id in "abc":
        bench.ask(id)
    bench.cancel("b")
    assert bench.scheduler.queued_count == 1
    bench.engine.finish("a")
    assert bench.running == "c"
    assert bench.engine.seen == ["a", "c"]
    assert sum(bench.scheduler.llm.finished.values()) == 1, "one that never ran is not counted among those that did"


def test_what_needs_no_slot_does_not_wait_for_one(make: Make) -> None:
    bench = make()
    bench.ask("a")
    bench.ask("b")
    bench.ask("count", light=True)
    assert bench.running == "a count"
    bench.engine.finish("count")
    assert bench.running == "a"
    assert bench.scheduler.busy_workers == 1


def test_without_a_worker_everything_waits_and_can_be_cancelled(make: Make) -> None:
    bench = make(workers=0)
    for id, light in (("a", False), ("count", True)):
        bench.ask(id, light=light)
    assert bench.scheduler.inflight_count == 2
    bench.cancel("a")
    bench.cancel("count")
    assert bench.scheduler.inflight_count == 0


def test_tenants_take_turns_for_slots(make: Make) -> None:
    bench = make()
    for id in ("a0", "a1", "a2", "b1", "a3", "b2"):
        bench.ask(id, tenant=id[0])
    for _ in range(6):
        bench.engine.finish(bench.running)
    assert bench.engine.seen == ["a0", "a1", "b1", "a2", "b2", "a3"]


def test_a_full_queue_refuses_and_says_so(make: Make) -> None:
    bench = make(policy=QueuePolicy(max_size=1))
    bench.ask("a")
    bench.ask("b")
    with pytest.raises(QueueRejected):
        bench.ask("c")
    bench.ask("count", light=True)
    assert bench.rejected == {"queue_full": 1}
    assert bench.scheduler.queue_limit == 1
    assert bench.scheduler.inflight_count == 3


def test_prompts_that_wait_are_bounded_together_and_one_alone_is_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make()
    bench.ask("runs", prompt="x" * 100)
    size = len(bench.engines[0].running["runs"][0].inputs[JOB].array[0])
    monkeypatch.setattr(slots, "MOST_WAITING_BYTES", size)
    bench.ask("waits", prompt="x" * 1000)  # one alone is let in, whatever its size
    with pytest.raises(QueueRejected, match="Exceeds maximum queue size"):
        bench.ask("refused", prompt="x")
    assert bench.rejected == {"queue_full": 1}
    bench.cancel("waits")
    bench.ask("a", prompt="x" * 100)
    bench.engines[0].finish("runs")
    bench.ask("b", prompt="x" * 100)  # `a` runs: it keeps nobody out
    assert bench.scheduler.queued_count == 1


def test_a_stopping_scheduler_takes_nothing_and_finishes_what_it_has(make: Make) -> None:
    bench = make()
    bench.ask("a")
    bench.ask("b")
    bench.scheduler.stop()
    with pytest.raises(QueueRejected):
        bench.ask("c")
    assert bench.rejected == {"stopping": 1}
    bench.loop.call_soon(bench.engine.finish, "a")
    bench.loop.call_soon(bench.engine.finish, "b")
    bench.run(bench.scheduler.drained())
    assert bench.inboxes["b"].final


def test_one_that_has_waited_too_long_is_refused(make: Make) -> None:
    bench = make(policy=QueuePolicy(default_timeout_ns=5 * MS))
    bench.ask("a")
    inbox = bench.ask("b")
    bench.now += 5 * MS
    bench.alarm()
    assert inbox.error is not None
    assert inbox.error.message == "Request timeout expired"
    assert bench.rejected == {"timeout": 1}
    assert bench.running == "a", "who has a slot keeps it"


def test_one_whose_deadline_has_passed_does_not_run(make: Make) -> None:
    bench = make()
    bench.ask("a")
    inbox = bench.ask("b", deadline_ns=bench.now + MS)
    bench.ask("c")
    bench.now += 2 * MS
    bench.engine.finish("a")  # the alarm is late
    assert bench.running == "c"
    assert inbox.error is not None
    assert inbox.error.message == "Request timeout expired"
    assert bench.rejected == {"timeout": 1}


def test_the_alarm_goes_off_by_itself(make: Make) -> None:
    """On the loop, with a clock that is the loop's own."""
    import time

    bench = make(policy=QueuePolicy(default_timeout_ns=MS))
    bench.now = time.monotonic_ns()
    bench.ask("a")
    inbox = bench.ask("b")
    bench.now += 10 * MS

    bench.run(inbox.answered.wait())
    assert inbox.error is not None


# Instances


def test_the_least_loaded_instance_runs_the_next(make: Make) -> None:
    bench = make(workers=2, slots=2)
    for id in "abcd":
        bench.ask(id)
    assert [sorted(engine.running) for engine in bench.engines] in ([["a", "c"], ["b", "d"]], [["a", "d"], ["b", "c"]])
    bench.ask("e")
    assert bench.scheduler.queued_count == 1
    bench.engines[1].finish(next(iter(bench.engines[1].running)))
    assert "e" in bench.engines[1].running


def test_a_prompt_goes_where_its_beginning_is_in_the_cache(make: Make) -> None:
    bench = make(workers=2, slots=4)
    system = {letter: letter * (2 * BLOCK_BYTES) for letter in "xy"}
    for number in range(4):
        for letter in "xy":
            bench.ask(f"{letter}{number}", prompt=system[letter] + str(number))
    homes = [{id[0] for id in engine.seen} for engine in bench.engines]
    assert homes in ([{"x"}, {"y"}], [{"y"}, {"x"}])


def test_a_busy_instance_is_not_waited_for(make: Make) -> None:
    bench = make(workers=2, slots=1)
    prompt = "x" * (2 * BLOCK_BYTES)
    bench.ask("a", prompt=prompt)
    bench.ask("b", prompt=prompt)
    assert bench.scheduler.queued_count == 0
    assert sorted(bench.running.split()) == ["a", "b"]


def test_an_instance_that_comes_takes_who_waits(make: Make) -> None:
    bench = make(slots=1)
    bench.ask("a")
    bench.ask("b")
    bench.engines.append(Engine("new"))
    bench.scheduler.add_worker(bench.engines[-1])  # type: ignore[arg-type]
    assert list(bench.engines[-1].running) == ["b"]
    assert bench.scheduler.llm.slots == 2


def test_an_instance_that_goes_ends_what_it_has_and_gets_nothing_more(make: Make) -> None:
    bench = make(workers=2, slots=1)
    bench.ask("a")
    bench.ask("b")
    leaving, staying = sorted(bench.engines, key=lambda engine: "a" not in engine.running)
    bench.ask("c")

    async def leave() -> None:
        removal = asyncio.ensure_future(bench.scheduler.remove_worker(leaving))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert not removal.done()
        leaving.finish("a")
        assert "c" not in leaving.seen
        await removal

    bench.run(leave())
    assert bench.scheduler.llm.slots == 1
    staying.finish("b")
    assert list(staying.running) == ["c"]
    staying.finish("c")
    assert bench.scheduler.busy_workers == 0


def test_adapters_in_use_are_told(make: Make) -> None:
    bench = make(slots=2)
    for id, adapter in (("a", "x"), ("b", ""), ("c", "y"), ("d", "x"), ("e", "")):
        bench.ask(id, adapter=adapter)
    assert (bench.scheduler.adapters_running(), bench.scheduler.adapters_waiting()) == (["x"], ["x", "y"])


# Numbers


def test_what_a_request_took_is_counted_once(make: Make) -> None:
    bench = make()
    bench.ask("a")
    bench.ask("b")
    bench.now += 10 * MS
    bench.engine.say("a", tokens=0, usage=Usage(prompt=10, cached=4), kv=0.25)
    assert bench.scheduler.llm.kv_usage == 0.25
    bench.now += 10 * MS
    bench.engine.say("a")
    bench.now += 30 * MS
    bench.engine.say("a", tokens=2)
    bench.engine.say("a", tokens=0, usage=Usage(prompt=10, completion=3, cached=4), finish="length")
    llm = bench.scheduler.llm
    assert (llm.prompt_tokens, llm.cached_tokens, llm.generated_tokens) == (10, 4, 3)
    assert llm.finished["length"] == 1
    assert (llm.first_token_s.total, sum(llm.first_token_s.counts)) == (pytest.approx(0.02), 1)
    assert (llm.next_token_s.total, sum(llm.next_token_s.counts)) == (pytest.approx(0.03), 2)
    assert llm.queue_s.total == 0
    assert llm.end_to_end_s.total == pytest.approx(0.05)
    assert llm.running == 1, "b has the slot now"
    bench.engine.finish("b")
    assert llm.queue_s.total == pytest.approx(0.05)
    assert sum(llm.finished.values()) == 2
    assert (llm.running, llm.kv_usage) == (0, 0.0)


def test_reasons_of_refusals_are_there_before_the_first() -> None:
    """Metrics are read in another thread: a reason that appeared meanwhile would break the walk over them."""
    llm = LLMStatistics(1, 16)
    walk = iter(llm.rejected.items())
    next(walk)
    for reason in ("queue_full", "timeout", "stopping"):
        llm.reject(reason)
    assert len(list(walk)) == 2


def test_when_to_come_back_grows_with_the_queue_and_is_bounded(make: Make) -> None:
    bench = make()
    assert 1 <= bench.scheduler.retry_after_s() <= 2, "nothing is known yet"
    bench.ask("a")
    bench.now += 10_000 * MS
    bench.engine.finish("a")
    for number in range(3):
        bench.ask(str(number))
    assert 30 <= bench.scheduler.retry_after_s() <= 45  # three of 10 s each, and up to half as much again
    for number in range(3, 100):
        bench.ask(str(number))
    assert MOST_RETRY_S <= bench.scheduler.retry_after_s() <= 1.5 * MOST_RETRY_S


def test_many_that_leave_while_one_runs_cost_nothing(make: Make) -> None:
    bench = make()
    bench.ask("a")
    for _ in range(500):
        bench.ask("again")
        bench.cancel("again")
    assert bench.scheduler.inflight_count == 1
    assert sum(len(waiting) for level in bench.scheduler._queue._levels.values()
               for waiting in level._turns.values()) < 50  # fmt: skip
