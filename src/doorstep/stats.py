"""Counts and nanoseconds per model version. The one source for the V2 statistics and for /metrics. Knows neither."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from doorstep.errors import FailureReason

# Seconds; the same for every duration so that quantiles of phases can be compared.
DURATION_BUCKETS_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Cumulative-free bucket counts over fixed, ascending upper bounds; the last bucket has none."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total: float = 0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


_DURATION_BUCKETS_NS = tuple(int(s * 1e9) for s in DURATION_BUCKETS_S)


class BatchStatistics:
    """What batches of one size cost: their number and the nanoseconds of each phase."""

    __slots__ = ("compute_infer_ns", "compute_input_ns", "compute_output_ns", "count")

    def __init__(self) -> None:
        self.count = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0


class ComputeTally:
    """What the steps of one request came to: an ensemble computes nothing by itself."""

    __slots__ = ("infer_ns", "input_ns", "output_ns")

    def __init__(self) -> None:
        self.input_ns = self.infer_ns = self.output_ns = 0

    def add(self, input_ns: int, infer_ns: int, output_ns: int) -> None:
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns

    def count(self, batch: Any) -> None:
        """A request.Batch that one of the steps ran in."""
        start_ns, end_ns = batch.compute_start_ns, batch.compute_end_ns
        infer_start_ns = batch.input_end_ns or start_ns
        infer_end_ns = batch.output_start_ns or end_ns
        self.input_ns += infer_start_ns - start_ns
        self.infer_ns += infer_end_ns - infer_start_ns
        self.output_ns += end_ns - infer_end_ns


class ResponseStatistics:
    """What the n-th responses of a model's requests came to. Times as in Triton's response_stats
    (extension_statistics.md): `compute_infer` is from the start of the execution, or the response before, to the
    response; `compute_output` what sending it took."""

    __slots__ = (
        "cancel_count",
        "cancel_ns",
        "compute_infer_count",
        "compute_infer_ns",
        "compute_output_count",
        "compute_output_ns",
        "empty_count",
        "empty_ns",
        "fail_count",
        "fail_ns",
        "success_count",
        "success_ns",
    )

    def __init__(self) -> None:
        self.compute_infer_count = self.compute_infer_ns = 0
        self.compute_output_count = self.compute_output_ns = 0
        self.success_count = self.success_ns = 0
        self.fail_count = self.fail_ns = 0
        self.empty_count = self.empty_ns = 0
        self.cancel_count = self.cancel_ns = 0


class ModelStatistics:
    """Numbers of one model version. Written only from the event loop, read from anywhere.

    Durations follow Triton's meaning: `queue` and `compute_*` count each successful request, with the batch's time
    counted for every request that ran in it; `inference_count` counts rows, `execution_count` batches.
    """

    __slots__ = (
        "batches",
        "cache_hit_count",
        "cache_hit_ns",
        "cache_miss_count",
        "cache_miss_ns",
        "compute_count",
        "compute_infer_ns",
        "compute_input_ns",
        "compute_output_ns",
        "execution_count",
        "fail_count",
        "fail_ns",
        "failures",
        "inference_count",
        "last_inference_ms",
        "latencies",
        "load_seconds",
        "queue_ns",
        "responses",
        "success_count",
        "success_ns",
        "time_batch_size",
        "time_compute_ns",
        "time_queue_ns",
        "time_request_ns",
        "worker_restarts",
    )

    def __init__(self) -> None:
        self.success_count = 0
        self.success_ns = 0
        self.fail_count = 0
        self.fail_ns = 0
        self.failures = dict.fromkeys(FailureReason, 0)
        self.queue_ns = 0
        self.compute_count = 0
        self.compute_input_ns = 0
        self.compute_infer_ns = 0
        self.compute_output_ns = 0
        self.cache_hit_count = 0
        self.cache_hit_ns = 0
        self.cache_miss_count = 0
        self.cache_miss_ns = 0
        self.inference_count = 0
        self.execution_count = 0
        self.last_inference_ms = 0  # since the epoch; 0: never
        self.batches: dict[int, BatchStatistics] = {}
        self.responses: dict[int, ResponseStatistics] = {}  # by the response's number; decoupled models only
        self.load_seconds = 0.0
        self.latencies: Any = None  # a latencies.Latencies, where more than counters are wanted
        self.worker_restarts = 0
        self.time_request_ns = Histogram(_DURATION_BUCKETS_NS)
        self.time_queue_ns = Histogram(_DURATION_BUCKETS_NS)
        self.time_compute_ns = Histogram(_DURATION_BUCKETS_NS)
        self.time_batch_size = Histogram(BATCH_SIZE_BUCKETS)

    def record_batch(self, rows: int, input_ns: int, infer_ns: int, output_ns: int, padding: int = 0) -> None:
        """One execution of `rows` rows, `padding` of them nobody's: these are part of the batch, but no inferences.
        Called once per batch, before its requests are recorded."""
        self.execution_count += 1
        self.inference_count += rows - padding
        self.last_inference_ms = time.time_ns() // 1_000_000
        batch = self.batches.get(rows)
        if batch is None:
            batch = self.batches[rows] = BatchStatistics()
        batch.count += 1
        batch.compute_input_ns += input_ns
        batch.compute_infer_ns += infer_ns
        batch.compute_output_ns += output_ns
        self.time_compute_ns.observe(input_ns + infer_ns + output_ns)
        self.time_batch_size.observe(rows)

    def record_successes(self, waits: Sequence[tuple[int, int]], input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Requests answered by one execution; for each (nanoseconds in all, nanoseconds queued)."""
        count = len(waits)
        self.success_count += count
        self.compute_count += count
        self.compute_input_ns += count * input_ns
        self.compute_infer_ns += count * infer_ns
        self.compute_output_ns += count * output_ns
        total_ns = queued_ns = 0
        bounds = _DURATION_BUCKETS_NS
        totals, queues = self.time_request_ns, self.time_queue_ns
        total_counts, queue_counts = totals.counts, queues.counts
        for total, queued in waits:
            total_ns += total
            queued_ns += queued
            total_counts[bisect_left(bounds, total)] += 1
            queue_counts[bisect_left(bounds, queued)] += 1
        self.success_ns += total_ns
        self.queue_ns += queued_ns
        totals.total += total_ns
        queues.total += queued_ns
        if self.latencies is not None:
            self.latencies.record_successes(waits, input_ns, infer_ns, output_ns)

    def response(self, index: int) -> ResponseStatistics:
        """The numbers of all `index`-th responses."""
        found = self.responses.get(index)
        if found is None:
            found = self.responses[index] = ResponseStatistics()
        return found

    def record_cache_hit(self, total_ns: int, queued_ns: int, lookup_ns: int) -> None:
        """A request answered from the response cache: a success, but nothing was executed."""
        self.success_count += 1
        self.success_ns += total_ns
        self.queue_ns += queued_ns
        self.cache_hit_count += 1
        self.cache_hit_ns += lookup_ns
        self.time_request_ns.observe(total_ns)
        self.time_queue_ns.observe(queued_ns)
        if self.latencies is not None:
            self.latencies.record_hit(queued_ns, lookup_ns)

    def record_cache_miss(self, lookup_and_insert_ns: int) -> None:
        """Besides what its execution is recorded as, which did not have these nanoseconds."""
        self.success_ns += lookup_and_insert_ns
        self.cache_miss_count += 1
        self.cache_miss_ns += lookup_and_insert_ns
        if self.latencies is not None:
            self.latencies.record_miss(lookup_and_insert_ns)

    def record_failure(self, total_ns: int, reason: FailureReason) -> None:
        self.fail_count += 1
        self.fail_ns += total_ns
        self.failures[reason] += 1
