"""Coroutines of model code: run on an event loop in a thread of its own, made when the first one comes, and woken when
another model has answered them. The loop keeps running between batches, so that a model's clients and background tasks
stay alive. Knows no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from doorstep.backends.base import CallResponses

_loop: asyncio.AbstractEventLoop | None = None
_making = threading.Lock()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, or raises."""
    return asyncio.run_coroutine_threadsafe(coroutine, _running_loop()).result()


def start(coroutine: Coroutine[Any, Any, Any], done: Callable[[BaseException | None], None]) -> None:
    """Runs it beside the caller; `done` is called with what it raised, in the loop's thread."""

    def ended(future: Future[Any]) -> None:
        done(future.exception() if not future.cancelled() else asyncio.CancelledError())

    asyncio.run_coroutine_threadsafe(coroutine, _running_loop()).add_done_callback(ended)


async def until_ready(responses: CallResponses, abandoned: Callable[[], None]) -> None:
    """Returns when `get` would not wait. `abandoned` is called where the loop that waits is closed by then."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def set_ready() -> None:
        if not ready.done():
            ready.set_result(None)

    def tell() -> None:
        if not call_in(loop, set_ready):
            abandoned()

    responses.notify(tell)
    await ready


def call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> bool:
    """From any thread. False: the loop is closed, and nobody waits any more."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        return False
    return True


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop  # noqa: PLW0603 (one per process)
    with _making:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="model-asyncio", daemon=True).start()
    return _loop
