"""KServe's V2 inference protocol with Triton's extensions, over HTTP and gRPC. Knows no model and no queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.grpc import add_methods
from doorstep.protocols.kserve.http import add_routes
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

if TYPE_CHECKING:
    from doorstep.server import InferenceServer
    from doorstep.wire.grpc import GrpcServer


def register(
    router: Router | None,
    grpc: GrpcServer | None,
    server: InferenceServer,
    limits: WireLimits,
    *,
    http_forwarding: HeaderForwarding | None = None,
    grpc_forwarding: HeaderForwarding | None = None,
) -> None:
    """Adds every route and rpc of the protocol; None leaves that side out."""
    if router is not None:
        add_routes(router, server, limits, http_forwarding)
    if grpc is not None:
        add_methods(grpc, server, limits, grpc_forwarding)
