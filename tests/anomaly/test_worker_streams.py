"""Requests that get several responses from a worker process: in order, bounded, and ended however the process ends."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from raw_models import Heard, raw  # noqa: F401

from doorstep.errors import BackendError, DoorstepError
from doorstep.request import LATER, RESCHEDULE, Batch, InferenceRequest, Outputs
from doorstep.testing.python_models import SECONDS, PythonModel, request

ENDLESS = """
def execute(batch):
    for i, request in enumerate(batch.requests):
        batch.results[i] = LATER
        threading.Thread(target=emit, args=(batch, request), daemon=True).start()
def emit(batch, request):
    sent = 0
    while not request.cancelled:
        batch.emit(request, [tensor(np.zeros(100))], False)
        sent += 1
        if sent % 1000 == 0:
            say("sent", sent)
    batch.emit(request, None, True)
    say("stopped")
"""


def streams(served: PythonModel) -> Any:
    return served.worker._side.streams


class Answers(Heard):
    """Hears a batch's responses on the loop; a test waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def emit(self, request: InferenceRequest, outputs: Any, final: bool) -> None:
        with self.changed:
            super().emit(request, outputs, final)
            self.changed.notify_all()

    def wait(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, SECONDS), self.said[-5:]

    def finals(self) -> int:
        return sum(final for _, _, final in self.said)


def submit(served: PythonModel, answers: Answers, *requests: InferenceRequest) -> Future[Batch]:
    batch = Batch(list(requests), len(requests))
    batch.emit = answers.emit
    future: Future[Batch] = Future()
    served.loop.call_soon_threadsafe(served.worker.submit, batch, future.set_result)
    return future


def values(said: list[tuple[Any, bool]]) -> list[Any]:
    return [(outputs[0].array.tolist() if isinstance(outputs, list) else outputs, final) for outputs, final in said]


def test_responses_come_in_order_during_execute_and_after(raw):  # noqa: F811
    source = """
def execute(batch):
    for i, request in enumerate(batch.requests):
        batch.emit(request, [tensor([0])], False)
        batch.results[i] = LATER
    threading.Thread(target=rest, args=(batch,)).start()
def rest(batch):
    for n in range(1, 500):
        for request in batch.requests:
            batch.emit(request, Outputs([tensor([n])], {"n": n}), False)
    for request in batch.requests:
        batch.emit(request, None, True)
"""
    with raw(source) as served:
        answers = Answers()
        first, second = request({}), request({})
        done = submit(served, answers, first, second).result(SECONDS)
        assert done.results == [LATER, LATER]
        answers.wait(lambda: answers.finals() == 2)
        for one in (first, second):
            said = answers.of(one)
            assert values(said) == [([n], False) for n in range(500)] + [(None, True)]
            assert [o.parameters["n"] for o, _ in said[1:-1] if isinstance(o, Outputs)] == list(range(1, 500))
        assert len(streams(served)) == 0
        assert len(streams(served)._free) == 16384


def test_all_ways_a_request_can_end_in_one_batch(raw):  # noqa: F811
    source = """
def execute(batch):
    one, two, three, four, five, six = batch.requests
    batch.results = [
        [tensor([1])], Outputs([tensor([2])], {"key": "value"}), BackendError("three"), RESCHEDULE, LATER, LATER,
    ]
    batch.emit(five, [tensor([5])], True)
    batch.emit(six, BackendError("six"), False)
"""
    with raw(source) as served:
        answers = Answers()
        requests = [request({}) for _ in range(6)]
        results = submit(served, answers, *requests).result(SECONDS).results
        answers.wait(lambda: answers.finals() == 2)
        assert results[0][0].array.tolist() == [1]
        assert (results[1][0].array.tolist(), results[1].parameters) == ([2], {"key": "value"})
        assert isinstance(results[2], DoorstepError)
        assert results[3:] == [RESCHEDULE, LATER, LATER]
        assert values(answers.of(requests[4])) == [([5], True)]
        ((error, final),) = answers.of(requests[5])
        assert (error.message, final) == ("six", True)
        served.on_loop(lambda: None)
        assert (len(streams(served)), len(streams(served)._free)) == (0, 16384)


def test_what_was_said_before_the_result_is_heard_before_it(raw):  # noqa: F811
    source = """
def execute(batch):
    for i, request in enumerate(batch.requests):
        batch.emit(request, [tensor([int(request.id)])], False)
        batch.results[i] = (RESCHEDULE, LATER, BackendError("late"))[i % 3]
"""
    with raw(source) as served:
        for turn in range(300):
            answers = Answers()
            requests = [request({}, id=str(turn + i)) for i in range(3)]
            heard: list[int] = []
            batch = Batch(requests, 3)
            batch.emit = answers.emit
            done: Future[Batch] = Future()
            served.loop.call_soon_threadsafe(
                served.worker.submit,
                batch,
                lambda one, done=done, heard=heard, answers=answers: (
                    heard.append(len(answers.said)),
                    done.set_result(one),
                ),
            )
            done.result(SECONDS)
            assert heard == [3]
            assert [values(answers.of(one)) for one in requests] == [[([turn + i], False)] for i in range(3)]


@pytest.mark.parametrize("lie", [1, 10**9])
def test_a_process_that_claims_more_than_it_said_is_killed(raw, lie):  # noqa: F811
    source = f"def execute(batch):\n    batch.results = [LATER]\n    batch.emit.__self__.frame_count += {lie}\n"
    with raw(source) as served:
        (result,) = submit(served, Answers(), request({})).result(SECONDS).results
        assert "killed by SIGKILL" in result.message
        served.wait_for_line("less than it says it sent")


@pytest.mark.parametrize("size", [1000, 300_000, 3_000_000])
def test_large_tensors_in_streams_from_eight_threads(raw, size):  # noqa: F811
    source = f"""
def execute(batch):
    for i, request in enumerate(batch.requests):
        batch.results[i] = LATER
        threading.Thread(target=emit, args=(batch, request, i)).start()
def emit(batch, request, i):
    for n in range(12):
        batch.emit(request, [tensor(np.full({size}, i * 100 + n, np.float32))], False)
    batch.emit(request, [tensor(np.full({size}, i * 100 + 12, np.float32))], True)
"""
    with raw(source) as served:
        answers = Answers()
        requests = [request({}) for _ in range(8)]
        sums: dict[int, list[float]] = {id(one): [] for one in requests}

        def keep(one: InferenceRequest, outputs: Any, final: bool) -> None:
            array = outputs[0].array
            assert array.min() == array.max()
            assert array.size == size
            sums[id(one)].append(float(array[0]))
            Answers.emit(answers, one, None, final)  # the tensors are given back

        batch = Batch(requests, 8)
        batch.emit = keep
        served.loop.call_soon_threadsafe(served.worker.submit, batch, lambda _: None)
        answers.wait(lambda: answers.finals() == 8)
        assert list(sums.values()) == [[i * 100 + n for n in range(13)] for i in range(8)]


def test_an_endless_emitter_waits_for_a_slow_reader_and_ends_when_cancelled(raw):  # noqa: F811
    with raw(ENDLESS) as served:
        answers = Answers()
        slow, quick = request({}), request({})
        count = [0, 0]
        reached = threading.Event()

        def emit(one: InferenceRequest, outputs: Any, final: bool) -> None:
            if one is slow:
                one.stalled = True  # as its sender would, whose client does not read
            count[one is quick] += 1
            if count[1] > 20_000:
                reached.set()
            if final:
                Answers.emit(answers, one, None, True)

        batch = Batch([slow, quick], 2)
        batch.emit = emit
        served.loop.call_soon_threadsafe(served.worker.submit, batch, lambda _: None)
        assert reached.wait(SECONDS)  # the slow one is no reason for the other to wait
        window = 1024 * 1024 // 800
        assert count[0] <= window + 2
        before = count[0]
        served.on_loop(slow.room)
        served.wait_for(lambda: count[0] > before)
        assert count[0] <= 2 * window + 4
        served.on_loop(slow.cancel)  # wakes it where it waits for room
        served.on_loop(quick.cancel)
        served.wait_for_line("stopped", count=2)
        answers.wait(lambda: answers.finals() == 2)
        served.on_loop(lambda: None)
        assert (len(streams(served)), len(streams(served)._free)) == (0, 16384)
        assert psutil.Process(served.worker.pid).memory_info().rss < 300e6


def test_a_process_killed_in_mid_stream_ends_every_open_request(raw):  # noqa: F811
    with raw(ENDLESS) as served:
        answers = Answers()
        open_ = [request({}) for _ in range(3)]
        submit(served, answers, *open_[:2]).result(SECONDS)
        submit(served, answers, open_[2]).result(SECONDS)
        answers.wait(lambda: all(answers.of(one) for one in open_))
        os.kill(served.worker.pid, signal.SIGKILL)
        answers.wait(lambda: answers.finals() == 3)
        for one in open_:
            error, final = answers.of(one)[-1]
            assert final
            assert isinstance(error, BackendError)
            assert "Stub process 'raw_0' is not healthy. It ended (killed by SIGKILL)" in error.message
        again = request({})
        submit(served, answers, again).result(SECONDS)
        answers.wait(lambda: len(answers.of(again)) > 5)
        served.on_loop(again.cancel)
        answers.wait(lambda: answers.of(again)[-1][1])
        assert len(streams(served)) == 0


def test_a_process_that_dies_in_execute_answers_each_request_once(raw):  # noqa: F811
    source = """
def execute(batch):
    batch.emit(batch.requests[0], [tensor([0])], True)
    batch.emit(batch.requests[1], [tensor([1])], False)
    batch.emit.__self__.flush()
    os._exit(3)
"""
    with raw(source) as served:
        answers = Answers()
        requests = [request({}) for _ in range(3)]
        results = submit(served, answers, *requests).result(SECONDS).results
        assert results[0] is LATER  # it had all it should
        assert [isinstance(result, BackendError) for result in results] == [False, True, True]
        assert values(answers.of(requests[0])) == [([0], True)]
        assert values(answers.of(requests[1])) == [([1], False)]


def test_what_is_said_after_the_end_is_not_heard(raw):  # noqa: F811
    source = """
kept = []
def execute(batch):
    (request,) = batch.requests
    if request.id == "later":
        batch.results = [LATER]
        batch.emit(request, [tensor([1])], True)
        batch.emit(request, [tensor([2])], True)
        batch.emit(request, None, True)
        batch.emit(request, [tensor(np.zeros(100_000))], False)
    else:
        batch.results = [[tensor([0])]]
    for old, one in kept:
        old.emit(one, [tensor([9])], False)
        old.emit(one, None, True)
    kept.append((batch, request))
"""
    with raw(source) as served:
        answers = Answers()
        for id in ("later", "", "later", ""):
            one = request({}, id=id)
            submit(served, answers, one).result(SECONDS)
            if id:
                answers.wait(lambda one=one: answers.of(one))
            served.on_loop(lambda: None)
            assert values(answers.of(one)) == ([([1], True)] if id else [])
        assert served.restarts == 0


def test_ten_thousand_open_requests_and_more_than_there_are_flags(raw):  # noqa: F811
    # The news of a request without a flag comes over another socket than the batch that looks for it.
    source = """
import time
waiting = []
def execute(batch):
    batch.results = [LATER] * len(batch.requests)
    if batch.requests[0].id == "now":
        until = time.monotonic() + 30
        while sum(cancelled := [request.cancelled for _, request in waiting]) < 2 and time.monotonic() < until:
            pass
        for old, request in waiting:
            old.emit(request, [tensor([int(request.id)])], False)
            old.emit(request, None, True)
        batch.results = [[tensor([sum(cancelled)])]]
        waiting.clear()
        return
    waiting.extend((batch, request) for request in batch.requests)
"""
    count = 17_000
    with raw(source) as served:
        answers = Answers()
        requests = [request({}, id=str(i)) for i in range(count)]
        for at in range(0, count, 500):
            submit(served, answers, *requests[at : at + 500]).result(SECONDS)
        assert len(streams(served)) == count
        assert streams(served)._free == []
        for one in (requests[3], requests[16_900]):  # one with a flag, one without
            served.on_loop(one.cancel)
        served.on_loop(lambda: None)
        seen = submit(served, answers, request({}, id="now")).result(SECONDS).results[0][0].array.tolist()
        answers.wait(lambda: answers.finals() == count)
        assert seen == [2]
        said = {int(one.id): outputs[0].array.tolist()[0] for one, outputs, final in answers.said if not final}
        assert said == {i: i for i in range(count) if i not in (3, 16_900)}
        assert (len(streams(served)), len(streams(served)._free)) == (0, 16384)


def test_a_flag_belongs_to_its_request_to_the_end(raw):  # noqa: F811
    source = """
kept = []
def execute(batch):
    batch.results = [LATER if r.id == "open" else [tensor([int(k.cancelled) for k in kept])] for r in batch.requests]
    kept.extend(r for r in batch.requests if r.id != "")
"""
    with raw(source) as served:
        answers = Answers()
        first, second = request({}, id="open"), request({}, id="done")
        submit(served, answers, first, second).result(SECONDS)
        for _ in range(3):  # the flag of the second one is used again and again
            other = request({})
            other.cancelled = True
            assert submit(served, answers, other).result(SECONDS).results[0][0].array.tolist() == [0, 0]
        served.on_loop(first.cancel)
        assert submit(served, answers, request({})).result(SECONDS).results[0][0].array.tolist() == [1, 0]


def test_a_thread_that_emits_after_unload_harms_nothing(raw):  # noqa: F811
    served = raw(ENDLESS + "def unload():\n    time.sleep(0.2)\n")
    answers = Answers()
    one = request({})
    submit(served, answers, one).result(SECONDS)
    answers.wait(lambda: len(answers.said) > 100)
    pid = served.worker.pid
    served.close()
    assert not psutil.pid_exists(pid)
    error, final = answers.of(one)[-1]
    assert final
    assert "is closed" in error.message


def test_outputs_that_cannot_be_sent_end_their_request_with_an_error(raw):  # noqa: F811
    source = """
def execute(batch):
    batch.results = [LATER] * 2
    class Odd: pass
    batch.emit(batch.requests[0], Outputs([tensor([1])], {"odd": Odd()}), False)
    batch.emit(batch.requests[1], [Tensor("y", tensor([1.0]).datatype, np.array(["x"], object))], False)
"""
    with raw(source) as served:
        answers = Answers()
        requests = [request({}) for _ in range(2)]
        submit(served, answers, *requests).result(SECONDS)
        answers.wait(lambda: answers.finals() == 2)
        for one in requests:
            ((error, final),) = answers.of(one)
            assert final
            assert "the outputs cannot be sent" in error.message


def test_a_model_that_speaks_of_no_request_of_its_own_is_killed(raw):  # noqa: F811
    source = """
def execute(batch):
    batch.requests[0].number += 1000
    batch.results = [LATER]
    batch.emit(batch.requests[0], [tensor([1])], False)
    time.sleep(600)
"""
    with raw(source) as served:
        answers = Answers()
        (result,) = submit(served, answers, request({})).result(SECONDS).results
        assert "killed by SIGKILL" in result.message
        served.wait_for_line("a response to request 1001")


def test_the_memory_of_streams_is_given_back(raw, monkeypatch):  # noqa: F811
    monkeypatch.setattr("doorstep.workers.side_link.UNUSED_SECONDS", 0.5)
    source = """
import doorstep.workers.child_side as child_side
child_side.UNUSED_SECONDS = 0.5
def execute(batch):
    batch.results = [LATER]
    for _ in range(5):
        batch.emit(batch.requests[0], [tensor(np.zeros(1_000_000))], False)
    batch.emit(batch.requests[0], None, True)
"""
    with raw(source) as served:
        answers = Answers()
        submit(served, answers, request({})).result(SECONDS)
        answers.wait(lambda: answers.finals() == 1)
        link = served.worker._side.link
        assert len(link._outputs) > 0
        answers.said.clear()
        done = threading.Event()

        def look() -> None:
            if len(link._outputs):
                served.loop.call_later(0.05, look)
            else:
                done.set()

        served.loop.call_soon_threadsafe(look)
        assert done.wait(SECONDS)
        maps = Path(f"/proc/{served.worker.pid}/maps").read_text()
        assert "doorstep-outputs" not in maps
