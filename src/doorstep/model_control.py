"""What model code may ask of the server about models: load, unload, ready, decoupled. Knows no process and no protocol.

Handlers for `Services.handlers`; the other side of each is in backends/python/triton_calls.py.
"""

from __future__ import annotations

from typing import Any

from doorstep.errors import InvalidArgument, NotFound
from doorstep.repository.base import LoadRequest
from doorstep.server import InferenceServer
from doorstep.services import Handler


def model_handlers(server: InferenceServer) -> dict[str, Handler]:
    """By name, for one server."""

    async def load(model: str, payload: Any, data: bytes) -> None:
        """`files` says each file's key and size; `data` is their contents, in that order."""
        files = {}
        at = 0
        for key, size in payload["files"]:
            if not key.startswith("file:"):
                raise InvalidArgument(
                    f"unrecognized load parameter '{key}': expected 'config' or 'file:<version>/<path>'"
                )
            files[key.removeprefix("file:")] = bytes(data[at : at + size])
            at += size
        asker = model if payload["loading"] else ""
        await server.load(payload["name"], LoadRequest(payload["config"] or None, files), asker)

    async def unload(model: str, payload: Any, _: bytes) -> None:
        await server.unload(payload["name"], payload["unload_dependents"], model if payload["loading"] else "")

    async def ready(_: str, payload: Any, __: bytes) -> bool:
        """Of a model the server does not know: no, as Triton says to models; clients are told that it is not found."""
        try:
            return server.model_ready(payload["name"], payload["version"])
        except NotFound:
            return False

    async def properties(_: str, payload: Any, __: bytes) -> dict[str, bool]:
        return {"decoupled": server.model(payload["name"], payload["version"]).config.decoupled}

    return {"load_model": load, "unload_model": unload, "model_ready": ready, "model_properties": properties}
