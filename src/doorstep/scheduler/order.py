"""Answers in the order in which their requests began to run (preserve_ordering). Knows no worker and no batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from doorstep.request import InferenceRequest, InferenceResponse


class AnswersInOrder:
    """Holds responses back until all requests before theirs have had their last. Touched only from the event loop."""

    def __init__(self) -> None:
        self._places: deque[_Place] = deque()

    def begin(self, requests: Iterable[InferenceRequest]) -> None:
        self._places.extend(map(_Place, requests))

    def add(self, request: InferenceRequest, response: InferenceResponse, final: bool) -> None:
        """Notes a response at its request's place, and sends what has become due."""
        place = self._place(request)
        place.responses.append(response)
        place.is_complete = final
        self.advance()

    def forget(self, request: InferenceRequest) -> None:
        """It will begin again, at another place."""
        self._places.remove(self._place(request))
        self.advance()

    def advance(self) -> None:
        """Sends what is due. A cancelled request was answered when it was cancelled: it holds nobody up."""
        places = self._places
        while places:
            place = places[0]
            request = place.request
            over = place.is_complete or request.cancelled
            if over:
                places.popleft()
            if place.is_complete or not request.cancelled:
                due, place.responses = place.responses, []
                for response in due:
                    request.sender.send(response, place.is_complete and response is due[-1])
            if not over:
                return

    def _place(self, request: InferenceRequest) -> _Place:
        return next(place for place in self._places if place.request is request)


class _Place:
    __slots__ = ("is_complete", "request", "responses")

    def __init__(self, request: InferenceRequest) -> None:
        self.request = request
        self.responses: list[InferenceResponse] = []  # not sent yet
        self.is_complete = False  # the last of them is the final one
