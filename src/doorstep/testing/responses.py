"""Where a test's responses go: nowhere, or into a list that can be waited for. Knows no scheduler."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from doorstep.errors import DoorstepError
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.types import Tensor

PATIENCE_S = 30.0


class _Nobody:
    """The sender of requests that nobody waits for."""

    def send(self, response: InferenceResponse, final: bool) -> None: ...


NOBODY = _Nobody()


class Emitted:
    """What an instance emits of a batch (Batch.emit), from any thread."""

    def __init__(self) -> None:
        self._responses: dict[InferenceRequest, list[Sequence[Tensor]]] = {}
        self._ended: set[InferenceRequest] = set()
        self._changed = threading.Condition()
        self.error: DoorstepError | None = None
        self.too_late: list[InferenceRequest] = []  # got a response after its final one

    def emit(self, request: InferenceRequest, outputs: Sequence[Tensor] | DoorstepError | None, final: bool) -> None:
        with self._changed:
            if request in self._ended:
                self.too_late.append(request)
                return
            if isinstance(outputs, DoorstepError):
                self.error = outputs
                final = True
            elif outputs is not None:
                self._responses.setdefault(request, []).append(outputs)
            if final:
                self._ended.add(request)
                self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Until so many requests have had their final response."""
        with self._changed:
            ended = self._changed.wait_for(lambda: len(self._ended) >= count, PATIENCE_S)
        assert ended, f"{count - len(self._ended)} requests got no final response"
        assert not self.too_late, "a response came after the final one"

    def responses_to(self, request: InferenceRequest) -> list[Sequence[Tensor]]:
        return self._responses.get(request, [])
