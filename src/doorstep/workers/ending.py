"""The end of a worker process that nobody needs any more, and the way from a loader's thread to the loop for it.

Blocking. Knows no batch."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress

from doorstep.errors import DoorstepError, InvalidArgument
from doorstep.workers.frames import Kind, ProtocolError
from doorstep.workers.loading import seconds_from
from doorstep.workers.spawn import Log, Process, ProcessEnded


class LoopClosed(Exception):
    """There is no loop to call anything on."""


def end_process(process: Process, backend_config: Mapping[str, str], log: Log) -> None:
    """Lets the model unload; kills what does not."""
    try:
        process.ask(Kind.UNLOAD, {}, timeout=seconds_from(backend_config, "unload-timeout-seconds", 10))
        gone = process.wait(5.0)
    except ProcessEnded:
        gone = True
    except (DoorstepError, ProtocolError, TimeoutError, InvalidArgument) as error:
        log("WARNING", f"{process.name}: its process does not unload and is ended: {error or 'no answer'}")
        gone = False
    if not gone:
        process.signal(signal.SIGTERM)
        process.wait(2.0)
    process.close()


def call_on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], bool]) -> bool:
    """Runs `call` on the loop and waits, unless this is the loop's thread, or it runs no more. Raises LoopClosed."""
    with suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            return call()
    result: list[bool] = []
    finished = threading.Event()

    def run() -> None:
        try:
            result.append(call())
        finally:
            finished.set()

    try:
        loop.call_soon_threadsafe(run)
    except RuntimeError:
        raise LoopClosed from None
    while not finished.wait(0.5):
        if not loop.is_running():
            return call()
    return result[0]
