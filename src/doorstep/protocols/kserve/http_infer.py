"""POST …/infer: from an exchange to the server, and from a response to the exchange. Knows no queue and no backend."""

from __future__ import annotations

import asyncio
import logging
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from doorstep.client_memory import Loan, LongRead
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, Internal, Unsupported
from doorstep.protocols.kserve.aside import Outcome, aside, is_long_request, is_long_response
from doorstep.protocols.kserve.errors import respond_error
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.http_decode import decode_infer, header_length
from doorstep.protocols.kserve.http_encode import encode_infer
from doorstep.protocols.kserve.http_templates import HttpTemplates
from doorstep.protocols.kserve.single import Early, gather
from doorstep.protocols.kserve.wanted import ALL_BINARY, ALL_JSON
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.trace import HTTP
from doorstep.wire.answers import JSON, fail
from doorstep.wire.compression import choose_coding, compress
from doorstep.wire.exchange import Buffer, Exchange, Headers
from doorstep.wire.request_id import HEADER as REQUEST_ID
from doorstep.wire.request_id import with_request_id

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

logger = logging.getLogger("doorstep.kserve")

COMPRESSED_ON_LOOP = 16_384  # bytes; more takes a millisecond, and a thread
_BINARY_CONTENT = (b"content-type", b"application/octet-stream")


class HttpSender:
    """Answers one exchange with one response. Touched only from the event loop."""

    __slots__ = ("_early", "_exchange", "config", "loan", "wanted")

    say = staticmethod(respond_error)  # how an error is answered

    def __init__(self, exchange: Exchange, config: ModelConfig) -> None:
        self._exchange: Exchange | None = exchange
        self._early: Early | None = None  # responses that came before the final one
        self.config = config
        self.loan: Loan | None = None  # the regions of shared memory that it names
        self.wanted = ALL_JSON

    def send(self, response: InferenceResponse, final: bool) -> None:
        if not final or response.flag_only or self._early is not None:
            early = self._early = self._early or Early()
            found = gather(early, response, final)
            if found is None:
                return
            response = found
        exchange = self._exchange
        if exchange is None:  # answered already
            return
        self.release()
        exchange.on_disconnect = None
        if response.error is not None:
            if self.loan is not None:
                self.loan.end()
            self.say(exchange, response.error)
            return
        if is_long_response(response.outputs, binary=self.wanted is ALL_BINARY):
            aside(partial(self._encoded, exchange, response), encode_infer, response, self.wanted, self.config)
            return
        try:
            text, buffers = encode_infer(response, self.wanted, self.config)
        except Exception as error:
            self._cannot_encode(exchange, response, error)
            return
        finally:
            if self.loan is not None:
                self.loan.end()
        self.respond(exchange, text, buffers)

    def _encoded(self, exchange: Exchange, response: InferenceResponse, done: Outcome) -> None:
        """A long response has been written in a thread."""
        if self.loan is not None:
            self.loan.end()
        try:
            text, buffers = done.result()
        except Exception as error:
            self._cannot_encode(exchange, response, error)
        else:
            self.respond(exchange, text, buffers)

    def respond(self, exchange: Exchange, text: bytes, buffers: tuple[Buffer, ...]) -> None:
        """Sends the JSON and the binary tensors after it."""
        _respond(exchange, _binary_headers(len(text)) if buffers else JSON, text, buffers)

    def _cannot_encode(self, exchange: Exchange, response: InferenceResponse, error: Exception) -> None:
        if not isinstance(error, DoorstepError):
            logger.error("%r cannot be encoded", response, exc_info=error)
            error = Internal(f"the response cannot be encoded: {error}")
        self.say(exchange, error)

    def refuse(self) -> None:
        """Nothing will be sent: the request was not taken."""
        self.release()
        if self.loan is not None:
            self.loan.end()

    def release(self) -> None:
        """Lets go of the exchange, which holds the request that holds this: a ring would keep tensors for long."""
        self._exchange = None


@lru_cache(maxsize=1024)
def _binary_headers(json_size: int) -> Headers:
    return (_BINARY_CONTENT, (b"inference-header-content-length", b"%d" % json_size))


def _respond(exchange: Exchange, headers: Headers, text: bytes, buffers: tuple[Buffer, ...]) -> None:
    asked = exchange.headers
    if REQUEST_ID in asked:
        headers = with_request_id(asked, headers)
    accepted = asked.get(b"accept-encoding")
    if accepted is None:
        exchange.respond(200, headers, text, *buffers)
    else:
        _respond_coded(exchange, choose_coding(accepted), headers, (text, *buffers))


def _respond_coded(exchange: Exchange, coding: bytes, headers: Headers, body: tuple[Buffer, ...]) -> None:
    if coding == b"identity":
        exchange.respond(200, headers, *body)
        return
    headers = [*headers, (b"content-encoding", coding)]
    if sum(map(len, body)) <= COMPRESSED_ON_LOOP:
        exchange.respond(200, headers, *compress(coding, *body))
        return
    future = asyncio.get_running_loop().run_in_executor(None, compress, coding, *body)
    future.add_done_callback(lambda done: exchange.respond(200, headers, *done.result()))


class InferEndpoint:
    __slots__ = ("_forwarding", "_max_input_size", "_regions", "_server", "_templates", "sender")

    def __init__(
        self, server: InferenceServer, max_input_size: int, forwarding: HeaderForwarding | None = None
    ) -> None:
        self._server = server
        self.sender = HttpSender  # what answers; another front has another
        self._forwarding = forwarding
        self._regions = server.regions
        self._templates = HttpTemplates()
        self._max_input_size = max_input_size

    def infer(self, exchange: Exchange) -> None:
        params = exchange.params
        try:
            version = params.get("version", "")
            model = self._server.model(params["name"], version)
            config = model.config
            if config.decoupled:
                raise Unsupported("HTTP end point doesn't support models with decoupled transaction policy")
            body = exchange.body
            size = len(body)
            declared = exchange.headers.get(b"inference-header-content-length")
            template = None
            if declared is not None:
                size = header_length(declared, size)
                template = self._templates.find(body, size)
            sender = self.sender(exchange, config)
            request = InferenceRequest(config.name, {}, sender, model_version=version, received_ns=exchange.received_ns)
            exchange.state = request  # for the access log
            exchange.on_disconnect = request.cancel
            if self._server.tracer is not None:
                self._server.tracer.begin(request, HTTP, exchange.headers)
            if template is not None:
                request.inputs[template.input_name] = template.tensor(body, size)
                request.requested_outputs = template.requested_outputs
                sender.wanted = template.wanted
                if self._forwarding is not None:
                    self._forwarding.apply(request, exchange.headers)
                self._server.infer(request, model)
                return
            loan = sender.loan = self._regions.loan() if self._regions.allowed else None
            long = is_long_request(size, len(body), config)
            if not long:
                try:
                    sender.wanted = decode_infer(request, body, size, config, self._max_input_size, loan)
                except LongRead:  # megabytes of shared memory
                    long = True
                    request.inputs.clear()
            if long:
                if loan is not None:
                    loan.begin_again()
                decode = partial(decode_infer, request, body, size, config, self._max_input_size, loan)
                aside(partial(self._decoded, exchange, request, sender), decode)
                return
            if self._forwarding is not None:
                self._forwarding.apply(request, exchange.headers)
            self._server.infer(request, model)
            if declared is not None and (loan is None or not loan.used):
                self._templates.learn(body, size, request, sender.wanted)
        except DoorstepError as error:
            self._refuse(exchange, error)

    def _decoded(self, exchange: Exchange, request: InferenceRequest, sender: HttpSender, done: Outcome) -> None:
        """A long request has been read in a thread."""
        try:
            sender.wanted = done.result()
            if request.cancelled:
                exchange.state.sender.refuse()
            else:
                if self._forwarding is not None:
                    self._forwarding.apply(request, exchange.headers)
                self._server.infer(request)
        except DoorstepError as error:
            self._refuse(exchange, error)
        except Exception as error:
            fail(exchange, error)

    def _refuse(self, exchange: Exchange, error: DoorstepError) -> None:
        exchange.on_disconnect = None
        if exchange.state is not None:
            exchange.state.sender.refuse()
        self.sender.say(exchange, error)
