"""The HTTP routes of the shared memory extensions: status, register and unregister. Knows no tensor.

Facts: server, http_server.cc (HandleSystemSharedMemory, HandleCudaSharedMemory).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from doorstep.client_memory import Regions
from doorstep.errors import Internal, InvalidArgument
from doorstep.protocols.kserve.http_json import Document, answer_with
from doorstep.wire.exchange import Exchange
from doorstep.wire.router import Router


def add_memory_routes(router: Router, regions: Regions, document: Document) -> None:
    routes = MemoryRoutes(regions, document)
    for kind in ("system", "cuda"):
        for path in (f"/v2/{kind}sharedmemory", f"/v2/{kind}sharedmemory/region/{{region}}"):
            router.add("GET", f"{path}/status", _endpoint(getattr(routes, f"{kind}_status")))
            router.add("POST", f"{path}/register", _endpoint(getattr(routes, f"{kind}_register")))
            router.add("POST", f"{path}/unregister", _endpoint(getattr(routes, f"{kind}_unregister")))


def _endpoint(route: Callable[[Exchange], Any]) -> Callable[[Exchange], None]:
    return lambda exchange: answer_with(exchange, route, exchange)


class MemoryRoutes:
    """One method per route; each returns what is answered as JSON. Touched only from the event loop."""

    def __init__(self, regions: Regions, document: Document) -> None:
        self._regions = regions
        self._document = document

    def system_status(self, exchange: Exchange) -> Any:
        return [
            {"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.byte_size}
            for r in self._regions.status(exchange.params.get("region", ""))
        ]

    def system_register(self, exchange: Exchange) -> None:
        self._regions.refuse_if_disabled()
        name = _name(exchange, "system")
        document = self._document(exchange)
        key = _required(document, "key")
        if type(key) is not str:
            raise Internal("attempt to access JSON non-string as string")
        offset = _unsigned(document.get("offset", 0))
        byte_size = _unsigned(_required(document, "byte_size"))
        self._regions.register(name, key, offset, byte_size)

    def system_unregister(self, exchange: Exchange) -> None:
        self._regions.unregister(exchange.params.get("region", ""))

    def cuda_status(self, exchange: Exchange) -> Any:
        self._regions.cuda_status(exchange.params.get("region", ""))
        return []

    def cuda_register(self, exchange: Exchange) -> None:
        self._regions.refuse_if_disabled()
        self._regions.register_cuda(_name(exchange, "cuda"))

    def cuda_unregister(self, _: Exchange) -> None:
        self._regions.unregister_cuda()


def _name(exchange: Exchange, kind: str) -> str:
    name = exchange.params.get("region", "")
    if not name:
        raise InvalidArgument(f"'region name' is necessary to register {kind} shared memory region")
    return name


def _required(document: dict[str, Any], key: str) -> Any:
    if key not in document:
        raise InvalidArgument(f"Shared memory register request has no '{key}' field")
    return document[key]


def _unsigned(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise Internal("attempt to access JSON non-unsigned-integer as unsigned-integer")
    return value
