"""Responses from threads of the server's own process: in order, the loop woken once for many, no faster than taken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from doorstep.backends.base import ModelInstance
from doorstep.request import LATER, Batch, InferenceRequest
from doorstep.types import Tensor, datatype_of
from doorstep.workers.emitter import MOST_WAITING, Emitter
from doorstep.workers.responses import Responses
from doorstep.workers.thread import ThreadWorker

SECONDS = 30.0


class Loop:
    """Stands for the event loop: runs what it is told to when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.closed = False

    def call_soon_threadsafe(self, call: Callable[[], None]) -> None:
        if self.closed:
            raise RuntimeError("Event loop is closed")
        self.calls.append(call)

    def is_closed(self) -> bool:
        return self.closed

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


def a_request() -> InferenceRequest:
    return InferenceRequest("m", {}, sender=None)  # type: ignore[arg-type]


def test_many_responses_wake_the_loop_once_and_stay_in_order():
    loop, said = Loop(), []
    emit = Emitter(loop, lambda *what: said.append(what))  # type: ignore[arg-type]
    one = a_request()
    for n in range(10):
        emit(one, [n], n == 9)  # type: ignore[list-item]
    assert len(loop.calls) == 1
    loop.turn()
    assert [(what[1], what[2]) for what in said] == [([n], n == 9) for n in range(10)]
    emit(one, None, True)
    assert len(loop.calls) == 1


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_an_emitter_waits_while_the_loop_is_behind():
    loop, said = Loop(), []
    emit = Emitter(loop, lambda *what: said.append(what))  # type: ignore[arg-type]
    one = a_request()
    thread = in_thread(lambda: [emit(one, None, False) for _ in range(3 * MOST_WAITING)])  # type: ignore[func-returns-value]
    while len(said) < 3 * MOST_WAITING:
        assert len(emit._waiting) <= MOST_WAITING
        loop.turn()
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize("how", ["room", "cancel", "closed"])
def test_an_emitter_waits_for_its_client(how):
    loop, said = Loop(), []
    one = a_request()

    def hear(request: InferenceRequest, outputs: Any, final: bool) -> None:
        said.append(final)
        request.stalled = len(said) == 1

    emit = Emitter(loop, hear)  # type: ignore[arg-type]
    emit(one, None, False)
    loop.turn()
    assert one.stalled
    thread = in_thread(lambda: emit(one, None, False))
    while emit._changed is None:
        pass
    if how == "room":
        one.room()
    elif how == "cancel":
        one.cancelled = True
    else:
        loop.closed = True
    thread.join(SECONDS)
    assert not thread.is_alive()
    emit(one, None, True)  # the final one never waits
    if how != "closed":
        loop.turn()
        assert said == [False, False, True]


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class Counting(ModelInstance):
    """Answers each request with 0, 1, 2 … 99, one by one; says that it is ready when it is told to."""

    def __init__(self) -> None:
        self.ready: Any = True
        self.hold = threading.Event()
        self.hold.set()

    def execute(self, batch: Batch) -> None:
        self.hold.wait(SECONDS)
        for i, request in enumerate(batch.requests):
            for n in range(100):
                array = np.array([n])
                batch.emit(request, [Tensor("y", datatype_of(array), array)], n == 99)
            batch.results[i] = LATER

    def is_ready(self) -> bool:
        if isinstance(self.ready, Exception):
            raise self.ready
        return self.ready  # type: ignore[no-any-return]


def test_a_thread_emits_before_its_batch_is_done(loop):
    worker = ThreadWorker("t", Counting(), loop)
    heard: list[Any] = []
    done = threading.Event()
    batch = Batch([a_request(), a_request()], 2)
    batch.emit = lambda request, outputs, final: heard.append((request, outputs[0].array[0], final))  # type: ignore[index]
    counts: list[int] = []
    loop.call_soon_threadsafe(worker.submit, batch, lambda _: (counts.append(len(heard)), done.set()))
    assert done.wait(SECONDS)
    assert counts == [200]
    assert [what[1:] for what in heard if what[0] is batch.requests[1]] == [(n, n == 99) for n in range(100)]
    worker.close()


@pytest.mark.parametrize(("says", "means"), [(True, True), (False, False), (1, False), (ValueError("broken"), False)])
def test_a_thread_is_asked_whether_it_is_ready_even_while_it_computes(loop, says, means):
    instance = Counting()
    instance.ready = says
    instance.hold.clear()
    worker = ThreadWorker("t", instance, loop)
    busy, answers, answered = threading.Event(), [], threading.Event()
    loop.call_soon_threadsafe(worker.submit, Batch([a_request()], 1), lambda _: busy.set())
    for _ in range(2):
        loop.call_soon_threadsafe(worker.ready, lambda ready: (answers.append(ready), answered.set()))
    assert answered.wait(SECONDS)
    assert not busy.is_set()
    instance.hold.set()
    assert busy.wait(SECONDS)
    worker.close()
    assert set(answers) == {means}


def test_responses_are_given_in_order_and_nothing_after_the_last():
    read: list[int] = []
    cancelled: list[int] = []
    responses = Responses(read.append, cancelled.append)
    ready: list[int] = []
    responses.notify(lambda: ready.append(1))
    with pytest.raises(TimeoutError):
        responses.get(0)
    responses.put(None, False, 5)
    responses.put(None, False, 6)
    assert ready == [1]
    responses.notify(lambda: ready.append(2))
    assert ready == [1, 2]
    responses.stop()
    responses.cancel()
    responses.cancel()
    responses.stop()
    responses.put(None, True, 7)
    responses.put(None, True, 8)
    assert [responses.get(0) for _ in range(3)] == [(None, False), (None, False), (None, True)]
    assert (read, cancelled) == ([5, 6], [False, True])
    with pytest.raises(TimeoutError):
        responses.get(0)
    responses.cancel()
    assert cancelled == [False, True]
