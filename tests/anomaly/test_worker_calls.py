"""What model code asks of the server it runs in: other models' answers, the server's services, whatever goes wrong."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from concurrent.futures import Future
from typing import Any

import numpy as np
import psutil
import pytest
from raw_models import Sender, raw, tensor  # noqa: F401
from test_worker_streams import Answers, submit

from doorstep.backends.base import ModelCall
from doorstep.errors import BackendError, Cancelled, DoorstepError, NotFound
from doorstep.request import InferenceRequest, InferenceResponse, cancelled_error
from doorstep.services import Services
from doorstep.testing.python_models import SECONDS, PythonModel, request
from doorstep.workers.access import LoopAccess

NUMBERS = """
def execute(batch):
    for i, request in enumerate(batch.requests):
        batch.results[i] = run(request)
"""
ASK = (
    NUMBERS
    + """
def run(request):
    answers = server.call(ModelCall(request.id, list(request.inputs.values()), parent=request))
    got = []
    while True:
        outputs, final = answers.get()
        if isinstance(outputs, DoorstepError):
            return outputs
        if outputs is not None:
            got.append(float(outputs[0].array.sum()))
        if final:
            return [tensor(got)]
"""
)


class Models:
    """The other models of the server: `<name>` says what it does. Touched only from the loop."""

    def __init__(self) -> None:
        self.asked: list[InferenceRequest] = []
        self.open: list[InferenceRequest] = []
        self.changed = threading.Condition()
        self.heard: list[Any] = []
        self.services = Services(infer=self.infer, handlers={"twice": self.twice, "hear": self.hear, "odd": self.odd})

    def infer(self, one: InferenceRequest) -> None:
        name, _, count = one.model_name.partition(":")
        self.asked.append(one)
        if name == "missing":
            raise NotFound("Request for unknown model: 'missing' is not found")
        if name == "echo":
            self.answer(one, [tensor(t.array, t.name) for t in one.inputs.values()], True)
        elif name == "many":
            for n in range(int(count)):
                self.answer(one, [tensor(np.full(50_000, n, np.float32))], False)
            self.answer(one, None, True)
        elif name == "huge":
            for _ in range(3):
                self.answer(one, [tensor(np.ones(int(count), np.uint8))], False)
            self.answer(one, None, True)
        elif name == "fail":
            one.sender.send(InferenceResponse("fail", "1", one.id, error=BackendError("it failed")), True)
        elif name == "never":
            one.on_cancel = self.cancelled
        elif name == "endless":
            asyncio.get_running_loop().call_soon(self.endless, one)
        with self.changed:
            if name in ("never", "endless"):
                self.open.append(one)
            self.changed.notify_all()

    def endless(self, one: InferenceRequest) -> None:
        """As a model's worker does it: no more than its request has room for."""
        if one.cancelled:
            self.end(one)
        elif one.stalled:
            one.on_room = self.endless
            one.on_cancel = self.end
        else:
            self.answer(one, [tensor(np.zeros(1000))], False)
            asyncio.get_running_loop().call_soon(self.endless, one)

    def cancelled(self, one: InferenceRequest) -> None:
        self.end(one)

    def end(self, one: InferenceRequest) -> None:
        one.sender.send(InferenceResponse(one.model_name, "1", one.id, error=cancelled_error()), True)
        with self.changed:
            if one in self.open:
                self.open.remove(one)
            self.changed.notify_all()

    def answer(self, one: InferenceRequest, outputs: Any, final: bool) -> None:
        one.sender.send(InferenceResponse(one.model_name, "1", one.id, outputs or (), flag_only=outputs is None), final)

    async def twice(self, model: str, payload: Any, data: bytes) -> Any:
        await asyncio.sleep(0)
        if payload == "refuse":
            raise NotFound("there is none")
        if payload == "break":
            raise ValueError("broken")
        return {"model": model, "payload": payload, "data": len(data)}

    async def hear(self, model: str, payload: Any, data: bytes) -> None:
        if payload % 3 == 0:
            await asyncio.sleep(0)
        with self.changed:
            self.heard.append(payload)
            self.changed.notify_all()

    async def odd(self, model: str, payload: Any, data: bytes) -> Any:
        return object()

    def wait(self, condition: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, SECONDS)


@pytest.fixture
def models() -> Models:
    return Models()


def ask(served: PythonModel, name: str, array: np.ndarray | None = None) -> list[float]:
    (result,) = served.run(request({"x": array if array is not None else np.zeros(1)}, id=name))
    if isinstance(result, DoorstepError):
        raise result
    return result[0].array.tolist()


def calls(served: PythonModel) -> dict[int, Any]:
    return served.worker._side.calls._running


@pytest.mark.parametrize("size", [1, 5_000, 500_000])
def test_a_call_goes_out_and_its_response_comes_back(raw, models, size):  # noqa: F811
    with raw(ASK, services=models.services) as served:
        for n in range(3):
            assert ask(served, "echo", np.full(size, n, np.float64)) == [n * size]
        assert calls(served) == {}


def test_several_responses_come_in_order_however_large(raw, models):  # noqa: F811
    with raw(ASK, services=models.services) as served:
        assert ask(served, "many:40") == [n * 50_000 for n in range(40)]
        assert ask(served, "many:0") == []
        assert ask(served, "huge:5000000") == [5_000_000] * 3  # copied beside the loop
        assert calls(served) == {}


def test_refusals_and_failures_are_responses(raw, models):  # noqa: F811
    with raw(ASK, services=models.services) as served:
        with pytest.raises(DoorstepError, match="Request for unknown model: 'missing' is not found") as error:
            ask(served, "missing")
        assert error.value.code is NotFound("").code
        with pytest.raises(DoorstepError, match="it failed"):
            ask(served, "fail")
        assert ask(served, "echo") == [0]
        assert calls(served) == {}


def test_all_of_a_call_arrives(raw, models):  # noqa: F811
    source = (
        NUMBERS
        + """
def run(request):
    call = ModelCall("echo", [tensor([1], "a"), tensor([b"x"], "b"), tensor([2], "c")], "3", "my id", ["c"],
                     {"key": 5}, "sequence", True, True, 1000, 7, request)
    outputs, final = server.call(call).get(60)
    return [tensor([o.array[0]], o.name) for o in outputs] if final else None
"""
    )
    with raw(source, services=models.services) as served:
        (result,) = served.run(parent := request({}))
        assert [(t.name, t.array.tolist()) for t in result] == [("c", [2])]
        (one,) = models.asked
        assert (one.model_version, one.id, one.requested_outputs, one.parameters) == ("3", "my id", ("c",), {"key": 5})
        assert (one.correlation_id, one.sequence_start, one.sequence_end) == ("sequence", True, True)
        assert (one.timeout_us, one.priority, one.deadline_ns) == (1000, 7, parent.deadline_ns)
        assert one.inputs["b"].array.tolist() == [b"x"]


def test_calls_from_eight_threads_at_once(raw, models):  # noqa: F811
    source = (
        NUMBERS
        + """
def run(request):
    wrong = []
    def many(k):
        for n in range(50):
            size = 10 if n % 5 else 30_000
            pending = [server.call(ModelCall("echo", [tensor(np.full(size, k * 1000 + n + m))])) for m in range(3)]
            for m, responses in enumerate(pending):
                outputs, final = responses.get(60)
                if not final or outputs[0].array.shape != (size,) or (outputs[0].array != k * 1000 + n + m).any():
                    wrong.append((k, n, m, final, outputs))
    threads = [threading.Thread(target=many, args=(k,)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    return [tensor([len(wrong)])]
"""
    )
    with raw(source, services=models.services) as served:
        assert served.run(request({}))[0][0].array.tolist() == [0]
        assert len(models.asked) == 8 * 50 * 3
        assert calls(served) == {}


def test_waiting_for_an_answer_can_be_left_to_a_callback(raw, models):  # noqa: F811
    source = (
        NUMBERS
        + """
import asyncio
async def one(n):
    loop = asyncio.get_running_loop()
    responses = server.call(ModelCall("echo", [tensor([n])]))
    ready = asyncio.Event()
    responses.notify(lambda: loop.call_soon_threadsafe(ready.set))
    await ready.wait()
    return responses.get(0)[0][0].array[0]
async def all():
    return await asyncio.gather(*map(one, range(100)))
def run(request):
    return [tensor(asyncio.run(all()))]
"""
    )
    with raw(source, services=models.services) as served:
        assert served.run(request({}))[0][0].array.tolist() == list(range(100))


def test_no_answer_in_time_is_a_timeout(raw, models):  # noqa: F811
    source = (
        NUMBERS
        + """
def run(request):
    responses = server.call(ModelCall("never", []))
    try:
        responses.get(0.01)
    except TimeoutError as error:
        said = str(error)
    responses.cancel()
    outputs, final = responses.get(60)
    return [tensor([said]), tensor([outputs.message, str(final)])]
"""
    )
    with raw(source, services=models.services) as served:
        (result,) = served.run(request({}))
        assert result[0].array.tolist() == [b"no response within 0.01 s"]
        assert result[1].array.tolist() == [b"request has been cancelled", b"True"]
        assert models.open == []


def test_a_cancelled_request_cancels_what_is_asked_for_it(raw, models):  # noqa: F811
    with raw(ASK, services=models.services) as served:
        answers = Answers()
        one = request({}, id="never")
        done = submit(served, answers, one)
        models.wait(lambda: models.open)
        served.on_loop(one.cancel)
        (result,) = done.result(SECONDS).results
        assert result.code is Cancelled("").code
        assert (models.open, calls(served), served.worker._side.calls._children) == ([], {}, {})
        assert ask(served, "echo") == [0]


def test_a_process_killed_during_a_call_ends_the_call_too(raw, models):  # noqa: F811
    with raw(ASK, services=models.services) as served:
        answers = Answers()
        done = submit(served, answers, request({}, id="never"))
        models.wait(lambda: models.open)
        os.kill(served.worker.pid, signal.SIGKILL)
        (result,) = done.result(SECONDS).results
        assert "killed by SIGKILL" in result.message
        models.wait(lambda: not models.open)
        assert ask(served, "echo") == [0]


def test_a_model_that_reads_slowly_is_not_sent_all_at_once(raw, models):  # noqa: F811
    source = (
        NUMBERS
        + """
def run(request):
    responses = server.call(ModelCall("endless", []))
    say("called")
    for n in range(1000):
        if n in (0, 500):
            time.sleep(0.3)
        responses.get(60)
    responses.cancel()
    while not responses.get(60)[1]:
        pass
    return [tensor([n])]
"""
    )
    with raw(source, services=models.services) as served:
        most = 0

        def watch() -> None:
            nonlocal most
            most = max([most, *(sender._unread for sender in calls(served).values())])
            served.loop.call_later(0.001, watch)

        served.loop.call_soon_threadsafe(watch)
        assert served.run(request({}))[0][0].array.tolist() == [999]
        assert most <= 1024 * 1024 + 8192
        assert models.open == []


def test_the_servers_services_are_asked_and_told(raw, models):  # noqa: F811
    source = """
at_load = server.ask("twice", "loading")
server.tell("hear", 1)
def execute(batch):
    for n in range(2, 300):
        server.tell("hear", n)
    said = []
    for what, payload, data in [("twice", {"a": [1]}, b"x" * 100_000), ("twice", "refuse", b""),
                                ("twice", "break", b""), ("nothing", 1, b""), ("odd", 1, b"")]:
        try:
            said.append(str(server.ask(what, payload, data)))
        except DoorstepError as error:
            said.append(error.code.value + " " + error.message)
    try:
        server.ask("twice", object())
    except TypeError as error:
        said.append("TypeError")
    batch.results = [[tensor([str(at_load), *said])]]
def unload():
    say("at unload:", server.ask("twice", "unloading")["payload"])
"""
    with raw(source, services=models.services) as served:
        said = [text.decode() for text in served.run(request({}))[0][0].array.tolist()]
        assert said == [
            "{'model': 'raw', 'payload': 'loading', 'data': 0}",
            "{'model': 'raw', 'payload': {'a': [1]}, 'data': 100000}",
            "NOT_FOUND there is none",
            "INTERNAL twice: ValueError: broken",
            "UNSUPPORTED this server offers its models no 'nothing'",
            "INTERNAL 'odd' has no JSON answer: Type is not JSON serializable: object",
            "TypeError",
        ]
        models.wait(lambda: len(models.heard) == 299)
        assert models.heard == list(range(1, 300))
    assert any("at unload: unloading" in line for _, line in served.lines)


def test_more_is_told_than_is_heard(raw, models):  # noqa: F811
    """The process waits, and the server's memory does not grow."""
    gate = asyncio.Event()

    async def hear(model: str, payload: Any, data: bytes) -> None:
        await gate.wait()
        models.heard.append(payload)

    models.services.handlers["hear"] = hear
    source = """
def execute(batch):
    for n in range(60_000):
        server.tell("hear", n)
    batch.results = [[tensor([server.ask("twice", 1)["payload"]])]]
"""
    with raw(source, services=models.services) as served:
        done = submit(served, Answers(), request({}))
        waits = threading.Event()

        def look() -> None:
            if served.worker._side.link._reading:
                served.loop.call_later(0.01, look)
            else:
                waits.set()

        served.loop.call_soon_threadsafe(look)
        assert waits.wait(SECONDS)
        assert len(served.worker._side.calls._told) < 15_000
        served.on_loop(gate.set)
        assert done.result(SECONDS).results[0][0].array.tolist() == [1]
        assert models.heard == list(range(60_000))


def test_a_model_without_a_server_is_told_so_by_none(raw):  # noqa: F811
    with raw("def execute(batch):\n    batch.results = [[tensor([server is None])]]\n") as served:
        assert served.run(request({}))[0][0].array.tolist() == [True]


# Whether it is ready


def ready(served: PythonModel) -> bool:
    said: Future[bool] = Future()
    served.loop.call_soon_threadsafe(served.worker.ready, said.set_result)
    return said.result(SECONDS)


READY = """
state = {"ready": True}
def execute(batch):
    (request,) = batch.requests
    if request.id == "wait":
        say("busy")
        while not request.cancelled: time.sleep(0.01)
    state["ready"] = request.id
    batch.results = [[tensor([1])]]
def is_ready():
    return {"no": False, "break": 1 / 0 if state["ready"] == "break" else True, "one": 1}.get(state["ready"], True)
"""


def test_a_model_says_whether_it_is_ready_even_while_it_computes(raw):  # noqa: F811
    with raw(READY) as served:
        assert ready(served) is True
        for state, says in (("no", False), ("break", False), ("one", False), ("yes", True)):
            served.run(request({}, id=state))
            assert ready(served) is says
        served.wait_for_line("is_ready failed: ZeroDivisionError")
        busy = request({}, id="wait")
        done = submit(served, Answers(), busy)
        served.wait_for_line("busy")
        assert ready(served) is True
        served.on_loop(busy.cancel)
        done.result(SECONDS)


def test_a_model_that_does_not_say_in_time_is_not_ready(raw, monkeypatch):  # noqa: F811
    monkeypatch.setattr("doorstep.workers.side.READY_SECONDS", 0.1)
    source = """
def execute(batch):
    batch.results = [[tensor([threading.active_count()])]]
def is_ready():
    time.sleep(600)
"""
    with raw(source) as served:
        assert [ready(served) for _ in range(5)] == [False] * 5
        served.wait_for_line("is_ready has not answered within 0.1 s")
        assert served.run(request({}))[0][0].array.tolist()[0] <= 3  # one thread asks, not five


def test_a_process_that_died_is_not_ready_until_the_next_one_is(raw):  # noqa: F811
    with raw(READY.replace("(request,)", "batch.requests[0].id == 'die' and os._exit(1); (request,)")) as served:
        asked: list[bool] = []
        served.run(request({}, id="die"))
        served.on_loop(served.worker.ready, asked.append)
        assert asked == [False]
        served.wait_for_line("is ready")
        assert ready(served) is True


# In the server's own process


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_thread_calls_models_and_asks_the_server(loop, models):
    access = LoopAccess("me", models.services, loop)
    responses = access.call(ModelCall("many:5", []))
    got = [responses.get(SECONDS) for _ in range(6)]
    assert [outputs[0].array[0] for outputs, _ in got[:-1]] == [0, 1, 2, 3, 4]
    assert got[-1] == (None, True)
    error, final = access.call(ModelCall("missing", [])).get(SECONDS)
    assert (type(error), final) == (NotFound, True)
    assert access.ask("twice", 1, b"xyz") == {"model": "me", "payload": 1, "data": 3}
    with pytest.raises(NotFound, match="there is none"):
        access.ask("twice", "refuse")
    for n in range(100):
        access.tell("hear", n)
    models.wait(lambda: len(models.heard) == 100)
    assert models.heard == list(range(100))
    ready = threading.Event()
    responses = access.call(ModelCall("never", []))
    responses.notify(ready.set)
    responses.cancel()
    assert ready.wait(SECONDS)
    assert responses.get(0)[1]


def test_a_threads_calls_are_cancelled_with_the_request_they_are_made_for(loop, models):
    heard: list[Any] = []
    parent = request({})
    parent.on_cancel = before = heard.append
    access = LoopAccess("me", models.services, loop)
    first = access.call(ModelCall("never", [], parent=parent))
    second = access.call(ModelCall("never", [], parent=parent))
    models.wait(lambda: len(models.open) == 2)
    loop.call_soon_threadsafe(parent.cancel)
    for responses in (first, second):
        error, final = responses.get(SECONDS)
        assert (error.code, final) == (Cancelled("").code, True)
    assert access.call(ModelCall("echo", [], parent=parent)).get(SECONDS)[0].code is Cancelled("").code
    assert heard == [parent]
    assert parent.on_cancel in (before, None)


def test_the_event_loop_may_not_wait_for_itself(loop, models):
    access = LoopAccess("me", models.services, loop)

    async def try_it(what: Any) -> None:
        what()

    for what in (lambda: access.call(ModelCall("echo", [])), lambda: access.ask("twice", 1)):
        with pytest.raises(BackendError, match="execution: thread"):
            asyncio.run_coroutine_threadsafe(try_it(what), loop).result(SECONDS)


def test_nothing_is_left_of_a_process_with_calls_open(raw, models):  # noqa: F811
    fds = psutil.Process().num_fds()
    with raw(ASK, services=models.services) as served:
        submit(served, Answers(), request({}, id="never"))
        models.wait(lambda: models.open)
        served.on_loop(served.worker._side.calls.close)
    models.wait(lambda: not models.open)
    assert psutil.Process().num_fds() <= fds + 1
