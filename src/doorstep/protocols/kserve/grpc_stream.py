"""ModelStreamInfer: many requests and their responses on one call. Knows no queue and no backend.

Errors travel inside the stream (`error_message`), so that one bad request does not end the others. Responses keep the
order of their requests, but for decoupled models, whose responses go out as they come.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, Internal
from doorstep.protocols.kserve.grpc_decode import decode_infer, parse_request
from doorstep.protocols.kserve.grpc_encode import (
    Buffers,
    encode_infer,
    encode_stream,
    encode_stream_error,
    final_flag,
    named,
)
from doorstep.protocols.kserve.grpc_infer import echo_request_id
from doorstep.protocols.kserve.wanted import ALL_BINARY
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.wire.exchange import Buffer

if TYPE_CHECKING:
    from doorstep.server import InferenceServer
    from doorstep.wire.grpc_call import StreamCall

logger = logging.getLogger("doorstep.kserve")

MOST_OPEN = 1024  # requests of one call; the next is read when one of them has been answered


class InferStream:
    """One call. Touched only from the event loop."""

    __slots__ = ("_call", "_ends_on_error", "_full", "_half_closed", "_open", "_server", "_waiting")

    def __init__(self, server: InferenceServer, call: StreamCall) -> None:
        self._server = server
        self._call = call
        self._ends_on_error = call.metadata.get(b"triton_grpc_error") == b"true"
        self._half_closed = False
        self._full = False  # the client does not read; nothing is read from it either
        self._open: dict[StreamSender, InferenceRequest] = {}  # requests not yet finally answered
        self._waiting: deque[StreamSender] = deque()  # those whose responses must keep their order
        call.on_half_close = self.half_close
        call.on_cancel = self.cancel
        call.on_drain = self.drained
        call.on_message = self.receive  # last: messages may have come already

    def receive(self, data: Buffer) -> None:
        try:
            message, raw = parse_request(data)
        except DoorstepError as error:
            self.end(error)
            return
        sender = StreamSender(self, message)
        request = InferenceRequest(message.model_name, {}, sender, id=message.id, model_version=message.model_version)
        request.deadline_ns = self._call.deadline_ns
        self._open[sender] = request
        if len(self._open) >= MOST_OPEN:
            self._call.pause()
        try:
            config = self._server.model(message.model_name, request.model_version).config
            sender.config = config
            if not config.decoupled:
                self._waiting.append(sender)
            sender.wanted, sender.wants_empty_final = decode_infer(request, message, raw)
            self._server.infer(request)
        except DoorstepError as error:
            if sender.config is None:
                self._waiting.append(sender)
            sender.refuse(error)

    def drained(self) -> None:
        """The client reads again."""
        self._full = False
        self._resume()

    def _resume(self) -> None:
        if not self._full and len(self._open) < MOST_OPEN and not self._call.finished:
            self._call.resume()

    def half_close(self) -> None:
        self._half_closed = True
        self._finish_if_done()

    def cancel(self) -> None:
        """The client is gone: nobody wants what is still running."""
        self._waiting.clear()
        for request in list(self._open.values()):
            request.cancel()

    def end(self, error: DoorstepError) -> None:
        """Ends the call with a status, and what still runs on it."""
        self._call.fail_with(error)
        self.cancel()

    def deliver(self, sender: StreamSender, message: Buffers, final: bool) -> None:
        """Sends a response of `sender`, as soon as it is its turn; no message: there is nothing to send."""
        if final:
            self._open.pop(sender, None)
        if self._call.finished:
            return
        if sender.decoupled:
            if message:
                self._send(message)
        else:
            sender.ready = message
            waiting = self._waiting
            while waiting and (ready := waiting[0].ready) is not None:
                waiting.popleft()
                self._send(ready)
        if self._half_closed:
            self._finish_if_done()
        elif final and len(self._open) == MOST_OPEN - 1:
            asyncio.get_running_loop().call_soon(self._resume)  # not from inside `receive`

    def _send(self, message: Buffers) -> None:
        if not self._call.send(*message):
            self._full = True
            self._call.pause()

    def fail(self, sender: StreamSender, error: DoorstepError, message: Buffers, final: bool) -> None:
        """A request failed after it was taken: inside the stream, or with the stream if the client wants it so."""
        if self._ends_on_error and not self._call.finished:
            self._open.pop(sender, None)
            self.end(error)
        else:
            self.deliver(sender, message, final)

    def _finish_if_done(self) -> None:
        if self._half_closed and not self._open and not self._call.finished:
            self._call.finish(0, "")


class StreamSender:
    """Answers one request of a stream. Touched only from the event loop."""

    __slots__ = ("_early", "_message", "_stream", "config", "ready", "wanted", "wants_empty_final")

    def __init__(self, stream: InferStream, message: Any) -> None:
        self._stream = stream
        self._message = message
        self._early: InferenceResponse | None = None  # of a model that is not decoupled, before its final one
        self.config: ModelConfig | None = None  # unknown until the model is found
        self.ready: Buffers | None = None  # the encoded response, waiting for its turn
        self.wanted = ALL_BINARY
        self.wants_empty_final = False

    @property
    def decoupled(self) -> bool:
        return self.config is not None and self.config.decoupled

    def refuse(self, error: DoorstepError) -> None:
        """The request was not taken."""
        self._stream.deliver(self, (encode_stream_error(error.message, named(self._message.id)),), True)

    def send(self, response: InferenceResponse, final: bool) -> None:
        if not self.decoupled:
            if not final and self._early is None:
                self._early = response
                return
            if self._early is not None:
                response.error = response.error or Internal("expected a single response, got 2")
        error = response.error
        if error is None:
            if final and self.decoupled and not response.outputs and not self.wants_empty_final:
                self._stream.deliver(self, (), True)
                return
            try:
                assert self.config is not None
                message = encode_infer(response, self.wanted, self.config, final_flag(final))
            except DoorstepError as found:
                error = found
            except Exception as found:
                logger.exception("%r cannot be encoded", response)
                error = Internal(f"the response cannot be encoded: {found}")
            else:
                self._stream.deliver(self, encode_stream(message), final)
                return
        asked = self._message
        inner = named(asked.id, asked.model_name, asked.model_version) + final_flag(final)
        self._stream.fail(self, error, (encode_stream_error(error.message, inner),), final)


def stream_handler(server: InferenceServer) -> Callable[[StreamCall], None]:
    """The handler of ModelStreamInfer."""

    def handler(call: StreamCall) -> None:
        echo_request_id(call)
        InferStream(server, call)

    return handler
