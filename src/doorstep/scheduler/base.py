"""What every scheduler offers. Knows no protocol and no library."""

from __future__ import annotations

from typing import Protocol

from doorstep.request import InferenceRequest


class Scheduler(Protocol):
    """Touched only from the event loop."""

    @property
    def inflight_count(self) -> int:
        """Requests taken and not yet answered, queued ones included."""

    @property
    def queued_count(self) -> int:
        """Requests taken and not yet started."""

    def enqueue(self, request: InferenceRequest) -> None:
        """Takes the request. On return it belongs to the scheduler, which answers it through its sender; if this
        raises (QueueRejected), it is still yours."""

    def stop(self) -> None:
        """Refuses new requests; those taken are still answered."""

    def close(self) -> None:
        """Lets go of timers. On the loop, after the last answer."""
