"""Our histograms as prometheus_client's samples. Knows no metric by name."""

from __future__ import annotations

from prometheus_client.core import Metric

from doorstep.stats import Histogram


def bound_text(bound: float) -> str:
    """As Triton writes the bounds of buckets, which dashboards look for: 1, not 1.0."""
    return "+Inf" if bound == float("inf") else f"{bound:.16g}"


def add_histogram(
    family: Metric, labels: dict[str, str], histogram: Histogram, bounds: tuple[float, ...], scale: float
) -> None:
    """`bounds` are those to show, `scale` what a unit shown is in the histogram's own."""
    name, cumulative = family.name, 0
    for bound, count in zip((*bounds, float("inf")), list(histogram.counts), strict=True):
        cumulative += count
        family.add_sample(f"{name}_bucket", labels | {"le": bound_text(bound)}, cumulative)
    family.add_sample(f"{name}_count", labels, cumulative)
    family.add_sample(f"{name}_sum", labels, histogram.total / scale)
