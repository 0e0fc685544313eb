"""How long a worker process stays awake for its next batch. Knows no socket.

One client that waits for each answer before it asks again pays, with every request, for two sleepers being woken, and
on a machine with nothing else to do that is more than everything else a small model costs. So while batches of one
request follow each other closely, the process looks for the next one for a moment before it sleeps. Where batches hold
several requests the server has work anyway, and after it stayed awake in vain it sleeps for a while.
"""

from __future__ import annotations

from time import monotonic_ns

AWAKE_US = 200  # the longest it stays awake (backend config awake-microseconds; 0: never)
_CLOSE = 2  # batches that come within so many times that are close: being woken is part of what is measured
_PATIENCE = 64  # batches it then sleeps between, after it stayed awake in vain


class Pace:
    __slots__ = ("_asleep", "_ended_ns", "_limit_ns", "awake_ns")

    def __init__(self, awake_us: float = 0) -> None:
        self._limit_ns = int(awake_us * 1000)
        self._ended_ns = 0
        self._asleep = 0  # batches before staying awake is tried again
        self.awake_ns = 0  # for the next batch

    def begin(self, count: int) -> None:
        """A batch of so many requests has come."""
        if not self._limit_ns:
            return
        waited_ns = monotonic_ns() - self._ended_ns
        if self._asleep:
            self._asleep -= 1
        elif self.awake_ns and waited_ns > self.awake_ns:
            self._asleep = _PATIENCE
        close = count == 1 and waited_ns < self._limit_ns * _CLOSE
        self.awake_ns = self._limit_ns if close and not self._asleep else 0

    def end(self) -> None:
        """Its results have been sent."""
        if self._limit_ns:
            self._ended_ns = monotonic_ns()
