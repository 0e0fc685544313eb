"""How a body is read before a call begins: off the event loop where that takes long, and answered whatever happens."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import orjson
import pytest

from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.front import LONG_BYTES, Front
from doorstep.wire.exchange import Exchange

SIZES = pytest.mark.parametrize("size", [1, LONG_BYTES], ids=["short", "long"])


class Asked(Exchange):
    """A client that waits for its answer."""

    def __init__(self, size: int) -> None:
        self.method, self.path, self.route, self.headers = "POST", "/v1/chat/completions", "", {}
        self.body = orjson.dumps({"text": "x" * size})
        self.on_disconnect = None
        self.started = self.ended = self.gone = False
        self.status = 0
        self.answered = asyncio.Event()

    @property
    def disconnected(self) -> bool:
        return self.gone

    def respond(self, status: int, headers: Any, *body: Any) -> None:
        assert not self.status, "answered twice"
        self.status = status
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
