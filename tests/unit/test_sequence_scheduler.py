"""The sequence scheduler with workers that finish when the test says so: no threads, no sleeping, a clock by hand.

Expected behaviour is Triton's (core, sequence_batch_scheduler.cc)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.config.complete import normalise
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, ErrorCode, InvalidArgument, QueueRejected, Unsupported
from doorstep.request import LATER, RESCHEDULE, Batch, InferenceRequest, InferenceResponse
from doorstep.scheduler.build import build_scheduler
from doorstep.scheduler.sequence import SequenceScheduler
from doorstep.stats import ModelStatistics
from doorstep.types import INT32, Tensor

CONTROLS = """
    control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } }
    control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [ 0, 1 ] } }
    control_input { name: "END" control { kind: CONTROL_SEQUENCE_END int32_false_true: [ 0, 1 ] } }
    control_input { name: "CORRID" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } }
"""
STATE = 'state { input_name: "IN_STATE" output_name: "OUT_STATE" data_type: TYPE_INT32 dims: [ 1 ] }'
DIRECT = "direct { }"
OLDEST = "oldest { max_candidate_sequences: 4 }"


@dataclass
class Inbox:
    responses: list[InferenceResponse] = field(default_factory=list)
    final: bool = False

    def send(self, response: InferenceResponse, final: bool) -> None:
        assert not self.final
        self.responses.append(response)
        self.final = final

    @property
    def value(self) -> int:
        (response,) = self.responses
        assert response.error is None, response.error
        return int(response.outputs[0].array[0, 0])

    @property
    def error(self) -> DoorstepError:
        (response,) = self.responses
        assert response.error is not None
        return response.error


class Adder:
    """OUT = IN + state, OUT_STATE = OUT; holds its batch until `finish`."""

    def __init__(self) -> None:
        self.name = "w"
        self.batches: list[list[str]] = []  # ids; "-" is padding
        self.seen: list[list[dict[str, Any]]] = []  # values of every input
        self.current: tuple[Batch, Callable[[Batch], None]] | None = None

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        assert self.current is None, "one batch at a time"
        self.batches.append([r.id or "-" for r in batch.requests])
        self.seen.append([{n: t.array.tolist() for n, t in r.inputs.items()} for r in batch.requests])
        self.current = (batch, done)

    def finish(self, *verdicts: Any) -> None:
        assert self.current is not None
        batch, done = self.current
        self.current = None
        for i, request in enumerate(batch.requests):
            total = request.inputs["IN"].array + (request.inputs["IN_STATE"].array if self._state(request) else 0)
            outputs = [Tensor("OUT", INT32, total)]
            if self._state(request):
                outputs.append(Tensor("OUT_STATE", INT32, total))
            batch.results[i] = verdicts[i] if i < len(verdicts) else outputs
        batch.compute_start_ns = batch.compute_end_ns = 1
        done(batch)

    def _state(self, request: InferenceRequest) -> bool:
        return "IN_STATE" in request.inputs

    def close(self) -> None: ...


class Bench:
    def __init__(
        self, strategy: str, *, batch: int = 4, workers: int = 1, more: str = "", decoupled: bool = False
    ) -> None:
        self.loop = asyncio.new_event_loop()
        text = f"""
            name: "m" max_batch_size: {batch}
            input {{ name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }}
            output {{ name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }}
            sequence_batching {{ {strategy} {CONTROLS} {more} }}
            model_transaction_policy {{ decoupled: {str(decoupled).lower()} }}
        """
        message = text_format.Parse(text, proto.ModelConfig())
        normalise(message)
        self.config = ModelConfig.from_proto(message)
        self.workers = [Adder() for _ in range(workers)]
        self.stats = ModelStatistics()
        self.now = 1_000_000
        built = build_scheduler(self.config, "1", list(self.workers), self.stats, self.loop)
        assert isinstance(built, SequenceScheduler)
        self.scheduler = built
        self.set_clock()

    def set_clock(self) -> None:
        clock = lambda: self.now  # noqa: E731
        self.scheduler.clock = self.scheduler._runner._clock = clock
        for batcher in self.scheduler._batchers.values():
            batcher._clock = clock  # type: ignore[attr-defined]

    def send(
        self, sequence: int | str, value: int = 1, flags: str = "", *, rows: int = 1, **attributes: Any
    ) -> tuple[InferenceRequest, Inbox]:
        """`flags` are some of "s" and "e"."""
        inbox = Inbox()
        tensor = Tensor("IN", INT32, np.full((rows, 1), value, np.int32))
        request = InferenceRequest("m", {"IN": tensor}, inbox, id=f"{sequence}.{value}")
        request.correlation_id = sequence
        request.rows = rows
        request.sequence_start, request.sequence_end = "s" in flags, "e" in flags
        for name, attribute in attributes.items():
            setattr(request, name, attribute)
        self.scheduler.enqueue(request)
        return request, inbox

    def turn(self) -> None:
        """What is due now happens, and what that makes due."""
        for _ in range(4):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    def finish(self, *verdicts: Any) -> None:
        """The first worker's batch ends, and the next begins."""
        self.workers[0].finish(*verdicts)
        self.turn()

    def later(self, us: int) -> None:
        self.now += us * 1000
        self.scheduler._alarm._on_time()
        self.turn()

    @property
    def batches(self) -> list[list[str]]:
        return self.workers[0].batches

    def assert_empty(self) -> None:
        s = self.scheduler
        assert (s.queued_count, s.inflight_count, s.sequence_count, s._padding) == (0, 0, 0, 0)
        assert not s._backlog
        assert not s._touched_ns
        assert len(s._ready) == sum(len(b.slots) for b in s._batchers.values())


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


@pytest.fixture(params=[DIRECT, OLDEST], ids=["direct", "oldest"])
def either(request: pytest.FixtureRequest, bench: Callable[..., Bench]) -> Callable[..., Bench]:
    return lambda **options: bench(request.param, **options)


Make = Callable[..., Bench]


# What every request must say


def test_a_request_without_a_correlation_id_is_refused(either: Make) -> None:
    b = either()
    nothing: int | str
    for nothing in (0, ""):
        with pytest.raises(InvalidArgument) as error:
            b.send(nothing, flags="s")
        assert (
            error.value.message == "inference request to model 'm' must specify a non-zero or non-empty correlation ID"
        )
    b.assert_empty()


def test_a_request_of_an_unknown_sequence_must_start_it(either: Make) -> None:
    b = either()
    with pytest.raises(InvalidArgument) as error:
        b.send(7, flags="e")
    assert error.value.message == (
        "inference request for sequence 7 to model 'm' must specify the START flag on the first request of the sequence"
    )
    b.assert_empty()


def test_only_single_rows_are_taken(either: Make) -> None:
    b = either()
    with pytest.raises(InvalidArgument) as error:
        b.send(7, flags="s", rows=2)
    assert error.value.message == (
        "inference request to model 'm' must specify batch-size 1 due to requirements of sequence batcher"
    )


def test_the_kind_of_a_correlation_id_is_the_controls(either: Make) -> None:
    b = either()
    with pytest.raises(InvalidArgument) as error:
        b.send("a", flags="s", id="r")
    assert error.value.message == (
        "[request id: r] sequence batching control 'CORRID' data-type is 'BYTES', but model 'm' expects 'UINT64'"
    )
    with pytest.raises(Unsupported, match="string correlation ID cannot be longer than 128 characters"):
        b.send("a" * 129, flags="s")
    b.assert_empty()


# Order, slots and batches


def test_a_sequence_has_its_requests_run_in_order_one_at_a_time(either: Make) -> None:
    b = either(more=STATE)
    inboxes = [b.send(5, v, f)[1] for v, f in ((1, "s"), (2, ""), (3, "e"))]
    b.turn()
    for _ in range(3):
        b.finish()
    assert b.batches == [["5.1"], ["5.2"], ["5.3"]]
    assert [i.value for i in inboxes] == [1, 3, 6]
    b.assert_empty()


def test_direct_rows_are_slots_and_holes_are_not_ready(bench: Make) -> None:
    b = bench(DIRECT)
    for sequence in (1, 2, 3):
        b.send(sequence, 1, "s")
    b.turn()
    b.finish()
    b.send(3, 2)
    b.turn()
    assert b.batches == [["1.1", "2.1", "3.1"], ["-", "-", "3.2"]]
    hole = {"IN": [[0]], "START": [[0]], "END": [[0]], "READY": [[0]], "CORRID": [[0]]}
    assert b.workers[0].seen[1][:2] == [hole, hole]
    assert b.workers[0].seen[1][2] == {"IN": [[2]], "START": [[0]], "END": [[0]], "READY": [[1]], "CORRID": [[3]]}
    assert b.scheduler.inflight_count == 1, "padding is nobody's request"
    b.finish()
    assert (b.stats.success_count, b.stats.inference_count, b.stats.execution_count) == (4, 4, 2)
    assert {size: batch.count for size, batch in b.stats.batches.items()} == {3: 2}, "padding is part of the batch"
    b.send(1, 3)
    b.turn()
    assert b.batches[2] == ["1.3"], "a batch goes no further than the last slot with a request"
    b.finish()
    for sequence in (1, 2, 3):
        b.send(sequence, 9, "e")
    b.turn()
    b.finish()
    b.assert_empty()


def test_oldest_batches_are_the_sequences_with_a_request(bench: Make) -> None:
    b = bench(OLDEST)
    for sequence in (1, 2, 3):
        b.send(sequence, 1, "s")
    b.turn()
    b.finish()
    b.send(3, 2, "e")
    b.send(1, 2, "e")
    b.turn()
    assert b.batches == [["1.1", "2.1", "3.1"], ["3.2", "1.2"]]
    b.finish()
    b.send(2, 2, "e")
    b.turn()
    b.finish()
    b.assert_empty()


def test_every_flag_is_told_to_the_model(either: Make) -> None:
    b = either()
    for value, flags in ((1, "s"), (2, ""), (3, "e"), (4, "se")):
        b.send(5, value, flags)
        b.turn()
        b.finish()
    said = [{n: v[0][0] for n, v in batch[0].items()} for batch in b.workers[0].seen]
    assert [(s["START"], s["END"], s["READY"], s["CORRID"]) for s in said] == [
        (1, 0, 1, 5), (0, 0, 1, 5), (0, 1, 1, 5), (1, 1, 1, 5),
    ]  # fmt: skip
    b.assert_empty()


def test_a_fifth_sequence_waits_for_a_slot_and_gets_the_first_free_one(either: Make) -> None:
    b = either()
    for sequence in range(1, 6):
        b.send(sequence, 1, "s")
    b.turn()
    assert b.batches == [["1.1", "2.1", "3.1", "4.1"]]
    b.finish()
    b.send(5, 2)
    b.send(3, 2, "e")
    b.turn()
    b.finish()
    b.turn()
    b.finish()
    b.finish()
    flat = [id for batch in b.batches[1:] for id in batch if id != "-"]
    assert flat == ["3.2", "5.1", "5.2"]
    for sequence in (1, 2, 4, 5):
        b.send(sequence, 9, "e")
    b.turn()
    b.finish()
    b.assert_empty()


def test_a_whole_sequence_in_the_backlog_does_not_meet_the_next_of_its_name(either: Make) -> None:
    b = either(more=STATE)
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    waiting = [b.send(9, v, f)[1] for v, f in ((1, "s"), (2, "e"), (30, "s"), (40, "e"))]
    b.turn()
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 2, "e")
    while b.workers[0].current:
        b.finish()
    assert [i.value for i in waiting] == [1, 3, 30, 70]
    b.assert_empty()


def test_a_sequence_that_starts_again_goes_on_in_its_slot(either: Make, caplog: pytest.LogCaptureFixture) -> None:
    b = either(more=STATE)
    with caplog.at_level(logging.WARNING, logger="doorstep.scheduler"):
        inboxes = [b.send(5, v, f)[1] for v, f in ((1, "s"), (2, ""), (10, "s"), (20, "e"))]
    assert "sequence 5 for model 'm' has a conflict" in caplog.text
    b.turn()
    for _ in range(4):
        b.finish()
    assert [i.value for i in inboxes] == [1, 3, 10, 30]
    b.assert_empty()


def test_sequences_spread_over_instances_and_stay_there(either: Make) -> None:
    b = either(workers=2)
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    b.turn()
    first = [w.batches for w in b.workers]
    assert sorted(len(batches[0]) for batches in first) == [2, 2]
    homes = {id[0]: i for i, batches in enumerate(first) for id in batches[0]}
    for worker in b.workers:
        worker.finish()
    for sequence in (4, 3, 2, 1):
        b.send(sequence, 2, "e")
    b.turn()
    for i, worker in enumerate(b.workers):
        worker.finish()
        assert {id[0] for id in worker.batches[1]} == {s for s, home in homes.items() if home == i}
    b.turn()
    b.assert_empty()


# Filling batches


def test_sixty_four_interleaved_sequences_fill_their_batches(bench: Make) -> None:
    """Each client sends its next request when it has its answer, as real ones do."""
    for strategy in (DIRECT, "oldest { max_candidate_sequences: 64 }"):
        b = bench(strategy, batch=16 if "oldest" in strategy else 64)
        steps = dict.fromkeys(range(1, 65), 0)
        for sequence in steps:
            b.send(sequence, 0, "s")
        for _ in range(64 * 10 // b.config.max_batch_size):
            b.turn()
            ids = b.batches[-1]
            b.workers[0].finish()
            for id in ids:
                sequence = int(id.split(".")[0])
                steps[sequence] += 1
                if steps[sequence] < 10:
                    b.send(sequence, steps[sequence], "e" if steps[sequence] == 9 else "")
        b.turn()
        mean = b.stats.inference_count / b.stats.execution_count
        assert mean >= 0.8 * b.config.max_batch_size
        assert b.stats.success_count == 640
        b.assert_empty()


def test_direct_waits_for_slots_to_fill_no_longer_than_its_delay(bench: Make) -> None:
    b = bench("direct { max_queue_delay_microseconds: 500 minimum_slot_utilization: 0.5 }")
    b.send(1, 1, "s")
    b.turn()
    assert b.batches == []
    b.later(500)
    assert b.batches == [["1.1"]]
    b.finish()
    b.send(1, 2)
    b.send(2, 1, "s")
    b.turn()
    assert b.batches[1] == ["1.2", "2.1"], "half of the slots are ready"
    b.finish()


def test_oldest_waits_for_company_no_longer_than_its_delay(bench: Make) -> None:
    b = bench("oldest { max_candidate_sequences: 4 max_queue_delay_microseconds: 500 preferred_batch_size: [ 2 ] }")
    b.send(1, 1, "s")
    b.turn()
    assert b.batches == []
    b.later(500)
    assert b.batches == [["1.1"]]
    b.finish()
    b.send(1, 2)
    b.send(2, 1, "s")
    b.turn()
    assert b.batches[1] == ["1.2", "2.1"]
    b.finish()


def test_the_environment_can_hold_batches_back(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "5")
    monkeypatch.setenv("TRITONSERVER_BACKLOG_DELAY_SCHEDULER", "2")
    b = bench(DIRECT)
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    b.send(1, 2)
    b.send(8, 1, "se")
    b.turn()
    assert b.batches == []
    b.send(9, 1, "se")
    b.turn()
    assert b.batches == [["1.1", "2.1", "3.1", "4.1"]]
    b.finish()


def test_what_was_held_back_goes_everywhere_at_once(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "6")
    monkeypatch.setenv("TRITONSERVER_BACKLOG_DELAY_SCHEDULER", "1")
    b = bench(DIRECT, batch=1, workers=3)
    for sequence in (1, 2, 3):
        b.send(sequence, 1, "s")
        b.send(sequence, 2, "e")
    b.turn()
    assert [w.batches for w in b.workers] == [[], [], []]
    b.send(4, 1, "se")
    b.turn()
    assert sorted(w.batches[0] for w in b.workers) == [["1.1"], ["2.1"], ["3.1"]]
    for _ in range(3):
        for worker in b.workers:
            if worker.current is not None:
                worker.finish()
            b.turn()
    b.assert_empty()


# Endings


def test_an_idle_sequence_gives_up_its_slot(either: Make) -> None:
    b = either(more="max_sequence_idle_microseconds: 1000")
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    b.turn()
    b.finish()
    waiting = b.send(5, 1, "s")[1]
    b.later(500)
    b.send(2, 2)
    b.turn()
    b.finish()
    assert not waiting.responses
    b.later(501)  # 1, 3 and 4 are idle, 2 is not
    b.finish()
    assert waiting.value == 1
    with pytest.raises(InvalidArgument, match="for sequence 1 to model 'm' must specify the START flag"):
        b.send(1, 3)
    b.send(2, 3, "e")
    b.turn()
    b.finish()
    b.later(2000)
    b.later(2000)
    b.assert_empty()


def test_a_sequence_of_the_backlog_is_not_idle(either: Make) -> None:
    b = either(more="max_sequence_idle_microseconds: 1000")
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    b.turn()
    waiting = b.send(5, 1, "s")[1]
    b.later(5000)
    b.send(5, 2, "e")
    while b.workers[0].current:
        b.finish()
    assert waiting.value == 1
    b.later(100_000)
    b.assert_empty()


def test_a_backlog_expires_with_the_shortest_of_its_timeouts(either: Make) -> None:
    b = either()
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    b.turn()
    first = b.send(5, 1, "s", timeout_us=900)[1]
    second = b.send(5, 2, timeout_us=100)[1]
    patient = b.send(6, 1, "se")[1]
    b.later(99)
    assert not first.responses
    b.later(1)
    for inbox in (first, second):
        assert inbox.error.message == "timeout of the corresponding sequence has been expired"
        assert inbox.error.code is ErrorCode.UNAVAILABLE
    with pytest.raises(InvalidArgument, match="must specify the START flag"):
        b.send(5, 3)
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 2, "e")
    while b.workers[0].current:
        b.finish()
    assert patient.value == 1
    b.assert_empty()


def test_a_cancelled_request_ends_its_sequence_when_its_turn_comes(either: Make) -> None:
    b = either()
    first = b.send(5, 1, "s")[1]
    second, second_inbox = b.send(5, 2)
    third = b.send(5, 3)[1]
    b.turn()
    second.cancel()
    assert second_inbox.error.code is ErrorCode.CANCELLED
    b.finish()
    assert first.value == 1
    assert third.error.code is ErrorCode.CANCELLED
    assert b.batches == [["5.1"]]
    with pytest.raises(InvalidArgument, match="must specify the START flag"):
        b.send(5, 4)
    b.assert_empty()


def test_a_cancelled_request_of_the_backlog_takes_its_sequence_with_it(either: Make) -> None:
    b = either()
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 1, "s")
    b.turn()
    request, inbox = b.send(5, 1, "s")
    after = b.send(5, 2, "e")[1]
    other = b.send(6, 1, "se")[1]
    request.cancel()
    assert inbox.error.code is ErrorCode.CANCELLED
    for sequence in (1, 2, 3, 4):
        b.send(sequence, 2, "e")
    while b.workers[0].current:
        b.finish()
    assert after.error.code is ErrorCode.CANCELLED
    assert other.value == 1
    b.assert_empty()


def test_the_state_of_a_cancelled_running_request_is_kept(either: Make) -> None:
    b = either(more=STATE)
    request, _ = b.send(5, 10, "s")
    b.turn()
    request.cancel()
    after = b.send(5, 1, "e")[1]
    b.finish()
    b.finish()
    assert after.value == 11
    b.assert_empty()


def test_a_stopping_scheduler_lets_sequences_go_on_and_refuses_new_ones(either: Make) -> None:
    b = either()
    b.send(5, 1, "s")
    b.scheduler.stop()
    with pytest.raises(QueueRejected, match="Server is stopping"):
        b.send(6, 1, "s")
    last = b.send(5, 2, "e")[1]
    b.turn()
    b.finish()
    b.finish()
    assert last.value == 2
    b.assert_empty()


def test_a_failed_request_does_not_end_its_sequence(either: Make) -> None:
    b = either(more=STATE)
    b.send(5, 10, "s")
    b.turn()
    b.finish()
    failed = b.send(5, 1)[1]
    b.turn()
    b.finish(InvalidArgument("no"))
    assert failed.error.message == "no"
    last = b.send(5, 2, "e")[1]
    b.turn()
    b.finish()
    assert last.value == 12
    b.assert_empty()


# Implicit state


def test_states_are_never_shown_and_always_asked_for(either: Make) -> None:
    b = either(more=STATE)
    request, inbox = b.send(5, 1, "s", requested_outputs=("OUT",))
    b.turn()
    assert request.requested_outputs == ("OUT", "OUT_STATE")
    b.finish()
    assert [t.name for t in inbox.responses[0].outputs] == ["OUT"]
    b.send(5, 1, "e")
    b.turn()
    b.finish()
    b.assert_empty()


def test_the_states_of_a_batch_are_each_sequences_own(either: Make) -> None:
    b = either(more=STATE)
    totals: dict[int, list[int]] = {s: [] for s in (1, 2, 3)}
    for step, flags in enumerate(("s", "", "", "e")):
        inboxes = {s: b.send(s, s * 10**step, flags)[1] for s in totals}
        b.turn()
        b.finish()
        for s, inbox in inboxes.items():
            totals[s].append(inbox.value)
    assert totals == {s: [s, s * 11, s * 111, s * 1111] for s in (1, 2, 3)}
    b.assert_empty()


def test_padding_does_not_touch_a_sequences_state(bench: Make) -> None:
    b = bench(DIRECT, more=STATE)
    b.send(1, 5, "s")
    b.send(2, 7, "s")
    b.turn()
    b.finish()
    b.send(2, 1)
    b.turn()
    assert b.batches[1] == ["-", "2.1"]
    assert b.workers[0].seen[1][0]["IN_STATE"] == [[0]]
    b.finish()
    last = [b.send(1, 1, "e")[1], b.send(2, 1, "e")[1]]
    b.turn()
    b.finish()
    assert [i.value for i in last] == [6, 9]
    b.assert_empty()


# Iterative sequences


def test_an_iterative_request_comes_again_without_flags_until_it_is_answered(either: Make) -> None:
    b = either(more=f"iterative_sequence: true {STATE}")
    inbox = b.send(0, 3)[1]
    b.turn()
    b.finish(RESCHEDULE)
    b.finish(RESCHEDULE)
    assert not inbox.responses
    assert b.scheduler.inflight_count == 1
    b.finish()
    assert inbox.value == 3, "a rescheduled run gives no state"
    starts = [batch[0]["START"] for batch in b.workers[0].seen]
    ids = {batch[0]["CORRID"][0][0] for batch in b.workers[0].seen}
    assert starts == [[[1]], [[0]], [[0]]]
    assert len(ids) == 1
    assert ids != {0}
    b.turn()
    b.assert_empty()


def test_iterative_requests_share_batches_with_new_ones(either: Make) -> None:
    b = either(more="iterative_sequence: true")
    first = b.send(0, 1)[1]
    b.turn()
    second = b.send(0, 2)[1]
    b.finish(RESCHEDULE)
    assert sorted(b.batches[1]) == ["0.1", "0.2"]
    b.finish()
    assert (first.value, second.value) == (1, 2)
    b.turn()
    b.assert_empty()


def test_an_iterative_request_that_is_cancelled_frees_its_slot(either: Make) -> None:
    b = either(more="iterative_sequence: true")
    running, _ = b.send(0, 1)
    b.turn()
    queued, _ = b.send(0, 2)
    queued.cancel()
    running.cancel()
    b.finish(RESCHEDULE)
    b.turn()
    b.assert_empty()


def test_a_model_that_streams_and_reschedules_ends_its_sequence_with_the_final_response(either: Make) -> None:
    b = either(more="iterative_sequence: true", decoupled=True)
    request, inbox = b.send(0, 1)
    b.turn()
    for i in range(3):
        current = b.workers[0].current
        assert current is not None
        batch = current[0]
        batch.emit(request, [Tensor("OUT", INT32, np.full((1, 1), i, np.int32))], i == 2)
        b.finish(RESCHEDULE if i < 2 else LATER)
    assert [int(r.outputs[0].array[0, 0]) for r in inbox.responses] == [0, 1, 2]
    assert inbox.final
    b.turn()
    b.assert_empty()


def test_rescheduling_needs_an_iterative_sequence(either: Make) -> None:
    b = either()
    inbox = b.send(5, 1, "se")[1]
    b.turn()
    b.finish(RESCHEDULE)
    assert inbox.error.code is ErrorCode.INVALID_ARG
    assert inbox.error.message == (
        "Request is released with TRITONSERVER_REQUEST_RELEASE_RESCHEDULE, while the model is not configured to handle "
        "such a flag."
    )
    b.assert_empty()


def test_a_worker_leaves_when_its_sequences_have_ended(either: Make) -> None:
    b = either(workers=2)
    for sequence in (1, 2):
        b.send(sequence, 1, "s")
    b.turn()
    leaving = next(w for w in b.workers if w.batches == [["1.1"]])
    for worker in b.workers:
        worker.finish()
    gone = b.loop.create_task(b.scheduler.remove_worker(leaving))
    b.turn()
    assert not gone.done()
    new = b.send(3, 1, "s")[1]
    last = b.send(1, 2, "e")[1]
    b.turn()
    for worker in b.workers:
        if worker.current:
            worker.finish()
    b.turn()
    assert (new.value, last.value) == (1, 2)
    assert gone.done()
    b.send(2, 2, "e")
    b.send(3, 2, "e")
    b.turn()
    next(w for w in b.workers if w is not leaving).finish()
    b.turn()
    b.assert_empty()


def test_a_worker_that_comes_takes_what_waits(either: Make) -> None:
    b = either()
    for sequence in range(1, 6):
        b.send(sequence, 1, "s")
    b.turn()
    new = Adder()
    b.scheduler.add_worker(new)
    b.set_clock()
    b.turn()
    assert new.batches == [["5.1"]]
    new.finish()
    b.finish()
    for sequence in range(1, 6):
        b.send(sequence, 2, "e")
    b.turn()
    assert new.batches == [["5.1"], ["5.2"]]
    new.finish()
    b.finish()
    b.assert_empty()
