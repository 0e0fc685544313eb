"""The answers the wire gives by itself: error bodies, refusals, failed endpoints. Knows no endpoint.

Bodies are Triton's `{"error": "..."}`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

import orjson

from doorstep.errors import DoorstepError
from doorstep.wire.exchange import Endpoint, Exchange, Refusal

log = logging.getLogger("doorstep.wire")

JSON = ((b"content-type", b"application/json"),)
_tasks: set[asyncio.Task[None]] = set()  # the loop keeps only weak references


def error_body(message: str) -> bytes:
    """`{"error": message}`. Lone surrogates, which JSON cannot carry, become question marks."""
    try:
        return orjson.dumps({"error": message})
    except TypeError:
        return orjson.dumps({"error": message.encode("utf-8", "replace").decode()})


def refusal(status: int, message: str, *, grpc_status: int = 14) -> Refusal:
    return Refusal(status, error_body(message), JSON, grpc_status=grpc_status, grpc_message=message)


def refuse(exchange: Exchange, no: Refusal) -> None:
    exchange.respond(no.status, no.headers, no.body)


def fail(exchange: Exchange, error: BaseException) -> None:
    """An endpoint raised: 500 without a traceback where the answer has not begun, a broken connection where it has."""
    log.error("%s %s failed", exchange.method, exchange.path, exc_info=error)
    if exchange.disconnected or exchange.ended:
        return
    if exchange.started:
        exchange.reset()
    else:
        message = error.message if isinstance(error, DoorstepError) else f"internal error: {type(error).__name__}"
        exchange.respond(500, JSON, error_body(message))


def spawn(endpoint: Callable[[Exchange], Coroutine[Any, Any, None]]) -> Endpoint:
    """Makes a coroutine function into an endpoint: every call gets a Task, whose exception becomes a 500."""

    async def run(exchange: Exchange) -> None:
        try:
            await endpoint(exchange)
        except asyncio.CancelledError:
            if not exchange.ended:
                exchange.reset()
            raise
        except Exception as error:
            fail(exchange, error)

    @wraps(endpoint)
    def call(exchange: Exchange) -> None:
        task = asyncio.get_running_loop().create_task(run(exchange))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

    return call
