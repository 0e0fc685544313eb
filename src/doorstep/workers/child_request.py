"""A request as a worker process sees it. Knows no socket and no model."""

from __future__ import annotations

from typing import Any

from doorstep.request import InferenceRequest

CANCELLED = 1  # what a request's flag says: nobody wants its responses any more
ASKED_TO_STOP = 2  # whoever waits for them still takes what comes
SEQUENCE_START = 1
SEQUENCE_END = 2


class WorkerRequest(InferenceRequest):
    """Whether it is cancelled, the server says in shared memory, or in a frame where there are too many requests."""

    __slots__ = ("_flags", "_slot", "cancelled_by_message", "ended", "number", "unread_bytes")

    _flags: Any
    _slot: int  # -1: it has no flag
    number: int  # what frames call it
    ended: bool  # its final response is on its way
    unread_bytes: int  # of its responses, that have not gone on from the server
    cancelled_by_message: bool

    @property
    def cancelled(self) -> bool:
        return self.cancelled_by_message or (self._slot >= 0 and self._flags[self._slot] != 0)

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        """Only the server cancels."""

    @property
    def unwanted(self) -> bool:
        """Whether responses are thrown away: not if it was only asked to stop."""
        return self.cancelled_by_message or (self._slot >= 0 and self._flags[self._slot] == CANCELLED)

    def over(self) -> None:
        """The flag belongs to another request from now on."""
        self.cancelled_by_message = self.cancelled
        self._slot = -1
