"""Metrics of models' own (`pb_utils.MetricFamily`): counters, gauges and histograms that appear at /metrics.

The numbers live here, so that they outlive a worker process; models hold ids. What one loaded model made goes with it,
but a family or metric that two have made is one, and stays until both are gone. Rules and texts are Triton's (core,
metric_family.cc, and the registry of prometheus-cpp below it).
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily, Metric

from doorstep.errors import InvalidArgument, NotFound, Unsupported
from doorstep.observability.histograms import bound_text
from doorstep.services import Handler, OwnHandlers

MOST_METRICS = 10_000  # on one server
MOST_IDS = 100_000  # of one model: a worker that died has forgotten its own
_NAME = re.compile(r"(?!__)[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
# What the server says of itself, or may come to say.
_TAKEN = re.compile(r"doorstep_|process_|nv_(inference|cache|model|cpu|gpu|energy|pinned)_")

Labels = tuple[tuple[str, str], ...]


class CustomMetric:
    """One line of /metrics, or one histogram. Written on the event loop, read from anywhere."""

    __slots__ = ("bounds", "counts", "holders", "value")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.value = 0.0  # of a histogram: the sum
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.holders = 0  # ids that stand for it


class Family:
    __slots__ = ("description", "kind", "metrics", "name")

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name = name
        self.description = description
        self.kind = kind
        self.metrics: dict[Labels, CustomMetric] = {}

    @property
    def line_names(self) -> frozenset[str]:
        """What the lines of /metrics begin with."""
        suffixes = ("", "_bucket", "_count", "_sum") if self.kind == "histogram" else ("",)
        return frozenset(self.name + suffix for suffix in suffixes)


class _Holder:
    """What an id stands for: a family, or one metric of it, as one object of a model's code sees it."""

    __slots__ = ("children", "family", "labels", "metric")

    def __init__(self, family: Family, metric: CustomMetric | None = None, labels: Labels = ()) -> None:
        self.family = family
        self.metric = metric
        self.labels = labels
        self.children: list[int] = []


class CustomMetrics:
    """Every model's. Touched only from the event loop, but for `families`."""

    def __init__(self) -> None:
        self._families: dict[str, Family] = {}
        self._count = 0

    def own(self, _: str) -> OwnHandlers:
        """The handlers for one loaded model, and what lets go of all that it made."""
        owner = _Owner(self)
        return OwnHandlers(owner.handlers(), owner.close)

    def family(self, name: str, description: str, kind: str) -> Family:
        if kind not in ("counter", "gauge", "histogram"):
            raise InvalidArgument("Unsupported kind passed to MetricFamily constructor.")
        if not _NAME.fullmatch(name):
            raise InvalidArgument("Invalid metric name")
        if _TAKEN.match(name):
            raise InvalidArgument("Family name already exists")
        found = self._families.get(name)
        if found is None:
            found = Family(name, description, kind)
            if any(found.line_names & other.line_names for other in self._families.values()):
                raise InvalidArgument("Family name already exists")
            self._families[name] = found
        elif found.kind != kind:
            raise InvalidArgument("Family name already exists with different type")
        return found

    def metric(self, family: Family, labels: Labels, bounds: Sequence[float]) -> CustomMetric:
        found = family.metrics.get(labels)
        if found is None:
            if self._count >= MOST_METRICS:
                raise InvalidArgument(f"there are {MOST_METRICS} custom metrics already, which is the most")
            found = CustomMetric(tuple(bounds))
            family.metrics = {**family.metrics, labels: found}
            self._count += 1
        found.holders += 1
        return found

    def let_go(self, holders: Sequence[_Holder]) -> None:
        touched = {}
        for holder in holders:
            if holder.metric is not None:
                holder.metric.holders -= 1
                if holder.metric.holders == 0:
                    touched[id(holder.family)] = holder.family
        for family in touched.values():  # once each: there may be thousands
            left = {labels: metric for labels, metric in family.metrics.items() if metric.holders}
            self._count -= len(family.metrics) - len(left)
            family.metrics = left
        for family in {id(holder.family): holder.family for holder in holders if holder.metric is None}.values():
            if not family.metrics and self._families.get(family.name) is family:
                del self._families[family.name]

    def families(self) -> Iterable[Metric]:
        """For a scrape; in any thread."""
        for family in list(self._families.values()):
            made: Metric
            if family.kind == "histogram":
                made = HistogramMetricFamily(family.name, family.description)
            elif family.kind == "gauge":
                made = GaugeMetricFamily(family.name, family.description)
            else:  # a counter keeps the name it was given, without OpenMetrics' _total
                made = Metric(family.name, family.description, "unknown")
            for labels, metric in family.metrics.items():
                _add_samples(made, family, dict(labels), metric)
            if made.samples:
                yield made


def _add_samples(made: Metric, family: Family, labels: dict[str, str], metric: CustomMetric) -> None:
    if family.kind != "histogram":
        made.add_sample(family.name, labels, metric.value)
        return
    cumulative = 0
    for bound, count in zip((*metric.bounds, float("inf")), list(metric.counts), strict=True):
        cumulative += count
        made.add_sample(f"{family.name}_bucket", labels | {"le": bound_text(bound)}, cumulative)
    made.add_sample(f"{family.name}_count", labels, cumulative)
    made.add_sample(f"{family.name}_sum", labels, metric.value)


class _Owner:
    """One loaded model's ids. Touched only from the event loop."""

    def __init__(self, metrics: CustomMetrics) -> None:
        self._metrics = metrics
        self._ids = itertools.count(1)
        self._held: dict[int, _Holder] = {}

    def handlers(self) -> dict[str, Handler]:
        table: dict[str, Callable[[Any], Any]] = {
            "metric_family": self.make_family,
            "metric": self.make_metric,
            "metric_update": self.update,
            "metric_value": self.value,
            "metric_forget": self.forget,
        }
        return {name: _handler(method) for name, method in table.items()}

    def close(self) -> None:
        """The model has been unloaded, or its load has failed."""
        self._metrics.let_go(list(self._held.values()))
        self._held.clear()

    def make_family(self, payload: Any) -> dict[str, int]:
        return self._hold(_Holder(self._metrics.family(payload["name"], payload["description"], payload["kind"])))

    def make_metric(self, payload: Any) -> dict[str, int]:
        parent = self._held.get(payload["family"])
        if parent is None:
            raise NotFound("Invalid metric operation as the corresponding 'MetricFamily' has been deleted.")
        family, buckets = parent.family, payload.get("buckets")
        bounds = tuple(math.nan if bound is None else float(bound) for bound in buckets or ())  # JSON has no NaN
        labels = tuple(sorted(payload.get("labels", {}).items()))
        for name, value in labels:
            if not isinstance(value, str):
                raise InvalidArgument(
                    f"Parameter [{name}] must have a type of TRITONSERVER_PARAMETER_STRING to be added as a label."
                )
            if not _LABEL.fullmatch(name) or (name == "le" and family.kind == "histogram"):
                raise InvalidArgument("Invalid label name")
        if family.kind != "histogram" and bounds:
            raise InvalidArgument(f"Unexpected args found in {family.kind} Metric constructor.")
        if family.kind == "histogram" and buckets is None:
            raise InvalidArgument("Bucket boundaries not found in Metric args.")
        if any(map(math.isnan, bounds)) or any(not low < high for low, high in itertools.pairwise(bounds)):
            raise InvalidArgument("Bucket Boundaries must be strictly sorted")
        self._room()
        made = self._hold(_Holder(family, self._metrics.metric(family, labels, bounds), labels))
        parent.children.append(made["id"])
        return made

    def update(self, payload: Any) -> None:
        holder = self._metric(payload["id"], "set" if payload["op"] == "observe" else payload["op"])
        operation, value, kind = payload["op"], float(payload["value"]), holder.family.kind
        metric = holder.metric
        assert metric is not None
        match operation, kind:
            case ("increment", "counter") if value < 0:
                raise InvalidArgument(
                    "TRITONSERVER_METRIC_KIND_COUNTER can only be incremented monotonically by non-negative values."
                )
            case ("increment", "counter" | "gauge"):
                metric.value += value
            case ("set", "gauge"):
                metric.value = value
            case ("observe", "histogram"):
                metric.counts[bisect_left(metric.bounds, value)] += 1
                metric.value += value
            case _:
                raise Unsupported(
                    f"TRITONSERVER_METRIC_KIND_{kind.upper()} does not support {str(operation).capitalize()}"
                )

    def value(self, payload: Any) -> dict[str, float]:
        holder = self._metric(payload["id"], "get")
        if holder.family.kind == "histogram":
            raise Unsupported("TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Value")
        assert holder.metric is not None
        return {"value": holder.metric.value}

    def forget(self, payload: Any) -> None:
        """A family takes with it the metrics that were made through it. Forgetting twice is harmless."""
        holder = self._held.pop(payload["id"], None)
        if holder is None:
            return
        children = [self._held.pop(child, None) for child in holder.children]
        self._metrics.let_go([*(child for child in children if child is not None), holder])

    def _hold(self, holder: _Holder) -> dict[str, int]:
        self._room()
        id = next(self._ids)
        self._held[id] = holder
        return {"id": id}

    def _room(self) -> None:
        if len(self._held) >= MOST_IDS:
            raise InvalidArgument(f"the model holds {MOST_IDS} custom metrics already, which is the most")

    def _metric(self, id: Any, operation: str) -> _Holder:
        holder = self._held.get(id)
        if holder is None or holder.metric is None:
            raise NotFound(f"Could not {operation} metric value. Metric has been invalidated.")
        return holder


def _handler(method: Callable[[Any], Any]) -> Handler:
    def call(_: str, payload: Any, __: bytes) -> Awaitable[Any]:
        return _done(method, payload)

    return call


async def _done(method: Callable[[Any], Any], payload: Any) -> Any:
    return method(payload)
