"""When requests are due in an open loop. Knows neither clock nor connection."""

from __future__ import annotations

import random
from collections import deque
from typing import Literal


class Arrivals:
    """Times from `start_ns` to `end_ns`, `rate` a second on average, each handed out once."""

    def __init__(
        self, rate: float, kind: Literal["poisson", "constant"], start_ns: int, end_ns: int, *, seed: int
    ) -> None:
        self._draw = random.Random(seed)  # noqa: S311  arrivals, not secrets
        self._gap_ns = 1e9 / rate
        self._poisson = kind == "poisson"
        self._end_ns = end_ns
        # Several load processes share a rate: a random first step keeps them from marching in time.
        self._next = start_ns + (self._draw.expovariate(1) if self._poisson else self._draw.random()) * self._gap_ns

    @property
    def over(self) -> bool:
        return self._next >= self._end_ns

    @property
    def next_ns(self) -> int:
        """When the next request is due."""
        return int(self._next)

    def take(self, now_ns: int, due: deque[int]) -> None:
        """Adds to `due` every time that has come."""
        while self._next <= now_ns and self._next < self._end_ns:
            due.append(int(self._next))
            self._next += (self._draw.expovariate(1) if self._poisson else 1.0) * self._gap_ns
