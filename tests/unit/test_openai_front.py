"""Bodies that are long, and answers that are: off the event loop, and answered whatever happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest

from doorstep.backends.llm.job import DELTA, Delta, Job, Usage
from doorstep.errors import NotFound
from doorstep.protocols.openai.call import LONG_PIECE, Call
from doorstep.protocols.openai.embeddings import TextToVector, ValueFormat, _ByInference, _document
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.front import LONG_BYTES, Front
from doorstep.protocols.openai.identity import caller_of
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.types import BYTES, FP32, Tensor, object_array
from doorstep.wire.exchange import Exchange

SIZES = pytest.mark.parametrize("size", [1, LONG_BYTES], ids=["short", "long"])


class Asked(Exchange):
    """A client that waits for its answer."""

    def __init__(self, size: int) -> None:
        self.method, self.path, self.route, self.headers = "POST", "/v1/chat/completions", "", {}
        self.body = orjson.dumps({"text": "x" * size})
        self.on_disconnect = None
        self.started = self.ended = self.gone = False
        self.status, self.answer = 0, b""
        self.received_ns = 0
        self.answered = asyncio.Event()

    @property
    def disconnected(self) -> bool:
        return self.gone

    def respond(self, status: int, headers: Any, *body: Any) -> None:
        assert not self.status, "answered twice"
        self.status, self.answer = status, b"".join(body)
        self.answered.set()

    def start(self, *_: Any) -> None: ...
    def write(self, *_: Any) -> bool:
        return True

    def end(self, *_: Any) -> None: ...
    def reset(self) -> None: ...
    def consume(self, size: int) -> None: ...


def raises(error: Exception) -> Any:
    def function(*_: Any) -> None:
        raise error

    return function


def status_of(size: int, read: Any, answer: Any) -> int:
    async def ask() -> int:
        exchange = Asked(size)
        Front(None, None, ping_s=0).with_document(exchange, read, answer)  # type: ignore[arg-type]
        await asyncio.wait_for(exchange.answered.wait(), 10)
        return exchange.status

    return asyncio.run(ask())


@pytest.mark.parametrize(("size", "aside"), [(1, False), (LONG_BYTES, True)])
def test_a_long_body_is_read_in_a_thread_and_answered_on_the_loop(size: int, aside: bool) -> None:
    threads = []

    def read(said: Any) -> Any:
        threads.append(threading.current_thread())
        return said["text"]

    def answer(body: str, exchange: Exchange) -> None:
        threads.append(threading.current_thread())
        assert len(body) == size
        exchange.respond(200, ())

    assert status_of(size, read, answer) == 200
    assert [thread is not threading.main_thread() for thread in threads] == [aside, False]


@SIZES
def test_an_error_of_ours_is_answered_too(size: int, caplog: pytest.LogCaptureFixture) -> None:
    assert status_of(size, dict, raises(ZeroDivisionError())) == 500
    assert status_of(size, raises(ZeroDivisionError()), raises(BadField("no"))) == 500
    assert status_of(size, dict, raises(BadField("no"))) == 400
    assert status_of(size, raises(BadField("no")), None) == 400


def test_nothing_begins_for_a_client_that_left_while_its_body_was_read() -> None:
    begun = []

    async def ask() -> None:
        exchange = Asked(LONG_BYTES)
        has_left, has_read = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def read(said: Any) -> None:
            has_left.wait(10)
            loop.call_soon_threadsafe(loop.call_later, 0.05, has_read.set)

        Front(None, None, ping_s=0).with_document(  # type: ignore[arg-type]
            exchange, read, lambda body, _: begun.append(body)
        )
        exchange.gone = True
        has_left.set()
        await asyncio.wait_for(has_read.wait(), 10)

    asyncio.run(ask())
    assert not begun


# Models


def test_an_adapter_is_the_newest_versions() -> None:
    def version(number: int, adapters: str) -> Any:
        return SimpleNamespace(name="m", version=number, config=SimpleNamespace(parameters={"adapters": adapters}))

    class Repository:
        def model(self, name: str) -> Any:
            raise NotFound(name)

        def models(self) -> list[Any]:
            return [version(1, "old=a,pirate=b"), version(2, "pirate=b")]

    front = Front(Repository(), None, ping_s=0)  # type: ignore[arg-type]
    for name, number, adapter in (("pirate", 2, "pirate"), ("m:pirate", 2, "pirate"), ("old", 1, "old")):
        model, found = front.resolve(name)
        assert (model.version, found) == (number, adapter)


# Answers

MODEL: Any = SimpleNamespace(name="m")
Outputs = Callable[[InferenceRequest], list[Tensor]]


class Server:
    """Answers a request as soon as the loop turns."""

    tracer = None

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def enqueue(self, request: InferenceRequest, model: Any) -> None:
        response = InferenceResponse("m", "1", request.id, self._outputs(request))
        asyncio.get_running_loop().call_soon(request.sender.send, response, True)

    infer = enqueue


def value(vectors: Any) -> Outputs:
    piece = Delta(finish="stop", usage=Usage(prompt=7), value=vectors).to_json()
    return lambda request: [Tensor(DELTA, BYTES, object_array([piece], (1,)))]


def by_engine(front: Front, exchange: Exchange, document: Any) -> None:
    format = ValueFormat(lambda choice: document(choice.value, choice.usage.prompt))
    Call(front, exchange, MODEL, [Job("embed", {})], format, caller_of(exchange, {}), stream=False).begin()


def by_inference(front: Front, exchange: Exchange, document: Any) -> None:
    _ByInference(front, exchange, MODEL, TextToVector("text", "vector", 64), ["x"] * 64, document).begin()


WAYS = pytest.mark.parametrize("begin", [by_engine, by_inference])


def vectors_by(begin: Any, width: int, document: Any) -> Asked:
    vectors = np.ones((64, width), np.float32)

    def outputs(request: InferenceRequest) -> list[Tensor]:
        return value(vectors)(request) if begin is by_engine else [Tensor("vector", FP32, vectors)]

    async def ask() -> Asked:
        exchange = Asked(1)
        begin(Front(Server(outputs), None, ping_s=0), exchange, document)  # type: ignore[arg-type]
        await asyncio.wait_for(exchange.answered.wait(), 10)
        return exchange

    return asyncio.run(ask())


@WAYS
@pytest.mark.parametrize(("width", "aside"), [(2, False), (LONG_PIECE // 64, True)])
def test_many_vectors_are_written_in_a_thread(begin: Any, width: int, aside: bool) -> None:
    threads = []

    def document(vectors: Any, tokens: int) -> Any:
        threads.append(threading.current_thread())
        return _document({"model": "m"}, vectors, tokens)

    answered = vectors_by(begin, width, document)
    assert answered.status == 200
    assert [len(one["embedding"]) for one in orjson.loads(answered.answer)["data"]] == [width] * 64
    assert [thread is not threading.main_thread() for thread in threads] == [aside]


@WAYS
@pytest.mark.parametrize("width", [2, LONG_PIECE // 64])
@pytest.mark.parametrize(("error", "status"), [(BadField("no"), 400), (ZeroDivisionError(), 500)])
def test_vectors_that_cannot_be_written_are_an_error(begin: Any, width: int, error: Exception, status: int) -> None:
    assert vectors_by(begin, width, raises(error)).status == status


def test_vectors_for_a_client_that_left_while_they_were_written_go_nowhere() -> None:
    async def ask() -> Asked:
        exchange = Asked(1)
        written = asyncio.Event()
        loop = asyncio.get_running_loop()

        def document(vectors: Any, tokens: int) -> Any:
            loop.call_soon_threadsafe(exchange.on_disconnect)
            loop.call_soon_threadsafe(loop.call_later, 0.05, written.set)
            return {}

        outputs = value(np.ones((64, LONG_PIECE // 64), np.float32))
        by_engine(Front(Server(outputs), None, ping_s=0), exchange, document)  # type: ignore[arg-type]
        await asyncio.wait_for(written.wait(), 10)
        return exchange

    assert not asyncio.run(ask()).status
