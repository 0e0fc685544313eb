"""What the model of one worker process asks of the server: requests to other models, and the server's own services.

Knows no batch and no restart. Touched only from the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from doorstep.backends.base import ModelCall
from doorstep.errors import DoorstepError, Internal, Unsupported
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.services import Services
from doorstep.workers.child_request import SEQUENCE_END, SEQUENCE_START
from doorstep.workers.frames import RESPONSE_BYTES, WINDOW_BYTES, Kind, Layout, read_tensors
from doorstep.workers.model_call import make_request, outputs_of, run
from doorstep.workers.outcome import error_meta, outputs_meta
from doorstep.workers.side_link import SideLink

logger = logging.getLogger("doorstep.model")

COPY_BYTES = 2 * 1024 * 1024  # copying more than this would hold up the loop: a thread does it
MOST_TOLD = 10_000  # what was told and not heard yet; then the process waits


class Calls:
    def __init__(
        self,
        model: str,
        services: Services,
        loop: asyncio.AbstractEventLoop,
        find: Callable[[int], InferenceRequest | None],
    ) -> None:
        """`model` is who asks; `find` gives the request of a number, as the process knows them."""
        self.model = model
        self.loop = loop
        self.link: SideLink
        self._services = services
        self._find = find
        self._running: dict[int, _CallSender] = {}
        self._children: dict[int, set[int]] = {}  # number of a request → those of the calls made for it
        self._told: deque[tuple[str, Any]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.handlers: dict[int, Callable[[Any, bytearray], None]] = {
            Kind.CALL: self._on_call,
            Kind.READ: self._on_read,
            Kind.CANCEL_CALL: self._on_cancel,
            Kind.ASK: self._on_ask,
            Kind.TELL: self._on_tell,
        }

    def cancel_of(self, number: int) -> None:
        """The request is cancelled, and so is what was asked for it."""
        for child in tuple(self._children.get(number, ())):
            if child in self._running:
                self._running[child].request.cancel()

    def close(self) -> None:
        """The process has ended."""
        running, self._running = self._running, {}
        for sender in running.values():
            sender.request.cancel()
        for task in self._tasks:
            task.cancel()

    def done(self, sender: _CallSender) -> None:
        self._running.pop(sender.number, None)
        if sender.parent:
            children = self._children[sender.parent]
            children.discard(sender.number)
            if not children:
                del self._children[sender.parent]

    # Requests to other models

    def _on_call(self, meta: Any, data: bytearray) -> None:
        number, segment, entries, name, version, id, asked, parameters, correlation, flags, timeout, priority, of = meta
        call = ModelCall(
            name,
            read_tensors(entries, self.link.memory(segment, data)),
            version,
            id,
            asked,
            parameters,
            correlation,
            bool(flags & SEQUENCE_START),
            bool(flags & SEQUENCE_END),
            timeout,
            priority,
        )
        waiter = self._find(abs(of)) if of else None
        parent = waiter if of > 0 else None
        sender = _CallSender(self, number, abs(of) if waiter is not None else 0)
        request = sender.request = make_request(call, sender)
        self._running[number] = sender
        if sender.parent:
            self._children.setdefault(sender.parent, set()).add(number)
        run(self._services, request, parent)

    def _on_read(self, meta: Any, _: bytearray) -> None:
        number, cost = meta
        if number in self._running:
            self._running[number].read(cost)

    def _on_cancel(self, number: Any, _: bytearray) -> None:
        """A negative number: its model is only asked to stop."""
        if abs(number) in self._running:
            request = self._running[abs(number)].request
            if number > 0:
                request.cancel()
            else:
                request.ask_to_stop()

    # The server's services

    def _on_ask(self, meta: Any, data: bytearray) -> None:
        number, what, payload = meta
        task = self.loop.create_task(self._answer(number, what, payload, bytes(data)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, number: int, what: str, payload: Any, data: bytes) -> None:
        answer, error = None, None
        try:
            answer = await ask_services(self._services, self.model, what, payload, data)
        except DoorstepError as raised:
            error = error_meta(raised)
        try:
            self.link.send(Kind.ANSWER, (number, answer, error))
        except TypeError as raised:
            self.link.send(Kind.ANSWER, (number, None, error_meta(Internal(f"'{what}' has no JSON answer: {raised}"))))

    def _on_tell(self, meta: Any, _: bytearray) -> None:
        what, payload = meta
        self._told.append((what, payload))
        if len(self._told) == 1:
            task = self.loop.create_task(self._hear())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif len(self._told) >= MOST_TOLD:
            self.link.pause()

    async def _hear(self) -> None:
        """One after the other, in their order."""
        while self._told:
            what, payload = self._told[0]
            try:
                await ask_services(self._services, self.model, what, payload, b"")
            except DoorstepError as error:
                log_told(self.model, what, error)
            self._told.popleft()
            if len(self._told) == MOST_TOLD // 2:
                self.link.read_on()


async def ask_services(services: Services, model: str, what: str, payload: Any, data: bytes) -> Any:
    """Raises DoorstepError, whatever a handler raises."""
    handler = services.handlers.get(what)
    if handler is None:
        raise Unsupported(f"this server offers its models no '{what}'")
    try:
        return await handler(model, payload, data)
    except DoorstepError:
        raise
    except Exception as error:
        logger.exception("model '%s' asked for %s", model, what)
        raise Internal(f"{what}: {type(error).__name__}: {error}") from error


def log_told(model: str, what: str, error: DoorstepError) -> None:
    """Nobody waits for an answer, so the log has to do."""
    logger.warning("model '%s': %s: %s", model, what, error.message)


class _CallSender:
    """Sends what a model answers to the process that called it."""

    def __init__(self, calls: Calls, number: int, parent: int) -> None:
        self.number = number
        self.parent = parent  # the request it is cancelled with, as the process numbers them; 0: none
        self.request: InferenceRequest
        self._calls = calls
        self._unread = 0  # bytes the process has not looked at
        self._behind: deque[tuple[InferenceResponse, bool]] | None = None  # one is being copied; these come after it

    def send(self, response: InferenceResponse, final: bool) -> None:
        if self._behind is not None:
            self._behind.append((response, final))
        elif self._calls.link.closed:
            if final:
                self._calls.done(self)
        else:
            self._send(response, final)

    def read(self, cost: int) -> None:
        self._unread -= cost
        if self._unread * 2 < WINDOW_BYTES:
            self.request.room()

    def _send(self, response: InferenceResponse, final: bool) -> None:
        calls = self._calls
        outputs = outputs_of(self.request, response)
        what: Any = None
        segment_id = -1
        cost = RESPONSE_BYTES
        data: bytes | bytearray = b""
        if isinstance(outputs, DoorstepError):
            what = error_meta(outputs)
        elif outputs is not None:
            layout = Layout()
            try:
                what = outputs_meta(outputs, layout)
                segment_id, data, segment = calls.link.place(layout)
                cost += layout.size
                if segment is not None and layout.size > COPY_BYTES:
                    self._behind = deque()
                    copied = calls.loop.run_in_executor(None, layout.write, segment.map)
                    copied.add_done_callback(partial(self._copied, (segment_id, what, cost), final))
                    return
                if segment is not None:
                    layout.write(segment.map)
            except Exception as error:  # no memory, or outputs that cannot be laid out
                what, segment_id, data = error_meta(Internal(f"the response cannot be sent: {error}")), -1, b""
        self._tell(segment_id, what, cost, final, data)

    def _copied(self, meta: tuple[int, Any, int], final: bool, copied: asyncio.Future[None]) -> None:
        behind, self._behind = self._behind, None
        segment_id, what, cost = meta
        if copied.cancelled() or (error := copied.exception()) is not None:
            why = "stopping" if copied.cancelled() else str(error)
            segment_id, what = -1, error_meta(Internal(f"the response cannot be sent: {why}"))
        self._tell(segment_id, what, cost, final, b"")
        for response, is_final in behind or ():
            self.send(response, is_final)

    def _tell(self, segment: int, what: Any, cost: int, final: bool, data: bytes | bytearray) -> None:
        calls = self._calls
        if final:
            calls.done(self)
        calls.link.send(Kind.RESPONSE, (self.number, final, segment, what, cost), data)
        self._unread += cost
        if self._unread >= WINDOW_BYTES:
            self.request.stalled = True
