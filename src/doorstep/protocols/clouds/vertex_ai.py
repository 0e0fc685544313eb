"""Vertex AI's front: two paths, health and prediction; the others are reached through a header of a prediction.

`X-Vertex-Ai-Triton-Redirect: v2/models/m/config` makes a prediction that call. Whatever is reached so passes the gates
of its own route, and only what reads may be: infer, metadata, config, statistics, readiness, index, metrics and the
status of shared memory (server, vertex_ai_server.cc). Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from doorstep.errors import InvalidArgument
from doorstep.protocols.clouds.mime import MimeInferEndpoint
from doorstep.protocols.kserve.http import add_routes
from doorstep.wire.answers import JSON, error_body, refuse
from doorstep.wire.exchange import Endpoint, Exchange, Gate
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

REDIRECT = b"x-vertex-ai-triton-redirect"
MIME = b"application/vnd.vertex-ai-triton.binary+json;json-header-size="

_MODEL = "/v2/models/{name}"
_VERSION = "/v2/models/{name}/versions/{version}"
_INFER = f"{_MODEL}/infer"
_HEALTH = "/v2/health/ready"
_METRICS = "/metrics"
_MEMORY = [f"/v2/{kind}sharedmemory{region}" for kind in ("system", "cuda") for region in ("", "/region/{region}")]

# Where a redirect may lead → the method of the call it stands for.
REDIRECTS: dict[str, str] = {
    _METRICS: "GET",
    "/v2": "GET",
    "/v2/": "GET",
    "/v2/health/live": "GET",
    _HEALTH: "GET",
    "/v2/models/stats": "GET",
    "/v2/repository/index": "POST",
    "/v2/repository/{repository}/index": "POST",
    **{f"{memory}/status": "GET" for memory in _MEMORY},
    **{base + verb: "GET" for base in (_MODEL, _VERSION) for verb in ("", "/ready", "/config", "/stats")},
    **{base + "/infer": "POST" for base in (_MODEL, _VERSION)},
}
# What exists and may not be reached: register, unregister, load, unload.
_CLOSED = ("/v2/repository/", "/v2/systemsharedmemory", "/v2/cudasharedmemory")


class VertexAiFront:
    """Touched only from the event loop."""

    def __init__(self, server: InferenceServer, limits: WireLimits, gates: Sequence[Gate], model: str) -> None:
        self._server = server
        self._gates = gates
        self.model = model  # the default one; "" until `choose_model`
        self._infer = MimeInferEndpoint(server, limits.body_bytes, MIME, answers=False)
        self._inner = Router()
        add_routes(self._inner, server, limits)

    def register(self, router: Router, predict: str, health: str, metrics: Callable[[Router], None] | None) -> None:
        """Adds the two routes; `metrics` adds the one of the metrics, where there are any."""
        if metrics is not None:
            metrics(self._inner)
        for method in ("GET", "POST"):
            router.add(method, health, self._health)
            if predict != health:
                router.add(method, predict, self._predict, codings=None)
        router.fallback = _bad_request  # type: ignore[method-assign]

    def choose_model(self) -> None:
        """Once the models are loaded. Raises InvalidArgument where there is no one default model."""
        names = dict.fromkeys(model.name for model in self._server.models())
        if self.model:
            if self.model not in names:
                raise InvalidArgument(f"Expect the default model '{self.model}' is loaded")
        elif len(self._server.models()) != 1:
            raise InvalidArgument(
                "Expect the model repository contains only a single model if default model is not specified"
            )
        else:
            (self.model,) = names

    def _health(self, exchange: Exchange) -> None:
        if exchange.method == "POST":
            exchange.respond(405, JSON, error_body("Method Not Allowed"))
        else:
            self._pass(exchange, _HEALTH, self._inner.find("GET", _HEALTH).endpoint)

    def _predict(self, exchange: Exchange) -> None:
        redirect = exchange.headers.get(REDIRECT)
        if exchange.method != "POST":
            self._not_allowed(exchange, redirect)
            return
        if redirect is None:
            exchange.params = {"name": self.model}
            self._pass(exchange, _INFER, self._infer.infer)
            return
        path = "/" + redirect.decode("latin-1")
        method = "POST"
        match = self._inner.find(method, path)
        if REDIRECTS.get(match.route) != method:
            method = "GET"
            match = self._inner.find(method, path)
        if REDIRECTS.get(match.route) != method:
            exchange.respond(403 if path.startswith(_CLOSED) else 400, ())
            return
        exchange.method, exchange.path, exchange.params = method, path, match.params
        infer = match.route.endswith("/infer")
        self._pass(exchange, match.route, self._infer.infer if infer else match.endpoint)

    def _not_allowed(self, exchange: Exchange, redirect: bytes | None) -> None:
        exchange.respond(
            405, () if redirect is not None else JSON, b"" if redirect else error_body("Method Not Allowed")
        )

    def _pass(self, exchange: Exchange, route: str, endpoint: Endpoint) -> None:
        """Calls an endpoint if the gates let its own route pass; they were asked about the vendor's before."""
        exchange.route = route
        for gate in self._gates:
            no = gate(exchange)
            if no is not None:
                refuse(exchange, no)
                return
        endpoint(exchange)


def _bad_request(status: int, allowed: tuple[str, ...], exchange: Exchange) -> None:
    exchange.respond(400, ())
