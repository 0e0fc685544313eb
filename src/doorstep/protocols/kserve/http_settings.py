"""Trace and log settings over HTTP. Knows what the settings are called, not what comes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from doorstep.errors import Unavailable
from doorstep.protocols.kserve import settings
from doorstep.protocols.kserve.http_json import Document, answer_with
from doorstep.wire.exchange import Exchange
from doorstep.wire.router import Router

if TYPE_CHECKING:
    from doorstep.server import InferenceServer


def add_settings_routes(router: Router, server: InferenceServer, document: Document) -> None:
    for path in ("/v2/trace/setting", "/v2/models/{name}/trace/setting"):
        router.add("GET", path, partial(_answer, trace_setting, server))
        router.add("POST", path, partial(_answer, trace_setting, server, document))
    router.add("GET", "/v2/logging", partial(_answer, log_settings, server))
    router.add("POST", "/v2/logging", partial(_answer, log_settings, server, document))


def _answer(endpoint: Callable[..., Any], server: InferenceServer, *rest: Any) -> None:
    exchange: Exchange = rest[-1]
    answer_with(exchange, endpoint, server, exchange, *rest[:-1])


def trace_setting(server: InferenceServer, exchange: Exchange, document: Document | None = None) -> Any:
    control = server.trace_settings
    if control is None:
        raise Unavailable("the server does not support tracing")
    model = exchange.params.get("name", "")
    if model:
        settings.check_model(server, model)
    if document is not None:
        control.update(model, settings.trace_changes_of_json(document(exchange)))
    described = control.describe(model)
    return {name: values if name == "trace_level" else values[0] for name, values in described.items()}


def log_settings(server: InferenceServer, exchange: Exchange, document: Document | None = None) -> Any:
    control = server.log_settings
    if control is None:
        raise Unavailable("the server does not support dynamic logging")
    if document is not None:
        control.update(settings.log_changes_of_json(document(exchange)))
    return control.describe()
