"""Which of Triton's API categories each V2 route belongs to, for --http-restricted-api and --grpc-restricted-protocol.

Knows route patterns and no endpoint; a test checks that every V2 route has its row. HTTP and gRPC share the table, so
that an API closed on one is not open on the other by oversight. SageMaker's routes are HTTP's; Vertex AI's are asked
about as the V2 route they stand for (clouds/vertex_ai.py).
"""

from __future__ import annotations

_MODEL = "/v2/models/{name}"
_VERSION = "/v2/models/{name}/versions/{version}"
_RPC = "/inference.GRPCInferenceService/"

_HTTP: dict[str, tuple[str, ...]] = {
    "health": ("/v2/health/live", "/v2/health/ready", f"{_MODEL}/ready", f"{_VERSION}/ready", "/ping"),
    "metadata": ("/v2", "/v2/", _MODEL, _VERSION, "/v1/models", "/v1/models/{model}"),
    "inference": (
        *(f"{base}/{verb}" for base in (_MODEL, _VERSION) for verb in ("infer", "generate", "generate_stream")),
        "/invocations",
        "/models/{name}/invoke",
        *(
            f"/v1/{verb}"
            for verb in (
                "chat/completions",
                "completions",
                "embeddings",
                "rerank",
                "responses",
                "messages",
                "messages/count_tokens",
            )
        ),
        "/v2/rerank",
        "/rerank",
        "/tokenize",
        "/detokenize",
    ),
    "model-repository": ("/models", "/models/", "/models/{name}", "/models/{name}/"),
    "model-config": (f"{_MODEL}/config", f"{_VERSION}/config"),
    "statistics": ("/v2/models/stats", f"{_MODEL}/stats", f"{_VERSION}/stats"),
    "trace": ("/v2/trace/setting", f"{_MODEL}/trace/setting"),
    "logging": ("/v2/logging",),
}
_GRPC: dict[str, tuple[str, ...]] = {
    "health": ("ServerLive", "ServerReady", "ModelReady"),
    "metadata": ("ServerMetadata", "ModelMetadata"),
    "inference": ("ModelInfer", "ModelStreamInfer"),
    "shared-memory": tuple(
        f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")
    ),
    "model-config": ("ModelConfig",),
    "model-repository": ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
    "statistics": ("ModelStatistics",),
    "trace": ("TraceSetting",),
    "logging": ("LogSettings",),
}

_BY_ROUTE = {
    **{route: category for category, routes in _HTTP.items() for route in routes},
    **{_RPC + rpc: category for category, rpcs in _GRPC.items() for rpc in rpcs},
    "/grpc.health.v1.Health/Check": "health",
    "/grpc.health.v1.Health/Watch": "health",
}
_BY_PREFIX = (
    ("/v2/repository/", "model-repository"),
    ("/v2/systemsharedmemory", "shared-memory"),
    ("/v2/cudasharedmemory", "shared-memory"),
)


def category_of(route: str) -> str | None:
    """The category of a route pattern; None for what belongs to none (metrics, reflection, 404)."""
    found = _BY_ROUTE.get(route)
    if found is None:
        for prefix, category in _BY_PREFIX:
            if route.startswith(prefix):
                return category
    return found
