"""What a model in the server's own process may ask of the server: from its thread to the event loop and back.

Knows no socket and no process."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from doorstep.backends.base import CallResponses, ModelCall
from doorstep.errors import BackendError, DoorstepError, Unavailable
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.services import Services
from doorstep.workers.calls import ask_services, log_told
from doorstep.workers.frames import RESPONSE_BYTES, WINDOW_BYTES
from doorstep.workers.model_call import make_request, outputs_of, run
from doorstep.workers.responses import Responses


class LoopAccess:
    """A `ServerAccess`: see backends/base.py. Callable in any thread but the loop's."""

    def __init__(self, model: str, services: Services, loop: asyncio.AbstractEventLoop) -> None:
        self.model = model
        self.loop = loop
        self.services = services
        self._told: deque[tuple[str, Any]] = deque()
        self._hearing: asyncio.Task[None] | None = None

    def call(self, call: ModelCall) -> CallResponses:
        self._refuse_loop("call another model")
        return _LoopCall(self, call).responses

    def ask(self, what: str, payload: Any, data: bytes = b"") -> Any:
        self._refuse_loop("wait for the server")
        asked = ask_services(self.services, self.model, what, payload, data)
        try:
            answer = asyncio.run_coroutine_threadsafe(asked, self.loop)
        except RuntimeError:
            asked.close()
            raise _stopped() from None
        return answer.result()

    def tell(self, what: str, payload: Any) -> None:
        self._told.append((what, payload))
        on_loop(self.loop, self._hear)

    def _hear(self) -> None:
        if self._hearing is None and self._told:
            self._hearing = self.loop.create_task(self._hear_all())

    async def _hear_all(self) -> None:
        """One after the other, in their order."""
        while self._told:
            what, payload = self._told.popleft()
            try:
                await ask_services(self.services, self.model, what, payload, b"")
            except DoorstepError as error:
                log_told(self.model, what, error)
        self._hearing = None

    def _refuse_loop(self, what: str) -> None:
        """Waiting on the event loop for what only the event loop can do would last for ever."""
        try:
            running: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self.loop:
            raise BackendError(
                f"model '{self.model}' runs on the server's event loop, where it cannot {what}; "
                "give it the parameter execution: thread (or process)"
            )


class _LoopCall:
    """One call; the sender of its request."""

    def __init__(self, access: LoopAccess, call: ModelCall) -> None:
        self.responses = Responses(self._read, self._cancel)
        self._access = access
        self._unread = 0  # bytes the model has not looked at. Touched only from the loop
        self._request = make_request(call, self)
        self._parent = call.parent
        try:
            access.loop.call_soon_threadsafe(self._start)
        except RuntimeError:
            self.responses.put(_stopped(), True)

    def send(self, response: InferenceResponse, final: bool) -> None:
        cost = RESPONSE_BYTES + sum(tensor.array.nbytes for tensor in response.outputs)
        self._unread += cost
        if self._unread >= WINDOW_BYTES:
            self._request.stalled = True
        if final and self._parent is not None:
            _children(self._parent, self, add=False)
        self.responses.put(outputs_of(self._request, response), final, cost)

    def cancel(self) -> None:
        self._request.cancel()

    def _start(self) -> None:
        if self._parent is not None:
            _children(self._parent, self, add=True)
        run(self._access.services, self._request, self._parent)

    def _read(self, cost: int) -> None:
        on_loop(self._access.loop, self._has_read, cost)

    def _has_read(self, cost: int) -> None:
        self._unread -= cost
        if self._unread * 2 < WINDOW_BYTES:
            self._request.room()

    def _cancel(self, at_once: bool) -> None:
        on_loop(self._access.loop, self.cancel if at_once else self._request.ask_to_stop)


def on_loop(loop: asyncio.AbstractEventLoop, call: Any, *args: Any) -> None:
    """Calls it there, soon, unless the loop is closed: then nobody is left to tell."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        pass


class _CancelsCalls:
    """Stands in a request's `on_cancel` while it waits for calls made for it: they are cancelled with it."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.calls: set[_LoopCall] = set()

    def __call__(self, request: InferenceRequest) -> None:
        request.on_cancel = self.before
        for call in tuple(self.calls):
            call.cancel()
        if self.before is not None:
            self.before(request)


def _children(parent: InferenceRequest, call: _LoopCall, *, add: bool) -> None:
    watch = parent.on_cancel
    if isinstance(watch, _CancelsCalls):
        if add:
            watch.calls.add(call)
        else:
            watch.calls.discard(call)
            if not watch.calls:
                parent.on_cancel = watch.before
    elif add and not parent.cancelled:
        watcher = _CancelsCalls(watch)
        watcher.calls.add(call)
        parent.on_cancel = watcher


def _stopped() -> DoorstepError:
    return Unavailable("the server is stopping")
