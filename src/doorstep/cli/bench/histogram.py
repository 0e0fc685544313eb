"""Latencies counted in buckets that are 0.1 % wide, so that percentiles of hours and of many processes add up exactly.

Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import numpy as np

from doorstep.types import Array

_RATIO = 1.001  # of one bucket's bound to the one before
_LOWEST_NS = 1_000.0  # a microsecond; whatever is faster counts as that
_BUCKETS = int(log(1e12 / _LOWEST_NS) / log(_RATIO)) + 2  # up to a quarter of an hour


class LatencyHistogram:
    def __init__(self) -> None:
        self.counts = np.zeros(_BUCKETS, np.int64)
        self.count = 0
        self.total_ns = 0
        self.max_ns = 0
        self.min_ns = 0

    def add(self, latencies_ns: Array) -> None:
        if not latencies_ns.size:
            return
        index = np.log(np.maximum(latencies_ns, _LOWEST_NS) / _LOWEST_NS) / log(_RATIO)
        self.counts += np.bincount(np.minimum(index.astype(np.int64), _BUCKETS - 1), minlength=_BUCKETS)
        low, high = int(latencies_ns.min()), int(latencies_ns.max())
        self.min_ns = min(self.min_ns, low) if self.count else low
        self.max_ns = max(self.max_ns, high)
        self.count += latencies_ns.size
        self.total_ns += int(latencies_ns.sum())

    def merge(self, other: LatencyHistogram) -> None:
        if other.count:
            self.min_ns = min(self.min_ns, other.min_ns) if self.count else other.min_ns
        self.counts += other.counts
        self.max_ns = max(self.max_ns, other.max_ns)
        self.count += other.count
        self.total_ns += other.total_ns

    @property
    def mean_ns(self) -> float:
        return self.total_ns / self.count if self.count else 0.0

    def percentiles_ns(self, wanted: Sequence[float]) -> list[float]:
        """The latency that `wanted` per cent of requests did not exceed, to within 0.1 %; 0 where there are none."""
        if not self.count:
            return [0.0] * len(wanted)
        cumulative = np.cumsum(self.counts)
        ranks = np.ceil(np.asarray(wanted, np.float64) / 100 * self.count).clip(1, self.count)
        middle = _LOWEST_NS * _RATIO ** (np.searchsorted(cumulative, ranks) + 0.5)
        return [float(value) for value in np.clip(middle, self.min_ns, self.max_ns)]

    def curve(self) -> tuple[Array, Array]:
        """(latency in ns, share of requests that took no longer), where there are any; for plots."""
        used = np.flatnonzero(self.counts)
        if not used.size:
            return np.zeros(0), np.zeros(0)
        share = np.cumsum(self.counts)[used] / self.count
        return np.minimum(_LOWEST_NS * _RATIO ** (used + 0.5), self.max_ns), share
