"""ModelInfer: from a call to the server, and from a response to the call. Knows no queue and no backend."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

from doorstep.client_memory import Loan, LongRead
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, Internal, Unsupported
from doorstep.protocols.kserve.aside import Outcome, aside, is_long_request, is_long_response
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.grpc_decode import decode_infer, parse_request
from doorstep.protocols.kserve.grpc_encode import encode_infer
from doorstep.protocols.kserve.grpc_templates import GrpcTemplates, MessageTemplate
from doorstep.protocols.kserve.single import Early, gather
from doorstep.protocols.kserve.wanted import ALL_BINARY
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.trace import GRPC
from doorstep.wire.request_id import HEADER as REQUEST_ID
from doorstep.wire.request_id import request_id

if TYPE_CHECKING:
    from doorstep.server import InferenceServer
    from doorstep.wire.grpc_call import Call, UnaryCall

logger = logging.getLogger("doorstep.kserve")

DECOUPLED = "ModelInfer RPC doesn't support models with decoupled transaction policy"


def echo_request_id(call: Call) -> None:
    """The answer begins with the caller's `x-request-id`, where there is one."""
    value = request_id(call.metadata)
    if value:
        call.initial_metadata = [(REQUEST_ID, value)]


class CallSender:
    """Answers one call with one response. Touched only from the event loop."""

    __slots__ = ("_call", "_early", "config", "loan", "wanted")

    def __init__(self, call: UnaryCall, config: ModelConfig) -> None:
        self._call: UnaryCall | None = call
        self._early: Early | None = None  # responses that came before the final one
        self.config = config
        self.loan: Loan | None = None  # the regions of shared memory that it names
        self.wanted = ALL_BINARY

    def send(self, response: InferenceResponse, final: bool) -> None:
        if not final or response.flag_only or self._early is not None:
            early = self._early = self._early or Early()
            found = gather(early, response, final)
            if found is None:
                return
            response = found
        call = self._call
        if call is None:  # answered already
            return
        self.release()
        call.on_cancel = None
        loan = self.loan
        if response.error is not None:
            if loan is not None:
                loan.end()
            call.fail_with(response.error)
            return
        if is_long_response(response.outputs, binary=loan is None or not loan.writes):
            aside(partial(self._encoded, call, response), encode_infer, response, self.wanted, self.config)
            return
        try:
            message = encode_infer(response, self.wanted, self.config)
        except Exception as error:
            _cannot_encode(call, response, error)
            return
        finally:
            if loan is not None:
                loan.end()
        call.respond(message)

    def _encoded(self, call: UnaryCall, response: InferenceResponse, done: Outcome) -> None:
        """A long response has been written in a thread."""
        if self.loan is not None:
            self.loan.end()
        try:
            message = done.result()
        except Exception as error:
            _cannot_encode(call, response, error)
        else:
            call.respond(message)

    def refuse(self) -> None:
        """Nothing will be sent: the request was not taken."""
        self.release()
        if self.loan is not None:
            self.loan.end()

    def release(self) -> None:
        """Lets go of the call, which holds the request that holds this: a ring would keep tensors for long."""
        self._call = None


def _cannot_encode(call: UnaryCall, response: InferenceResponse, error: Exception) -> None:
    if not isinstance(error, DoorstepError):
        logger.error("%r cannot be encoded", response, exc_info=error)
        error = Internal(f"the response cannot be encoded: {error}")
    call.fail_with(error)


class ModelInfer:
    __slots__ = ("_forwarding", "_regions", "_server", "_templates")

    def __init__(self, server: InferenceServer, forwarding: HeaderForwarding | None = None) -> None:
        self._server = server
        self._forwarding = forwarding
        self._regions = server.regions
        self._templates = GrpcTemplates()

    def infer(self, call: UnaryCall) -> None:
        """The handler. What it raises becomes the call's status."""
        if REQUEST_ID in call.metadata:
            echo_request_id(call)
        body = call.message
        if isinstance(body, bytes):
            template = self._templates.find(body)
            if template is not None:
                self._infer_again(call, body, template)
                return
        message, raw = parse_request(body)
        version = message.model_version
        config = self._server.model(message.model_name, version).config
        if config.decoupled:
            raise Unsupported(DECOUPLED)
        sender = CallSender(call, config)
        request = InferenceRequest(
            config.name, {}, sender, model_version=version, received_ns=call.exchange.received_ns
        )
        call.exchange.state = request  # for the access log
        request.deadline_ns = call.deadline_ns
        call.on_cancel = request.cancel
        if self._server.tracer is not None:
            self._server.tracer.begin(request, GRPC, call.metadata)
        loan = sender.loan = self._regions.loan() if self._regions.allowed else None
        long = is_long_request(0, len(body), config)
        try:
            if not long:
                sender.wanted, _ = decode_infer(request, message, raw, loan)
                if self._forwarding is not None:
                    self._forwarding.apply(request, call.metadata, grpc=True)
                self._server.infer(request)
        except LongRead:  # megabytes of shared memory
            long = True
            request.inputs.clear()
        except DoorstepError:
            call.on_cancel = None
            call.exchange.state.sender.refuse()
            raise
        if long:
            if loan is not None:
                loan.begin_again()
            aside(partial(self._decoded, call, request, sender), decode_infer, request, message, raw, loan)
            return
        if isinstance(body, bytes) and (loan is None or not loan.used):
            self._templates.learn(body, message, request, sender.wanted)

    def _decoded(self, call: UnaryCall, request: InferenceRequest, sender: CallSender, done: Outcome) -> None:
        """A long message has been read in a thread."""
        try:
            sender.wanted, _ = done.result()
            if request.cancelled:
                call.exchange.state.sender.refuse()
            else:
                if self._forwarding is not None:
                    self._forwarding.apply(request, call.metadata, grpc=True)
                self._server.infer(request)
        except Exception as error:
            call.on_cancel = None
            call.exchange.state.sender.refuse()
            call.fail_with(error)

    def _infer_again(self, call: UnaryCall, body: bytes, template: MessageTemplate) -> None:
        """A message that says what an earlier one said, of other values."""
        server = self._server
        name, version = template.model_name, template.model_version
        model = server.model(name, version)
        config = model.config
        if config.decoupled:
            raise Unsupported(DECOUPLED)
        sender = CallSender(call, config)
        sender.wanted = template.wanted
        request = InferenceRequest(
            name,
            {template.input_name: template.tensor(body, template.offset)},
            sender,
            model_version=version,
            requested_outputs=template.requested_outputs,
            received_ns=call.exchange.received_ns,
        )
        call.exchange.state = request  # for the access log
        request.deadline_ns = call.deadline_ns
        call.on_cancel = request.cancel
        if self._server.tracer is not None:
            self._server.tracer.begin(request, GRPC, call.metadata)
        try:
            if self._forwarding is not None:
                self._forwarding.apply(request, call.metadata, grpc=True)
            server.infer(request, model)
        except DoorstepError:
            call.on_cancel = None
            call.exchange.state.sender.release()
            raise
