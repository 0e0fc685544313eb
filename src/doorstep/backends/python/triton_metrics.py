"""`pb_utils.MetricFamily` and its metrics: counters, gauges and histograms of the model's own, at /metrics.

The numbers live in the server (observability/custom_metrics.py); this asks it for a family or a metric and tells it of
every change. Texts of errors are Triton's (core, metric_family.cc).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar

from doorstep.backends.python import triton_runtime
from doorstep.backends.python.triton_arguments import text_of
from doorstep.backends.python.triton_errors import TritonModelException
from doorstep.errors import DoorstepError


class MetricKind(IntEnum):
    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2


_KINDS = {MetricKind.COUNTER: "counter", MetricKind.GAUGE: "gauge", MetricKind.HISTOGRAM: "histogram"}
_GONE = (
    "Invalid metric operation as the corresponding 'MetricFamily' has been deleted. The 'MetricFamily' object should "
    "be deleted AFTER its corresponding 'Metric' objects have been deleted."
)


class Metric:
    """One metric of a family. Made by `MetricFamily.Metric`; with the object, the metric goes."""

    __slots__ = ("__weakref__", "_alive", "_id", "_kind")

    def __init__(self, id: int, kind: str) -> None:
        self._id = id
        self._kind = kind
        self._alive = True

    def increment(self, value: float) -> None:
        self._update("increment", value, "Failed to increment metric value")

    def set(self, value: float) -> None:
        self._update("set", value, "Failed to set metric value")

    def observe(self, value: float) -> None:
        self._update("observe", value, "Failed to observe metric value")

    def value(self) -> float:
        text = "Failed to get metric value"
        self._check(text)
        if self._kind == "histogram":
            raise TritonModelException(f"{text}: TRITONSERVER_METRIC_KIND_HISTOGRAM does not support Value")
        return float(_ask(text, "metric_value", {"id": self._id})["value"])

    def _update(self, op: str, value: float, text: str) -> None:
        self._check(text)
        value = float(value)
        kind = self._kind
        if op not in _ALLOWED[kind]:
            raise TritonModelException(
                f"{text}: TRITONSERVER_METRIC_KIND_{kind.upper()} does not support {op.capitalize()}"
            )
        if kind == "counter" and value < 0:
            raise TritonModelException(
                f"{text}: TRITONSERVER_METRIC_KIND_COUNTER can only be incremented "
                "monotonically by non-negative values."
            )
        triton_runtime.server().tell("metric_update", {"id": self._id, "op": op, "value": value})

    def _check(self, text: str) -> None:
        if not self._alive:
            raise TritonModelException(f"{text}: {_GONE}")

    def _forget(self) -> None:
        if self._alive:
            self._alive = False
            triton_runtime.later(_forget, self._id)

    def __del__(self) -> None:
        if getattr(self, "_alive", False):
            self._forget()


_ALLOWED = {"counter": ("increment",), "gauge": ("increment", "set"), "histogram": ("observe",)}


class MetricFamily:
    """A family of metrics of one name and kind. With the object, the family goes, and all its metrics."""

    COUNTER: ClassVar[MetricKind] = MetricKind.COUNTER
    GAUGE: ClassVar[MetricKind] = MetricKind.GAUGE
    HISTOGRAM: ClassVar[MetricKind] = MetricKind.HISTOGRAM

    def __init__(self, name: str, description: str, kind: MetricKind) -> None:
        name, description = text_of(name, "MetricFamily: name"), text_of(description, "MetricFamily: description")
        if not isinstance(kind, MetricKind):
            raise TypeError("MetricFamily: kind must be MetricFamily.COUNTER, GAUGE or HISTOGRAM")
        self._metrics: list[Metric] = []  # as in Triton, the family holds its metrics: they live as long as it
        self._kind = _KINDS[kind]
        triton_runtime.start_cleaning()
        payload = {"name": name, "description": description, "kind": self._kind}
        self._id = int(_ask("Error when creating MetricFamily", "metric_family", payload)["id"])

    def Metric(self, labels: Mapping[str, Any] | None = None, buckets: Sequence[float] | None = None) -> Metric:
        """A metric; `labels` are strings, `buckets` the upper bounds of a histogram, ascending."""
        if labels is not None and not isinstance(labels, dict):
            raise TritonModelException("Failed to create metric. Labels must be a dictionary.")
        if buckets is None:
            if self._kind == "histogram":
                raise TritonModelException("Failed to create metric. Missing required buckets.")
        elif not isinstance(buckets, list):
            raise TritonModelException("Failed to create metric. Buckets must be a list.")
        elif self._kind != "histogram":
            raise TritonModelException("Failed to create metric. Unexpected buckets found.")
        for key, value in (labels or {}).items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TritonModelException(f"Error when creating Metric: label {key!r} is no str, or its value is none")
        payload = {
            "family": self._id,
            "labels": dict(labels or {}),
            "buckets": None if buckets is None else [float(bound) for bound in buckets],
        }
        made = Metric(int(_ask("Error when creating Metric", "metric", payload)["id"]), self._kind)
        self._metrics.append(made)
        return made

    def __del__(self) -> None:
        id = getattr(self, "_id", None)
        if id is not None:
            for metric in self._metrics:
                metric._forget()
            triton_runtime.later(_forget, id)


def _forget(id: int) -> None:
    triton_runtime.server().tell("metric_forget", {"id": id})


def _ask(text: str, what: str, payload: Mapping[str, Any]) -> Any:
    server = triton_runtime.server()
    try:
        return server.ask(what, payload)
    except DoorstepError as error:
        raise TritonModelException(f"{text}: {error.message}") from None
