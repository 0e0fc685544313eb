"""gRPC on any listener: which handler a method has, and what every call is checked for. Knows no message type.

Handlers are plain functions of a call; a coroutine function gets a Task, which is cancelled when the client goes.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from inspect import iscoroutinefunction
from typing import Any

from doorstep.wire.answers import JSON, error_body
from doorstep.wire.deadlines import Deadlines
from doorstep.wire.exchange import Exchange
from doorstep.wire.grpc_call import Call, StreamCall, UnaryCall
from doorstep.wire.grpc_compression import ENCODINGS, CompressionLevel, choose_encoding
from doorstep.wire.grpc_status import Status, is_grpc, parse_timeout, trailers_only
from doorstep.wire.http2_exchange import Http2Exchange
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

UnaryHandler = Callable[[UnaryCall], Any]
StreamHandler = Callable[[StreamCall], Any]

_PLAIN_TYPES = frozenset({b"application/grpc", b"application/grpc+proto"})
_tasks: set[asyncio.Task[None]] = set()  # the loop keeps only weak references


class GrpcServer:
    """A registry of methods. Filled at start-up; touched only from the event loop after that."""

    def __init__(
        self, limits: WireLimits | None = None, *, compression: CompressionLevel = CompressionLevel.NONE
    ) -> None:
        self.message_bytes = (limits or WireLimits()).grpc_message_bytes  # both ways
        self.compression = compression  # of answers, to clients that accept it
        self._methods: dict[str, Callable[[Exchange], None]] = {}
        self._deadlines: Deadlines | None = None

    def add_unary(self, path: str, handler: UnaryHandler) -> None:
        """`path` is `/package.Service/Method`. The handler gets a call whose message is complete."""
        plain = _as_function(handler)
        self._methods[path] = functools.partial(self._start_unary, plain)

    def add_stream(self, path: str, handler: StreamHandler) -> None:
        """For methods that stream either way. The handler is called before any message has come."""
        plain = _as_function(handler)
        self._methods[path] = functools.partial(self._start_stream, plain)

    @property
    def services(self) -> list[str]:
        """Full names of the services with a method, sorted: what reflection lists."""
        return sorted({path.split("/")[1] for path in self._methods})

    def install(self, router: Router) -> None:
        """Adds every method to a router; its 404 and 405 answer gRPC clients in their own way from now on."""
        for path, endpoint in self._methods.items():
            router.add("POST", path, endpoint, streaming=True, codings=None)
        otherwise = router.fallback

        def fallback(status: int, allowed: tuple[str, ...], exchange: Exchange) -> None:
            if is_grpc(exchange.headers) and isinstance(exchange, Http2Exchange):
                exchange.grpc_status = Status.UNIMPLEMENTED
                service, _, method = exchange.path[1:].partition("/")
                message = f"unknown method {method} of service {service}"
                exchange.answer(trailers_only(Status.UNIMPLEMENTED, message), 0, (), None)
            else:
                otherwise(status, allowed, exchange)

        router.fallback = fallback  # type: ignore[method-assign]

    @property
    def deadlines(self) -> Deadlines:
        if self._deadlines is None:
            self._deadlines = Deadlines(asyncio.get_running_loop())
        return self._deadlines

    def _start_unary(self, handler: UnaryHandler, exchange: Exchange) -> None:
        stream = _grpc_stream(exchange)
        if stream is not None:
            call = UnaryCall(self, stream, handler)
            stream.paced = False  # one message, whose size is checked before room is made for it
            stream.on_body = call.receive
            self._start(call, stream)

    def _start_stream(self, handler: StreamHandler, exchange: Exchange) -> None:
        stream = _grpc_stream(exchange)
        if stream is not None:
            call = StreamCall(self, stream)
            stream.patient = True
            stream.on_body = call.receive
            if self._start(call, stream):
                try:
                    handler(call)
                except Exception as error:
                    call.fail_with(error)

    def _start(self, call: Call, exchange: Http2Exchange) -> bool:
        """Encodings and the deadline; False if the call has been refused."""
        headers = exchange.headers
        exchange.on_disconnect = call._gone
        encoding = headers.get(b"grpc-encoding")
        if encoding is not None and encoding != b"identity":
            if encoding not in ENCODINGS:
                text = f"Compression algorithm '{encoding.decode('ascii', 'replace')}' is not supported"
                call.fail(Status.UNIMPLEMENTED, text)
                return False
            call._encoding = encoding
        if self.compression is not CompressionLevel.NONE:
            call._accepted = choose_encoding(headers.get(b"grpc-accept-encoding"))
        timeout = headers.get(b"grpc-timeout")
        if timeout is not None:
            try:
                call.deadline_ns = exchange.received_ns + parse_timeout(timeout)
            except ValueError as error:
                call.fail(Status.INTERNAL, str(error))
                return False
            call._deadline_slot = self.deadlines.add(call.deadline_ns, call)
        return True

    def __repr__(self) -> str:
        return f"<GrpcServer {len(self._methods)} methods>"


def _grpc_stream(exchange: Exchange) -> Http2Exchange | None:
    """The exchange, if what it carries is gRPC; otherwise it has been answered."""
    content_type = exchange.headers.get(b"content-type")
    if content_type not in _PLAIN_TYPES and not _is_proto(content_type):
        exchange.respond(415, JSON, error_body("content-type application/grpc or application/grpc+proto expected"))
    elif not isinstance(exchange, Http2Exchange):
        headers = (*JSON, (b"upgrade", b"h2c"))
        exchange.respond(426, headers, error_body("gRPC needs HTTP/2: this connection speaks HTTP/1.1"))
    elif exchange.headers.get(b"te") != b"trailers":
        exchange.grpc_status = Status.INTERNAL
        fields = trailers_only(Status.INTERNAL, "'te: trailers' expected: a proxy on the way does not support gRPC")
        exchange.answer(fields, 0, (), None)
    else:
        return exchange
    return None


def _is_proto(content_type: bytes | None) -> bool:
    """With parameters, as in `application/grpc; charset=utf-8`."""
    return content_type is not None and content_type.partition(b";")[0].strip().lower() in _PLAIN_TYPES


def _as_function(handler: Callable[[Any], Any]) -> Callable[[Any], Any]:
    if not (iscoroutinefunction(handler) or iscoroutinefunction(getattr(handler, "__call__", None))):  # noqa: B004
        return handler

    async def run(call: Call) -> None:
        try:
            await handler(call)
        except asyncio.CancelledError:
            if not call.finished:
                call.fail(Status.CANCELLED, "the call has been cancelled")
        except Exception as error:
            call.fail_with(error)

    @functools.wraps(handler)
    def start(call: Call) -> None:
        task = asyncio.get_running_loop().create_task(run(call))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)

        def cancel() -> None:
            task.cancel()

        call.on_cancel = cancel  # the handler may set another

    return start
