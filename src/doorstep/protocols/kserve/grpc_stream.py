"""ModelStreamInfer: many requests and their responses on one call. Knows no queue and no backend.

Errors travel inside the stream (`error_message`), so that one bad request does not end the others. Responses keep the
order of their requests, but for decoupled models, whose responses go out as they come.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from doorstep.errors import DoorstepError
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.protocols.kserve.grpc_decode import decode_infer, parse_request
from doorstep.protocols.kserve.grpc_encode import Buffers
from doorstep.protocols.kserve.grpc_infer import echo_request_id
from doorstep.protocols.kserve.grpc_stream_sender import StreamSender
from doorstep.request import InferenceRequest
from doorstep.trace import GRPC
from doorstep.wire.exchange import Buffer
from doorstep.wire.grpc_status import Status
from doorstep.wire.limits import WireLimits

if TYPE_CHECKING:
    from doorstep.server import InferenceServer
    from doorstep.wire.grpc_call import StreamCall

logger = logging.getLogger("doorstep.kserve")

MOST_OPEN = 1024  # requests of one call; the next is read when one of them has been answered


class InferStream:
    """One call. Touched only from the event loop."""

    __slots__ = (
        "_behind",
        "_call",
        "_ends_on_error",
        "_forwarding",
        "_full",
        "_half_closed",
        "_limit",
        "_open",
        "_server",
        "_waiting",
        "takes_framed",
    )

    def __init__(
        self, server: InferenceServer, call: StreamCall, limit: int, forwarding: HeaderForwarding | None
    ) -> None:
        self._server = server
        self._call = call
        self._limit = limit  # bytes of decoupled models' responses that may wait for the client
        self._behind = 0  # such bytes sent since it ceased to read
        self._forwarding = forwarding
        self.takes_framed = call.takes_framed
        self._ends_on_error = call.metadata.get(b"triton_grpc_error") == b"true"
        self._half_closed = False
        self._full = False  # the client does not read; nothing is read from it either
        self._open: dict[StreamSender, InferenceRequest] = {}  # requests not yet finally answered
        self._waiting: deque[StreamSender] = deque()  # those whose responses must keep their order
        call.on_half_close = self.half_close
        call.on_cancel = self.cancel
        call.on_drain = self.drained
        call.on_full = self.filled
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
            if self._server.tracer is not None:
                self._server.tracer.begin(request, GRPC, self._call.metadata)
            sender.decoupled = config.decoupled
            if not config.decoupled:
                self._waiting.append(sender)
            if self._server.regions.allowed:
                sender.loan = self._server.regions.loan(on_loop=False)  # requests must keep their order
            sender.wanted, sender.wants_empty_final = decode_infer(request, message, raw, sender.loan)
            if self._forwarding is not None:
                self._forwarding.apply(request, self._call.metadata, grpc=True)
            self._server.infer(request)
        except DoorstepError as error:
            if sender.config is None:
                self._waiting.append(sender)
            sender.refuse(error)
            if request.trace is not None:
                request.trace.refused(request)

    def drained(self) -> None:
        """The client reads again."""
        self._full = False
        self._behind = 0
        for request in list(self._open.values()):
            request.room()
        self._resume()

    def filled(self) -> None:
        """The client reads too slowly, or no more."""
        self._full = True
        self._call.pause()
        for request in self._open.values():
            request.stalled = True

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
            self._close(sender)
        if self._call.finished:
            return
        if sender.decoupled:
            if message:
                self._send(message)
                if self._full:
                    self._fall_behind(sum(map(len, message)))
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

    def deliver_framed(self, message: bytes) -> None:
        """Sends one of many responses of a decoupled model, its length in front."""
        if not self._call.finished:
            self._call.send_framed(message)
            if self._full:
                self._fall_behind(len(message))

    def _fall_behind(self, size: int) -> None:
        """A model says more than the client reads; beyond a limit the call ends, for memory has an end."""
        self._behind += size
        if self._behind > self._limit and not self._call.finished:
            text = f"the client does not read: {self._behind} bytes of responses wait, more than --max-stream-bytes"
            logger.warning("%s: %s", self._call.peer, text)
            self._call.drop_unsent()
            self._call.fail(Status.RESOURCE_EXHAUSTED, text)
            self.cancel()

    def _close(self, sender: StreamSender) -> None:
        self._open.pop(sender, None)
        if sender.loan is not None:
            sender.loan.end()

    def _send(self, message: Buffers) -> None:
        if not self._call.send(*message):
            self.filled()

    def fail(self, sender: StreamSender, error: DoorstepError, message: Buffers, final: bool) -> None:
        """A request failed after it was taken: inside the stream, or with the stream if the client wants it so."""
        if self._ends_on_error and not self._call.finished:
            self._close(sender)
            self.end(error)
        else:
            self.deliver(sender, message, final)

    def _finish_if_done(self) -> None:
        if self._half_closed and not self._open and not self._call.finished:
            self._call.finish(0, "")


def stream_handler(
    server: InferenceServer, limits: WireLimits, forwarding: HeaderForwarding | None = None
) -> Callable[[StreamCall], None]:
    """The handler of ModelStreamInfer."""

    def handler(call: StreamCall) -> None:
        echo_request_id(call)
        InferStream(server, call, limits.stream_bytes, forwarding)

    return handler
