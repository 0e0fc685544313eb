"""The V2 protocol's HTTP routes other than inference. Knows no wire format but JSON."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from doorstep.config.render import config_json
from doorstep.errors import DoorstepError, Internal, InvalidArgument, Unsupported
from doorstep.protocols.kserve import metadata
from doorstep.protocols.kserve.errors import respond_error
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.http_generate import GenerateEndpoint
from doorstep.protocols.kserve.http_infer import InferEndpoint
from doorstep.protocols.kserve.http_json import answer_with, respond_json
from doorstep.protocols.kserve.http_memory import add_memory_routes
from doorstep.protocols.kserve.http_settings import add_settings_routes
from doorstep.protocols.kserve.json_parameters import as_bool
from doorstep.protocols.kserve.json_text import loads
from doorstep.protocols.kserve.texts import NO_REPOSITORY_NAME
from doorstep.repository.base import LoadRequest
from doorstep.wire.answers import JSON, error_body
from doorstep.wire.compression import IDENTITY_ONLY
from doorstep.wire.exchange import Exchange
from doorstep.wire.limits import WireLimits
from doorstep.wire.request_id import with_request_id
from doorstep.wire.router import Router

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

_MODEL = "/v2/models/{name}"
_VERSION = "/v2/models/{name}/versions/{version}"
_REPOSITORY = "/v2/repository"


def add_routes(
    router: Router, server: InferenceServer, limits: WireLimits, forwarding: HeaderForwarding | None = None
) -> None:
    """Every HTTP route of the protocol."""
    max_input_size = limits.body_bytes
    endpoints = Endpoints(server, max_input_size)
    router.add("GET", "/v2", endpoints.server_metadata)
    router.add("GET", "/v2/health/live", endpoints.live)
    router.add("GET", "/v2/health/ready", endpoints.ready)
    router.add("GET", "/v2/models/stats", endpoints.statistics)
    infer = InferEndpoint(server, max_input_size, forwarding).infer
    generate = GenerateEndpoint(server, limits, forwarding)
    for model in (_MODEL, _VERSION):
        router.add("POST", f"{model}/infer", infer)
        router.add("GET", f"{model}/ready", endpoints.model_ready)
        router.add("GET", model, endpoints.model_metadata)
        router.add("GET", f"{model}/config", endpoints.model_config)
        router.add("GET", f"{model}/stats", endpoints.statistics)
        router.add("POST", f"{model}/generate", generate.generate, codings=IDENTITY_ONLY)
        router.add("POST", f"{model}/generate_stream", generate.generate_stream, codings=IDENTITY_ONLY)
    for repository in (_REPOSITORY, _REPOSITORY + "/{repository}"):
        router.add("POST", f"{repository}/index", endpoints.index)
        router.add("POST", f"{repository}/models/{{name}}/load", endpoints.load)
        router.add("POST", f"{repository}/models/{{name}}/unload", endpoints.unload)
    add_memory_routes(router, server.regions, endpoints.document)
    add_settings_routes(router, server, endpoints.document)


def answering(endpoint: Callable[[Endpoints, Exchange], Any]) -> Callable[[Endpoints, Exchange], None]:
    """Makes a method that returns JSON, or raises DoorstepError, into an endpoint."""

    @wraps(endpoint)
    def call(self: Endpoints, exchange: Exchange) -> None:
        answer_with(exchange, endpoint, self, exchange)

    return call


def awaiting(endpoint: Callable[[Endpoints, Exchange], Awaitable[Any]]) -> Callable[[Endpoints, Exchange], Any]:
    """The same for a coroutine method; None is an empty answer."""

    @wraps(endpoint)
    async def call(self: Endpoints, exchange: Exchange) -> None:
        try:
            answer = await endpoint(self, exchange)
        except DoorstepError as error:
            respond_error(exchange, error)
        else:
            respond_json(exchange, answer)

    return call


class Endpoints:
    """One method per route. Touched only from the event loop."""

    def __init__(self, server: InferenceServer, max_input_size: int) -> None:
        self._server = server
        self._max_input_size = max_input_size

    def live(self, exchange: Exchange) -> None:
        exchange.respond(200 if self._server.live else 400, with_request_id(exchange.headers, ()))

    def ready(self, exchange: Exchange) -> None:
        exchange.respond(200 if self._server.ready else 400, with_request_id(exchange.headers, ()))

    async def model_ready(self, exchange: Exchange) -> None:
        try:
            ready = await metadata.model_ready(self._server, *_model(exchange))
        except DoorstepError as error:
            respond_error(exchange, error)
            return
        if ready:
            exchange.respond(200, with_request_id(exchange.headers, ()))
        else:
            exchange.respond(400, with_request_id(exchange.headers, JSON), error_body("Model version not ready"))

    @answering
    def server_metadata(self, exchange: Exchange) -> Any:
        return metadata.server_metadata(self._server)

    @answering
    def model_metadata(self, exchange: Exchange) -> Any:
        return metadata.model_metadata(self._server, *_model(exchange))

    @answering
    def model_config(self, exchange: Exchange) -> Any:
        return config_json(self._server.model(*_model(exchange)).config.proto)

    @answering
    def statistics(self, exchange: Exchange) -> Any:
        if "name" not in exchange.params:
            return metadata.statistics(self._server)
        return metadata.statistics(self._server, *_model(exchange))

    @awaiting
    async def index(self, exchange: Exchange) -> Any:
        # Triton reads a repository's name in the path of this call, and ignores it.
        document = self.document(exchange)
        ready = document.get("ready", False)
        if type(ready) is not bool:
            raise InvalidArgument("Invalid value for 'ready': expected a boolean")
        await self._server.refresh_index()
        return metadata.index(self._server.index(ready))

    @awaiting
    async def load(self, exchange: Exchange) -> None:
        _refuse_repository(exchange)
        parameters = self.document(exchange).get("parameters", {})
        await self._server.load(exchange.params["name"], load_request(parameters))

    @awaiting
    async def unload(self, exchange: Exchange) -> None:
        _refuse_repository(exchange)
        parameters = self.document(exchange).get("parameters")
        dependents = False
        if type(parameters) is dict and "unload_dependents" in parameters:
            dependents = as_bool(parameters["unload_dependents"], "Unable to parse 'unload_dependents'")
        await self._server.unload(exchange.params["name"], dependents)

    def document(self, exchange: Exchange) -> dict[str, Any]:
        """The body's JSON object; an empty body, or JSON that is no object, has no members."""
        body = exchange.body
        if not body:
            return {}
        if len(body) > self._max_input_size:
            raise InvalidArgument(
                f"request JSON size of {len(body)} bytes exceeds the maximum allowed input size of "
                f"{self._max_input_size} bytes. Use --http-max-input-size to increase the limit."
            )
        document = loads(bytes(body))
        return document if type(document) is dict else {}


def _model(exchange: Exchange) -> tuple[str, str]:
    params = exchange.params
    return params["name"], params.get("version", "")


def _refuse_repository(exchange: Exchange) -> None:
    if "repository" in exchange.params:
        raise Unsupported(NO_REPOSITORY_NAME)


def load_request(parameters: Any) -> LoadRequest:
    """What the body of a load call asks for beside the model (extension_model_repository.md)."""
    if type(parameters) is not dict:
        raise Internal("attempt to get members for non-object")
    config: str | None = None
    files: dict[str, bytes] = {}
    for key, value in parameters.items():
        if type(value) is not str:
            raise Internal("attempt to access JSON non-string as string")
        if key == "config":
            config = value
        elif key.startswith("file:"):
            files[key.removeprefix("file:")] = _base64(key, value)
        else:
            raise Internal(f"unrecognized load parameter '{key}': expected 'config' or 'file:<version>/<path>'")
    return LoadRequest(config, files)


def _base64(key: str, text: str) -> bytes:
    try:
        return b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(f"'{key}' is not base64: {error}") from None
