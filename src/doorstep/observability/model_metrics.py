"""What the numbers of the models are called in /metrics: Triton's `nv_*` names, and our own. Knows no HTTP.

Triton's counters keep Triton's names, without the `_total` that OpenMetrics wants, so that dashboards made for Triton
work: in the text format they are counters, in OpenMetrics they are of unknown type (metrics.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from doorstep.backends.llm.settings import adapter_names
from doorstep.config.metrics_options import FIRST_RESPONSE
from doorstep.config.model import ModelConfig
from doorstep.errors import FailureReason
from doorstep.latencies import Latencies, Quantiles
from doorstep.observability.histograms import add_histogram
from doorstep.observability.llm_metrics import LLMReading
from doorstep.repository.base import IndexEntry, ModelState
from doorstep.scheduler.base import Scheduler
from doorstep.scheduler.slots import SlotScheduler
from doorstep.stats import BATCH_SIZE_BUCKETS, DURATION_BUCKETS_S, Histogram, ModelStatistics


class MeasuredModel(Protocol):
    """A loaded model version, as far as metrics look at it."""

    name: str
    version: str
    config: ModelConfig
    scheduler: Scheduler
    stats: ModelStatistics

    @property
    def inflight_count(self) -> int: ...

    @property
    def saturation(self) -> float: ...


class ModelReading:
    """A model, and what may be asked of it only on the event loop."""

    __slots__ = ("cached", "inflight", "labels", "llm", "queued", "saturation", "stats")

    def __init__(self, model: MeasuredModel) -> None:
        self.labels = {"model": model.name, "version": model.version}
        if namespace := getattr(model, "namespace", ""):
            self.labels["namespace"] = namespace
        for key, value in sorted(model.config.proto.metric_tags.items()):
            self.labels[f"_{_NOT_IN_A_LABEL.sub('_', key)}"] = value  # as Triton does
        self.stats: ModelStatistics = model.stats
        self.queued: int = model.scheduler.queued_count
        self.inflight: int = model.inflight_count
        self.cached: bool = getattr(model.scheduler, "cache", None) is not None
        self.saturation: float = model.saturation
        self.llm: LLMReading | None = None  # of language models
        if isinstance(model.scheduler, SlotScheduler):
            adapters = adapter_names(model.config.parameters)
            self.llm = LLMReading(model.scheduler, self.labels, len(adapters))


_NOT_IN_A_LABEL = re.compile(r"[^a-zA-Z0-9_]")
_Read = Callable[[ModelReading], float]


def _us(nanoseconds: int) -> int:
    return nanoseconds // 1000


# name, what it says, how to read it; Triton's meaning (docs/user_guide/metrics.md)
TRITON_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("nv_inference_request_success", "Requests answered", lambda m: m.stats.success_count),
    ("nv_inference_count", "Inferences: a batch of n counts n; cached answers do not count",
     lambda m: m.stats.inference_count),
    ("nv_inference_exec_count", "Executions: a batch counts once", lambda m: m.stats.execution_count),
    ("nv_inference_request_duration_us", "Microseconds in answered requests, end to end",
     lambda m: _us(m.stats.success_ns)),
    ("nv_inference_queue_duration_us", "Microseconds that answered requests waited", lambda m: _us(m.stats.queue_ns)),
    ("nv_inference_compute_input_duration_us", "Microseconds in gathering inputs",
     lambda m: _us(m.stats.compute_input_ns)),
    ("nv_inference_compute_infer_duration_us", "Microseconds in running the model",
     lambda m: _us(m.stats.compute_infer_ns)),
    ("nv_inference_compute_output_duration_us", "Microseconds in scattering outputs",
     lambda m: _us(m.stats.compute_output_ns)),
)  # fmt: skip
TRITON_FAILURES = ("nv_inference_request_failure", "Requests that failed, by reason")
TRITON_CACHE_COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    ("nv_cache_num_hits_per_model", "Requests answered from the cache", lambda m: m.stats.cache_hit_count),
    ("nv_cache_num_misses_per_model", "Requests not found in the cache", lambda m: m.stats.cache_miss_count),
    ("nv_cache_hit_duration_per_model", "Microseconds in cache hits", lambda m: _us(m.stats.cache_hit_ns)),
    ("nv_cache_miss_duration_per_model", "Microseconds in cache misses", lambda m: _us(m.stats.cache_miss_ns)),
)  # fmt: skip
TRITON_SUMMARIES: tuple[tuple[str, str, Callable[[Latencies], Quantiles]], ...] = (
    ("nv_inference_request_summary_us", "Answered requests, end to end, in microseconds", lambda m: m.request),
    ("nv_inference_queue_summary_us", "What answered requests waited, in microseconds", lambda m: m.queue),
    ("nv_inference_compute_input_summary_us", "Gathering inputs, in microseconds", lambda m: m.compute_input),
    ("nv_inference_compute_infer_summary_us", "Running the model, in microseconds", lambda m: m.compute_infer),
    ("nv_inference_compute_output_summary_us", "Scattering outputs, in microseconds", lambda m: m.compute_output),
    ("nv_cache_hit_summary_per_model", "Cache hits, in microseconds", lambda m: m.cache_hit),
    ("nv_cache_miss_summary_per_model", "Cache misses, in microseconds", lambda m: m.cache_miss),
)
GAUGES: tuple[tuple[str, str, _Read], ...] = (
    ("nv_inference_pending_request_count", "Requests that wait for execution", lambda m: m.queued),
    ("nv_model_load_duration_secs", "Seconds that loading the model took", lambda m: m.stats.load_seconds),
    ("doorstep_model_load_seconds", "Seconds that loading the model took", lambda m: m.stats.load_seconds),
    ("doorstep_queue_depth", "Requests that wait for execution", lambda m: m.queued),
    ("doorstep_inflight_requests", "Requests taken and not answered yet, waiting ones included", lambda m: m.inflight),
    ("doorstep_saturation_ratio",
     "0: idle, 1: no room. The busy share of the instances; with a bounded queue, the mean of that and of its fill",
     lambda m: m.saturation),
)  # fmt: skip
HISTOGRAMS: tuple[tuple[str, str, Callable[[ModelStatistics], Histogram], tuple[float, ...], float], ...] = (
    ("doorstep_request_duration_seconds", "Answered requests, end to end", lambda s: s.time_request_ns,
     DURATION_BUCKETS_S, 1e9),
    ("doorstep_queue_duration_seconds", "What answered requests waited", lambda s: s.time_queue_ns,
     DURATION_BUCKETS_S, 1e9),
    ("doorstep_compute_duration_seconds", "Executions, from gathering inputs to scattering outputs",
     lambda s: s.time_compute_ns, DURATION_BUCKETS_S, 1e9),
    ("doorstep_batch_size", "Rows per execution", lambda s: s.time_batch_size, BATCH_SIZE_BUCKETS, 1),
)  # fmt: skip
STATES = (ModelState.LOADING, ModelState.READY, ModelState.UNLOADING, ModelState.UNAVAILABLE)


def model_families(readings: Sequence[ModelReading], *, counter_latencies: bool = True) -> Iterable[Metric]:
    """Every family about loaded models. May run beside the event loop: statistics are read from anywhere."""
    for name, text, read in TRITON_COUNTERS:
        if not counter_latencies and "_duration_us" in name:
            continue
        yield _family(Metric(name, text, "unknown"), readings, read)
    failures = Metric(*TRITON_FAILURES, "unknown")
    for model in readings:
        for reason in FailureReason:
            failures.add_sample(failures.name, model.labels | {"reason": reason.value}, model.stats.failures[reason])
    yield failures
    cached = [model for model in readings if model.cached]
    if cached:
        for name, text, read in TRITON_CACHE_COUNTERS:
            yield _family(Metric(name, text, "unknown"), cached, read)
    for name, text, read in GAUGES:
        yield _family(GaugeMetricFamily(name, text), readings, read)
    restarts = CounterMetricFamily("doorstep_worker_restarts", "Worker processes started again after they died")
    for model in readings:
        restarts.add_sample("doorstep_worker_restarts_total", model.labels, model.stats.worker_restarts)
    yield restarts
    for name, text, choose, bounds, scale in HISTOGRAMS:
        histogram = HistogramMetricFamily(name, text)
        for model in readings:
            add_histogram(histogram, model.labels, choose(model.stats), bounds, scale)
        yield histogram
    yield from _detailed_families(readings)


def _detailed_families(readings: Sequence[ModelReading]) -> Iterable[Metric]:
    """What --metrics-config adds."""
    detailed = [(model.labels, model.stats, model.cached) for model in readings if model.stats.latencies is not None]
    for name, text, choose in TRITON_SUMMARIES:
        family = SummaryMetricFamily(name, text)
        for labels, stats, cached in detailed:
            latencies: Latencies = stats.latencies
            # As in Triton, a model with a cache has no summary of requests: it would mix hits and executions.
            wanted = cached if "cache" in name else not (cached and "request" in name)
            if latencies.quantiles and wanted:
                _add_summary(family, labels, choose(latencies), latencies.quantiles)
        if family.samples:
            yield family
    histogram = HistogramMetricFamily(FIRST_RESPONSE, "Milliseconds from a request to its first response")
    for labels, stats, _ in detailed:
        found = stats.latencies.first_response_ms
        if found is not None:
            add_histogram(histogram, labels, found, found.bounds, 1)
    if histogram.samples:
        yield histogram


def state_family(index: Iterable[IndexEntry]) -> Metric:
    """1 for the state that a model version is in, 0 for the others. Version "" is a model that could not be told."""
    family = GaugeMetricFamily("doorstep_model_state", "1 for the state that the model version is in")
    for entry in index:
        if entry.state:
            for state in STATES:
                labels = {"model": entry.name, "version": entry.version, "state": state.value}
                if entry.namespace:
                    labels["namespace"] = entry.namespace
                family.add_sample(family.name, labels, float(entry.state == state.value))
    return family


def _family(family: Metric, readings: Sequence[ModelReading], read: _Read) -> Metric:
    for model in readings:
        family.add_sample(family.name, model.labels, read(model))
    return family


def _add_summary(family: Metric, labels: dict[str, str], found: Quantiles, quantiles: Sequence[float]) -> None:
    for quantile, value in zip(quantiles, found.at(quantiles), strict=True):
        family.add_sample(family.name, labels | {"quantile": repr(quantile)}, value)
    family.add_sample(f"{family.name}_count", labels, found.count)
    family.add_sample(f"{family.name}_sum", labels, found.total)
