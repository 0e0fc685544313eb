"""The server as model code sees it, without one: other models are functions. Knows no process and no socket."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from doorstep.backends.base import ModelCall
from doorstep.errors import DoorstepError, NotFound
from doorstep.types import Tensor

Item = tuple[Sequence[Tensor] | DoorstepError | None, bool]
Answer = Callable[[ModelCall], Iterable[Item]]


class FakeResponses:
    """Responses that a thread, or the test, puts in by `add`."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: Callable[[], None] | None = None
        self.cancelled = threading.Event()
        self.stopped = threading.Event()

    def add(self, outputs: Sequence[Tensor] | DoorstepError | None, final: bool) -> None:
        with self._lock:
            self._items.put((outputs, final))
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting()

    def get(self, timeout: float | None = None) -> Item:
        try:
            return self._items.get(timeout=timeout) if timeout != 0 else self._items.get_nowait()
        except queue.Empty:
            raise TimeoutError from None

    def notify(self, ready: Callable[[], None]) -> None:
        with self._lock:
            if self._items.empty():
                self._waiting = ready
                return
        ready()

    def cancel(self) -> None:
        self.cancelled.set()

    def stop(self) -> None:
        self.stopped.set()


class FakeServer:
    """`models` answer calls, by name; `answers` what is asked and told. What came is in `calls` and `asked`."""

    def __init__(
        self,
        models: dict[str, Answer] | None = None,
        answers: dict[str, Callable[[Any, bytes], Any]] | None = None,
        decoupled: Iterable[str] = (),
    ) -> None:
        self.models = models or {}
        self.answers: dict[str, Callable[[Any, bytes], Any]] = {"model_properties": self._properties, **(answers or {})}
        self.decoupled = set(decoupled)
        self.calls: list[ModelCall] = []
        self.responses: list[FakeResponses] = []
        self.asked: list[tuple[str, Any, bytes]] = []

    def call(self, call: ModelCall) -> FakeResponses:
        self.calls.append(call)
        responses = FakeResponses()
        self.responses.append(responses)
        for outputs, final in self.models[call.model_name](call):
            responses.add(outputs, final)
        return responses

    def ask(self, what: str, payload: Any, data: bytes = b"") -> Any:
        self.asked.append((what, payload, data))
        return self.answers[what](payload, data)

    def tell(self, what: str, payload: Any) -> None:
        self.asked.append((what, payload, b""))
        if what in self.answers:
            self.answers[what](payload, b"")

    def _properties(self, payload: Any, _: bytes) -> dict[str, bool]:
        if payload["name"] not in self.models:
            raise NotFound(f"Request for unknown model: '{payload['name']}' is not found")
        return {"decoupled": payload["name"] in self.decoupled}
