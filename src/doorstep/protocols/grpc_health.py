"""grpc.health.v1: is the server, or a model, ready? Knows no model, only whom to ask.

The empty service and every gRPC service of the listener stand for the whole server, a model's name for that model.
(Triton answers every name as the server; here a name nobody has is NOT_FOUND, as the health protocol says.)
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from google.protobuf.message import DecodeError

from doorstep import proto
from doorstep.errors import DoorstepError, InvalidArgument, NotFound
from doorstep.wire.exchange import Buffer
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.grpc_call import StreamCall, UnaryCall
from doorstep.wire.grpc_status import Status

SERVICE = "grpc.health.v1.Health"
_POLL_S = 1.0  # how often readiness is asked for while somebody watches

_Request = proto.message(f"{SERVICE.rpartition('.')[0]}.HealthCheckRequest")
_Response = proto.message(f"{SERVICE.rpartition('.')[0]}.HealthCheckResponse")
_SERVING, _NOT_SERVING, _UNKNOWN = 1, 2, 3  # ServingStatus
_BYTES: dict[int, bytes] = {n: _Response(status=n).SerializeToString() for n in (_SERVING, _NOT_SERVING, _UNKNOWN)}


class Readiness(Protocol):
    """The part of the server that is asked."""

    @property
    def ready(self) -> bool: ...

    def model_ready(self, name: str, version: str = "") -> bool:
        """Raises NotFound where there is no such model."""


def register(grpc: GrpcServer, server: Readiness) -> Health:
    health = Health(grpc, server)
    grpc.add_unary(f"/{SERVICE}/Check", health.check)
    grpc.add_stream(f"/{SERVICE}/Watch", health.watch)
    return health


class Health:
    """Touched only from the event loop."""

    def __init__(self, grpc: GrpcServer, server: Readiness) -> None:
        self._grpc = grpc
        self._server = server
        self._watchers: dict[StreamCall, tuple[str, int]] = {}  # the service, and what was last said of it
        self._timer: asyncio.TimerHandle | None = None

    def status(self, service: str) -> int:
        if not service or service in self._grpc.services:
            return _SERVING if self._server.ready else _NOT_SERVING
        try:
            return _SERVING if self._server.model_ready(service) else _NOT_SERVING
        except NotFound:
            return _UNKNOWN
        except DoorstepError:
            return _NOT_SERVING

    def check(self, call: UnaryCall) -> None:
        status = self.status(_service(call.message))
        if status == _UNKNOWN:
            call.fail(Status.NOT_FOUND, "unknown service")
        else:
            call.respond(_BYTES[status])

    def watch(self, call: StreamCall) -> None:
        """Says the status now, and again whenever it has changed, until the client goes."""

        def begin(message: Buffer) -> None:
            if call in self._watchers:
                call.fail(Status.INVALID_ARGUMENT, "one request expected")
                self._watchers.pop(call)
                return
            service = _service(message)
            status = self.status(service)
            self._watchers[call] = (service, status)
            call.send(_BYTES[status])
            self._set_timer()

        call.on_cancel = lambda: self._forget(call)
        call.on_message = begin

    def changed(self) -> None:
        """Tells the watchers what is new. Called every second while there are any; may be called at any time."""
        for call, (service, said) in list(self._watchers.items()):
            status = self.status(service)
            if status != said:
                self._watchers[call] = (service, status)
                call.send(_BYTES[status])

    def _forget(self, call: StreamCall) -> None:
        self._watchers.pop(call, None)
        if not self._watchers and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_timer(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_POLL_S, self._poll)

    def _poll(self) -> None:
        self._timer = None
        self.changed()
        if self._watchers:
            self._set_timer()


def _service(message: Buffer) -> str:
    try:
        return str(_Request.FromString(bytes(message)).service)
    except DecodeError:
        raise InvalidArgument("not a HealthCheckRequest") from None
