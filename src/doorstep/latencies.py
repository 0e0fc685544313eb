"""Latencies in more detail than counters have: quantiles of the last minute, time to the first response.

Only where --metrics-config asks for it; `ModelStatistics.latencies` is None otherwise. Triton's summaries and histogram
(core, metric_model_reporter.cc). Knows no model and no metric's name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from doorstep.stats import Histogram

_SLICES = 5  # of the window; the oldest goes when a new one begins
_SLICE_NS = 12_000_000_000
_MANTISSA_BITS = 9  # numbers that agree in as many bits count as one: within 0.2 % of each other


class Quantiles:
    """How numbers of the last 48 to 60 seconds are distributed, and how many there ever were.

    Written on the event loop, read from anywhere. Memory is bounded by the numbers' range, not by how many come."""

    __slots__ = ("_clock", "_current", "_ends_ns", "_slices", "count", "total")

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.count = 0
        self.total = 0
        self._clock = clock
        self._current: dict[int, int] = {}  # the least number of those that count as one → how many
        self._slices = [self._current]
        self._ends_ns = clock() + _SLICE_NS

    def observe(self, value: int) -> None:
        self.count += 1
        self.total += value
        if self._clock() >= self._ends_ns:
            self._turn()
        shift = value.bit_length() - 1 - _MANTISSA_BITS
        if shift > 0:
            value = value >> shift << shift
        current = self._current
        current[value] = current.get(value, 0) + 1

    def _turn(self) -> None:
        now = self._clock()
        passed = (now - self._ends_ns) // _SLICE_NS + 1
        fresh: list[dict[int, int]] = [{} for _ in range(min(passed, _SLICES))]
        self._slices = (self._slices + fresh)[-_SLICES:]
        self._current = self._slices[-1]
        self._ends_ns += passed * _SLICE_NS

    def at(self, quantiles: Sequence[float]) -> list[float]:
        """The values at these quantiles; nan where there was nothing in the window."""
        missed = max(self._clock() - self._ends_ns, -1) // _SLICE_NS + 1  # slices that would have begun since
        together: dict[int, int] = {}
        for piece in self._slices[-(_SLICES - missed) :] if missed < _SLICES else ():
            for value, count in list(piece.items()):
                together[value] = together.get(value, 0) + count
        ordered = sorted(together.items())
        size = sum(together.values())
        return [_at(ordered, size, quantile) for quantile in quantiles]


def _at(ordered: Sequence[tuple[int, int]], size: int, quantile: float) -> float:
    if not size:
        return float("nan")
    rank, seen = quantile * size, 0
    for value, count in ordered:
        seen += count
        if seen >= rank:
            return float(value)
    return float(ordered[-1][0])


class Latencies:
    """One model version's, in microseconds. Written only from the event loop."""

    __slots__ = (
        "cache_hit",
        "cache_miss",
        "compute_infer",
        "compute_input",
        "compute_output",
        "first_response_ms",
        "quantiles",
        "queue",
        "request",
    )

    def __init__(self, quantiles: Sequence[float], first_response_ms: Sequence[float]) -> None:
        """`quantiles`: those of the summaries; `first_response_ms`: the histogram's bounds. Empty: it is not wanted."""
        self.quantiles = tuple(quantiles)
        self.first_response_ms = Histogram(tuple(first_response_ms)) if first_response_ms else None
        self.request, self.queue = Quantiles(), Quantiles()
        self.compute_input, self.compute_infer, self.compute_output = Quantiles(), Quantiles(), Quantiles()
        self.cache_hit, self.cache_miss = Quantiles(), Quantiles()

    def record_successes(self, waits: Sequence[tuple[int, int]], input_ns: int, infer_ns: int, output_ns: int) -> None:
        """As ModelStatistics.record_successes, which calls this."""
        if not self.quantiles:
            return
        input_us, infer_us, output_us = input_ns // 1000, infer_ns // 1000, output_ns // 1000
        for total, queued in waits:
            self.request.observe(total // 1000)
            self.queue.observe(max(queued, 0) // 1000)
            self.compute_input.observe(input_us)
            self.compute_infer.observe(infer_us)
            self.compute_output.observe(output_us)

    def record_hit(self, queued_ns: int, cache_ns: int) -> None:
        """A request that was answered from the cache."""
        if self.quantiles:
            self.queue.observe(max(queued_ns, 0) // 1000)
            self.cache_hit.observe(cache_ns // 1000)

    def record_miss(self, cache_ns: int) -> None:
        if self.quantiles:
            self.cache_miss.observe(cache_ns // 1000)

    def first_response(self, total_ns: int) -> None:
        """The first response of a decoupled model's request."""
        if self.first_response_ms is not None:
            self.first_response_ms.observe(total_ns / 1e6)
