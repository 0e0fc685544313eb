"""--metrics-config: from strings to `MetricsOptions`. Knows no metric but the one whose buckets a model may set.

(core, metric_model_reporter.cc: MetricReporterConfig)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from doorstep.errors import InvalidArgument

FIRST_RESPONSE = "nv_inference_first_response_histogram_ms"
FIRST_RESPONSE_BUCKETS_MS = (100.0, 500.0, 2000.0, 5000.0)
QUANTILES = ((0.5, 0.05), (0.9, 0.01), (0.95, 0.001), (0.99, 0.001), (0.999, 0.001))
_SWITCHES = ("counter_latencies", "summary_latencies", "histogram_latencies")


@dataclass(frozen=True, slots=True)
class MetricsOptions:
    """Which latencies are reported, and how."""

    counter_latencies: bool = True
    summary_latencies: bool = False
    histogram_latencies: bool = False
    summary_quantiles: tuple[tuple[float, float], ...] = QUANTILES  # (quantile, error that is allowed)

    @property
    def detailed(self) -> bool:
        """More than counters."""
        return self.summary_latencies or self.histogram_latencies


def first_response_buckets(config: Any) -> tuple[float, ...]:
    """What a model's config wants of the histogram's buckets, in milliseconds."""
    for control in config.model_metrics.metric_control:
        if control.metric_identifier.family == FIRST_RESPONSE:
            return tuple(control.histogram_options.buckets)
    return FIRST_RESPONSE_BUCKETS_MS


def unknown_families(config: Any) -> list[str]:
    """The families that a model's config would control, and that have no buckets to set."""
    families = [control.metric_identifier.family for control in config.model_metrics.metric_control]
    return [family for family in families if family != FIRST_RESPONSE]


def parse_metrics_options(given: Sequence[str], notes: list[str]) -> MetricsOptions:
    """`given`: the values of --metrics-config, in order. Raises InvalidArgument; `notes` are for the log."""
    values: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key or not value or "," in key:
            raise InvalidArgument(f"--metrics-config option format is <setting>=<value>. Got {text}")
        if key in _SWITCHES:
            values[key] = _bool(text, value)
        elif key == "summary_quantiles":
            values[key] = _quantiles(text, value)
        else:
            notes.append(f"--metrics-config={text} has no effect: there is no such setting")
    return MetricsOptions(**values)


def _bool(text: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise InvalidArgument(f"--metrics-config={text}: expected true or false")
    return value == "true"


def _quantiles(text: str, value: str) -> tuple[tuple[float, float], ...]:
    pairs = []
    for pair in value.split(","):
        quantile, colon, error = pair.partition(":")
        try:
            found = float(quantile), float(error)
        except ValueError:
            found = (-1.0, -1.0)
        if not colon or not (0 <= found[0] <= 1 and 0 <= found[1] <= 1):
            raise InvalidArgument(
                f"--metrics-config={text}: Invalid option: [{pair}]. Expected format is <quantile>:<error>, each from "
                "0 to 1"
            )
        pairs.append(found)
    return tuple(pairs)
