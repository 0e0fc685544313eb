"""Runs coroutines of model code on an event loop in a thread of its own, made when the first one comes.

The loop keeps running between batches, so that a model's clients and background tasks stay alive. Knows no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

_loop: asyncio.AbstractEventLoop | None = None


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What the coroutine returns, or raises."""
    global _loop  # noqa: PLW0603 (one per process)
    if _loop is None:
        _loop = asyncio.new_event_loop()
        threading.Thread(target=_loop.run_forever, name="model-asyncio", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(coroutine, _loop).result()
