"""POST …/generate and …/generate_stream: flat JSON in, one flat object or a stream of them out. Knows no queue.

The status is decided by the first response; what fails later says so in the stream, whose status has been sent. A
client that leaves cancels its request, and one that reads too slowly for what it asked loses it (wire/limits.py).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from doorstep.errors import DoorstepError, Internal
from doorstep.protocols.kserve.aside import TEXT_BYTES, Outcome, aside
from doorstep.protocols.kserve.errors import HTTP_STATUS, respond_error
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.generate_decode import decode_generate
from doorstep.protocols.kserve.generate_encode import END, EVENT, encode_error, encode_generate
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.trace import HTTP
from doorstep.wire.answers import JSON, fail
from doorstep.wire.exchange import Exchange
from doorstep.wire.limits import WireLimits
from doorstep.wire.request_id import with_request_id

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

logger = logging.getLogger("doorstep.kserve")

NOT_ONE = (
    "generate expects model to produce exactly 1 response, use generate stream for model that generates various number "
    "of responses"
)
EVENT_STREAM = ((b"content-type", b"text/event-stream; charset=utf-8"),)


def _encoded(response: InferenceResponse) -> tuple[bytes, int]:
    """The JSON of a response, and the status it would have."""
    error = response.error
    if error is None:
        try:
            return encode_generate(response), 200
        except DoorstepError as found:
            error = found
        except Exception as found:
            logger.exception("%r cannot be encoded", response)
            error = Internal(f"the response cannot be encoded: {found}")
    return encode_error(error), HTTP_STATUS[error.code]


class GenerateSender:
    """Answers one exchange with the one response its model gives. Touched only from the event loop."""

    __slots__ = ("_body", "_count", "_exchange", "_status")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange: Exchange | None = exchange
        self._body = b""
        self._count = 0
        self._status = 0  # 0: nothing has come yet

    def send(self, response: InferenceResponse, final: bool) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if not response.flag_only:
            self._count += 1
            if self._count == 1:
                self._body, status = _encoded(response)
                self._status = self._status or status
        self._status = self._status or 200
        if not final:
            return
        self.release()
        exchange.on_disconnect = None
        # Triton keeps the status of the first response, though what comes is an error.
        body = self._body if self._count == 1 else encode_error(Internal(NOT_ONE))
        exchange.respond(self._status, with_request_id(exchange.headers, JSON), body)

    def release(self) -> None:
        """Lets go of the exchange, which holds the request that holds this."""
        self._exchange = None


class EventSender:
    """Answers one exchange with server-sent events, one for each response. Touched only from the event loop."""

    __slots__ = ("_behind", "_exchange", "_limit")

    def __init__(self, exchange: Exchange, stream_limit: int) -> None:
        self._exchange: Exchange | None = exchange
        self._limit = stream_limit
        self._behind = 0  # bytes sent since the client ceased to read

    def send(self, response: InferenceResponse, final: bool) -> None:
        exchange = self._exchange
        if exchange is None:
            return
        if response.flag_only:
            body, status = b"", 200
        else:
            body, status = _encoded(response)
            body = EVENT + body + END
        if not exchange.started:
            exchange.start(status, with_request_id(exchange.headers, EVENT_STREAM))
            exchange.on_drain = self._drained
        if body and not exchange.write(body):
            exchange.state.stalled = True
            self._behind += len(body)
            if self._behind > self._limit:
                self._give_up(exchange)
                return
        if final:
            self.release()
            exchange.on_disconnect = exchange.on_drain = None
            exchange.end()

    def _drained(self) -> None:
        self._behind = 0
        exchange = self._exchange
        if exchange is not None:
            exchange.state.room()

    def _give_up(self, exchange: Exchange) -> None:
        """The model says more than the client reads, and memory has an end."""
        request: InferenceRequest = exchange.state
        logger.warning(
            "%r: %d bytes of its responses wait to be read, which is more than --max-stream-bytes: cancelled",
            request,
            self._behind,
        )
        self.release()
        exchange.on_disconnect = exchange.on_drain = None
        exchange.reset()
        request.cancel()

    def release(self) -> None:
        """Lets go of the exchange, which holds the request that holds this."""
        self._exchange = None


class GenerateEndpoint:
    __slots__ = ("_forwarding", "_limits", "_server")

    def __init__(self, server: InferenceServer, limits: WireLimits, forwarding: HeaderForwarding | None) -> None:
        self._server = server
        self._limits = limits
        self._forwarding = forwarding

    def generate(self, exchange: Exchange) -> None:
        params = exchange.params
        self.call(exchange, params["name"], params.get("version", ""), streaming=False)

    def generate_stream(self, exchange: Exchange) -> None:
        params = exchange.params
        self.call(exchange, params["name"], params.get("version", ""), streaming=True)

    def call(self, exchange: Exchange, name: str, version: str, *, streaming: bool) -> None:
        """One call of a model, whatever path it came by."""
        try:
            config = self._server.model(name, version).config
            sender = EventSender(exchange, self._limits.stream_bytes) if streaming else GenerateSender(exchange)
            request = InferenceRequest(config.name, {}, sender, model_version=version, received_ns=exchange.received_ns)
            exchange.state = request  # for the access log
            exchange.on_disconnect = request.cancel
            if self._server.tracer is not None:
                self._server.tracer.begin(request, HTTP, exchange.headers)
            decode = partial(decode_generate, request, exchange.body, config, self._limits.body_bytes)
            if len(exchange.body) > TEXT_BYTES:
                aside(partial(self._decoded, exchange, request), decode)
                return
            decode()
            self._infer(exchange, request)
        except DoorstepError as error:
            _refuse(exchange, error)

    def _infer(self, exchange: Exchange, request: InferenceRequest) -> None:
        if self._forwarding is not None:
            self._forwarding.apply(request, exchange.headers)
        self._server.infer(request)

    def _decoded(self, exchange: Exchange, request: InferenceRequest, done: Outcome) -> None:
        """A long body has been read in a thread."""
        try:
            done.result()
            if not request.cancelled:
                self._infer(exchange, request)
        except DoorstepError as error:
            _refuse(exchange, error)
        except Exception as error:
            fail(exchange, error)


def _refuse(exchange: Exchange, error: DoorstepError) -> None:
    """Before inference has begun: plain JSON, whatever was asked for."""
    exchange.on_disconnect = None
    if exchange.state is not None:
        exchange.state.sender.release()
    respond_error(exchange, error)
