"""The one response of a model that owes exactly one, however it says so. Pure.

Most models give it as the final one. One that answers through a response sender may give it first and say afterwards
that no more comes; none, or two, is its mistake (server, InferResponseComplete).
"""

from __future__ import annotations

from doorstep.errors import Internal
from doorstep.request import InferenceResponse


class Early:
    """What came before the final response. Touched only from the event loop."""

    __slots__ = ("count", "response")

    def __init__(self) -> None:
        self.count = 0
        self.response: InferenceResponse | None = None


def gather(early: Early, response: InferenceResponse, final: bool) -> InferenceResponse | None:
    """Takes the next response; returns the one to send when the final one has come, None before."""
    if not response.flag_only:
        early.count += 1
        if early.response is None or response.error is not None:
            early.response = response
    if not final:
        return None
    found = early.response
    if early.count == 1 and found is not None:
        return found
    if response.error is None:
        response.error = Internal(f"expected a single response, got {early.count}")
        response.outputs = ()
    return response
