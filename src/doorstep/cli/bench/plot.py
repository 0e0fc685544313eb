"""A picture of a benchmark: latency by percentile, its distribution, and how both went over time. Measures nothing."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from doorstep.cli.bench.report import PERCENTILES, Result
from doorstep.errors import InvalidArgument

if TYPE_CHECKING:
    from doorstep.cli.bench.runner import Outcome

_INK, _SOFT, _BLUE, _ORANGE = "#1f2933", "#9aa5b1", "#2563eb", "#ea580c"


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgument("--plot needs matplotlib: pip install matplotlib")


def draw(result: Result, outcome: Outcome, path: str) -> None:
    """Writes a picture; its format is what `path` ends in."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with mpl.rc_context({"font.size": 9, "axes.edgecolor": _SOFT, "text.color": _INK, "axes.labelcolor": _INK}):
        figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), width_ratios=(5, 4, 4), layout="constrained")
        title = result.title
        figure.suptitle(
            f"{title.model}: {result.requests_per_second:,.0f} requests/s, p50 {result.latency_ms['p50']:.2f} ms, "
            f"p99 {result.latency_ms['p99']:.2f} ms\n{title.how}",
            fontsize=10,
        )
        _percentiles(axes[0], result, outcome)
        _distribution(axes[1], outcome)
        _timeline(axes[2], outcome)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(visible=True, color="#e4e7eb", linewidth=0.6)
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as error:
            raise InvalidArgument(f"--plot {path}: {error}") from None
        finally:
            pyplot.close(figure)


def _percentiles(axis: Any, result: Result, outcome: Outcome) -> None:
    """The tail has as much room as the rest: the x axis counts nines."""
    latency, share = outcome.histogram.curve()
    nines = -np.log10(np.maximum(1 - share, 1 / max(outcome.histogram.count, 10)))
    axis.plot(nines, latency / 1e6, color=_BLUE, linewidth=1.5)
    marks = [0.0, *(p for p in (50.0, 90.0, 99.0, 99.9, 99.99, 99.999) if outcome.histogram.count * (1 - p / 100) >= 1)]
    axis.set_xticks([-np.log10(1 - p / 100) for p in marks], [f"{p:g}%" for p in marks])
    for percent in PERCENTILES:
        value = result.latency_ms[f"p{percent:g}"]
        axis.plot(-np.log10(1 - percent / 100), value, "o", color=_BLUE, markersize=3)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="percentile", ylabel="latency, ms", title="Latency by percentile")


def _distribution(axis: Any, outcome: Outcome) -> None:
    latency, share = outcome.histogram.curve()
    counts = np.diff(np.concatenate(([0.0], share))) * outcome.histogram.count
    low, high = outcome.histogram.percentiles_ns((0.1, 99.9))
    bins = np.geomspace(max(low, 1_000) / 1e6, max(high, low * 1.2, 2_000) / 1e6, 60)
    axis.hist(latency / 1e6, bins=bins, weights=counts, color=_BLUE, alpha=0.85)
    axis.set_xscale("log")
    axis.set(xlabel="latency, ms", ylabel="requests", title="Distribution")


def _timeline(axis: Any, outcome: Outcome) -> None:
    seconds = [at for at, _, _ in outcome.timeline]
    axis.plot(seconds, [rate for _, rate, _ in outcome.timeline], color=_BLUE, marker="o", markersize=3)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="second", title="Over time")
    axis.set_ylabel("requests/s", color=_BLUE)
    other = axis.twinx()
    other.plot(seconds, [p99 / 1e6 for _, _, p99 in outcome.timeline], color=_ORANGE, marker="o", markersize=3)
    other.set_ylim(bottom=0)
    other.set_ylabel("p99, ms", color=_ORANGE)
    other.spines["top"].set_visible(False)
