"""ModelInfer: from a call to the server, and from a response to the call. Knows no queue and no backend."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, Internal, Unsupported
from doorstep.protocols.kserve.grpc_decode import decode_infer, parse_request
from doorstep.protocols.kserve.grpc_encode import encode_infer
from doorstep.protocols.kserve.wanted import ALL_BINARY
from doorstep.request import InferenceRequest, InferenceResponse

if TYPE_CHECKING:
    from doorstep.server import InferenceServer
    from doorstep.wire.grpc_call import UnaryCall

logger = logging.getLogger("doorstep.kserve")


class CallSender:
    """Answers one call with one response. Touched only from the event loop."""

    __slots__ = ("_call", "_early", "config", "wanted")

    def __init__(self, call: UnaryCall, config: ModelConfig) -> None:
        self._call = call
        self._early: InferenceResponse | None = None  # a response that came before the final one
        self.config = config
        self.wanted = ALL_BINARY

    def send(self, response: InferenceResponse, final: bool) -> None:
        if not final and self._early is None:
            self._early = response
            return
        call = self._call
        call.on_cancel = None
        if self._early is not None:
            response.error = response.error or Internal("expected a single response, got 2")
        if response.error is not None:
            call.fail_with(response.error)
            return
        try:
            message = encode_infer(response, self.wanted, self.config)
        except DoorstepError as error:
            call.fail_with(error)
        except Exception as error:
            logger.exception("%r cannot be encoded", response)
            call.fail_with(Internal(f"the response cannot be encoded: {error}"))
        else:
            call.respond(message)


class ModelInfer:
    __slots__ = ("_server",)

    def __init__(self, server: InferenceServer) -> None:
        self._server = server

    def infer(self, call: UnaryCall) -> None:
        """The handler. What it raises becomes the call's status."""
        message, raw = parse_request(call.message)
        version = message.model_version
        config = self._server.model(message.model_name, version).config
        if config.decoupled:
            raise Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy")
        sender = CallSender(call, config)
        request = InferenceRequest(
            config.name, {}, sender, model_version=version, received_ns=call.exchange.received_ns
        )
        request.deadline_ns = call.deadline_ns
        sender.wanted, _ = decode_infer(request, message, raw)
        call.on_cancel = request.cancel
        try:
            self._server.infer(request)
        except DoorstepError:
            call.on_cancel = None
            raise
