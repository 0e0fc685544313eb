"""SageMaker's front: /ping, /invocations of one model, and the calls of a multi-model endpoint. Knows no queue.

What differs from the V2 protocol is Triton's (server, sagemaker_server.cc): an unknown path is a 400 without a body,
and the errors of a multi-model endpoint are 400, or 507 where the model ran out of memory.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import orjson

from doorstep.config.cloud import Clouds
from doorstep.errors import AlreadyExists, DoorstepError, InvalidArgument
from doorstep.protocols.clouds.mime import MimeInferEndpoint
from doorstep.protocols.clouds.sagemaker_models import HostedModels, out_of_memory
from doorstep.protocols.kserve.http_generate import GenerateEndpoint
from doorstep.protocols.kserve.json_text import loads
from doorstep.wire.answers import JSON, error_body
from doorstep.wire.exchange import Buffer, Exchange
from doorstep.wire.limits import WireLimits
from doorstep.wire.request_id import with_request_id
from doorstep.wire.router import Router

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

logger = logging.getLogger("doorstep.sagemaker")

MIME = b"application/vnd.sagemaker-triton.binary+json;json-header-size="
TARGET = b"x-amzn-sagemaker-target-model"


class SageMakerFront:
    """Touched only from the event loop."""

    def __init__(self, server: InferenceServer, limits: WireLimits, clouds: Clouds) -> None:
        self._server = server
        self._clouds = clouds
        self._infer = MimeInferEndpoint(server, limits.body_bytes, MIME)
        self._generate = GenerateEndpoint(server, limits, None)
        self._hosted_infer = MimeInferEndpoint(server, limits.body_bytes, MIME, say=_fail)
        self._models = HostedModels(server)

    def register(self, router: Router) -> None:
        router.add("GET", "/ping", self._ping)
        router.add("POST", "/invocations", self._invoke, codings=None)
        for root in ("/models", "/models/"):
            router.add("GET", root, self._list)
            router.add("POST", root, self._load)
        for model in ("/models/{name}", "/models/{name}/"):
            router.add("GET", model, self._describe)
            router.add("DELETE", model, self._unload)
        router.add("POST", "/models/{name}/invoke", self._invoke_hosted, codings=None)
        router.fallback = _nothing_here  # type: ignore[method-assign]

    def _ping(self, exchange: Exchange) -> None:
        well = self._server.live if self._clouds.ping_mode == "live" else self._server.ready
        exchange.respond(200 if well else 400, with_request_id(exchange.headers, ()))

    def _invoke(self, exchange: Exchange) -> None:
        model, kind = self._clouds.default_model, self._clouds.inference_type
        if kind == "infer":
            self._infer.infer_model(exchange, model)
        else:
            self._generate.call(exchange, model, "", streaming=kind == "generate_stream")

    # A multi-model endpoint

    def _invoke_hosted(self, exchange: Exchange) -> None:
        name = exchange.params["name"]
        if name not in self._models.urls:
            exchange.respond(404, ())
            return
        target = _target(exchange, name)
        try:
            self._models.check_target(name, target)
        except DoorstepError as error:
            _fail(exchange, error)
        else:
            self._hosted_infer.infer_model(exchange, target)

    def _list(self, exchange: Exchange) -> None:
        exchange.respond(200, (), orjson.dumps({"models": self._models.listing()}))

    def _describe(self, exchange: Exchange) -> None:
        name = exchange.params["name"]
        url = self._models.urls.get(name)
        if url is None:
            exchange.respond(404, ())
        else:
            exchange.respond(200, (), orjson.dumps({"modelName": name, "modelUrl": url}))

    async def _load(self, exchange: Exchange) -> None:
        try:
            name, url = _load_call(exchange.body)
            await self._models.load(name, url, _target(exchange, name))
        except DoorstepError as error:
            _fail(exchange, error)
        else:
            exchange.respond(200, ())

    async def _unload(self, exchange: Exchange) -> None:
        name = exchange.params["name"]
        if name not in self._models.urls:
            exchange.respond(404, ())
            return
        try:
            found = await self._models.unload(name, _target(exchange, name))
        except DoorstepError as error:
            _fail(exchange, error)
        else:
            exchange.respond(200 if found else 404, ())


def _target(exchange: Exchange, name: str) -> str:
    """The archive that a model was made from, where SageMaker says it; else its name."""
    target = exchange.headers.get(TARGET)
    return name if target is None else target.decode("latin-1")


def _load_call(body: Buffer) -> tuple[str, str]:
    """(name, url) of a load call; "" for what it does not say."""
    document = loads(bytes(body)) if len(body) else {}
    found = []
    for key in ("model_name", "url"):
        value: Any = document.get(key, "") if type(document) is dict else ""
        if type(value) is not str:
            raise InvalidArgument("attempt to access JSON non-string as string")
        found.append(value)
    return found[0], found[1]


def _fail(exchange: Exchange, error: DoorstepError) -> None:
    status = 409 if isinstance(error, AlreadyExists) else 507 if out_of_memory(error.message) else 400
    exchange.respond(status, with_request_id(exchange.headers, JSON), error_body(error.message))


def _nothing_here(status: int, allowed: tuple[str, ...], exchange: Exchange) -> None:
    if status == 405 and exchange.path in ("/ping", "/invocations"):
        exchange.respond(405, JSON, error_body("Method Not Allowed"))
    else:
        exchange.respond(400, ())
