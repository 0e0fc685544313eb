"""Routes that answer with JSON: what they return, or the error they raise. Knows no route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from doorstep.errors import DoorstepError
from doorstep.protocols.kserve.errors import respond_error
from doorstep.wire.answers import JSON
from doorstep.wire.exchange import Exchange
from doorstep.wire.request_id import with_request_id

Document = Callable[[Exchange], dict[str, Any]]  # the JSON object in a request's body; empty where there is none


def respond_json(exchange: Exchange, answer: Any) -> None:
    """None is an empty answer."""
    body = b"" if answer is None else orjson.dumps(answer)
    exchange.respond(200, with_request_id(exchange.headers, JSON), body)


def answer_with(exchange: Exchange, route: Callable[..., Any], *arguments: Any) -> None:
    """Answers with what the route gives."""
    try:
        answer = route(*arguments)
    except DoorstepError as error:
        respond_error(exchange, error)
    else:
        respond_json(exchange, answer)
