"""Runs coroutines of model code on an event loop in a thread of its own, made when the first one comes.

The loop keeps running between batches, so that a model's clients and background tasks stay alive. Knows no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

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


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop  # noqa: PLW0603 (one per process)
    with _making:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="model-asyncio", daemon=True).start()
    return _loop
