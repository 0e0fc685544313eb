"""What a benchmark shows: a line while it runs, a table at the end, JSON for other programs. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import orjson

if TYPE_CHECKING:
    from doorstep.cli.bench.runner import Moment, Outcome

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)
_BUSY = 0.9  # of a core: above it the load generator may be what is measured


@dataclass(frozen=True, slots=True)
class Title:
    model: str
    url: str
    how: str
    inputs: list[str]


@dataclass(frozen=True, slots=True)
class Result:
    title: Title
    seconds: float
    requests: int
    requests_per_second: float
    wanted_rate: float  # 0: closed loop
    latency_ms: dict[str, float]  # mean, p50 … p99.9, min, max
    errors: dict[str, int]
    error_count: int
    sent_mb_per_second: float
    received_mb_per_second: float
    generator_cpu: float  # cores used by the busiest load process


def summarise(outcome: Outcome, title: Title, wanted_rate: float) -> Result:
    histogram = outcome.histogram
    latency = {"mean": histogram.mean_ns, "min": float(histogram.min_ns)}
    for percent, value in zip(PERCENTILES, histogram.percentiles_ns(PERCENTILES), strict=True):
        latency[f"p{percent:g}"] = value
    latency["max"] = float(histogram.max_ns)
    seconds = outcome.seconds or 1.0
    return Result(
        title=title,
        seconds=outcome.seconds,
        requests=histogram.count,
        requests_per_second=outcome.rate,
        wanted_rate=wanted_rate,
        latency_ms={name: value / 1e6 for name, value in latency.items()},
        errors=dict(outcome.errors.most_common()),
        error_count=outcome.errors.total(),
        sent_mb_per_second=outcome.bytes_out / seconds / 1e6,
        received_mb_per_second=outcome.bytes_in / seconds / 1e6,
        generator_cpu=outcome.cpu_share,
    )


def as_json(result: Result) -> str:
    return orjson.dumps(asdict(result), option=orjson.OPT_INDENT_2).decode() + "\n"


def show(result: Result) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    title = result.title
    console.print(f"[bold]{escape(title.model)}[/] at {escape(title.url)}: {escape(title.how)}")
    console.print(escape("; ".join(title.inputs)), style="dim")
    console.print()
    console.print(
        f"[bold]{result.requests_per_second:,.0f}[/] requests/s  ({result.requests:,} in {result.seconds:.1f} s; "
        f"{result.sent_mb_per_second:,.1f} MB/s sent, {result.received_mb_per_second:,.1f} MB/s received)"
    )
    table = Table(box=None, pad_edge=False)
    names = ("mean", *(f"p{percent:g}" for percent in PERCENTILES), "max")
    table.add_column("latency", style="dim")
    for name in names:
        table.add_column(name, justify="right")
    table.add_row("ms", *(f"{result.latency_ms[name]:,.3f}" for name in names))
    if result.requests:
        console.print(table)
    if result.error_count:
        console.print(f"[red]{result.error_count:,} errors[/]")
        for text, count in list(result.errors.items())[:10]:
            console.print(f"  {count:,} times {escape(text)}")
    for note in notes(result):
        console.print(f"[yellow]note:[/] {note}")


def notes(result: Result) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    if result.generator_cpu > _BUSY and not result.wanted_rate:
        found.append(
            f"a load process used {result.generator_cpu:.0%} of a core, so the server may be faster than this: "
            "try --processes 2, on cores that the server does not use"
        )
    if result.wanted_rate and result.requests_per_second < 0.97 * result.wanted_rate:
        found.append(
            f"{result.wanted_rate:,.0f} requests/s were wanted: the server kept up with "
            f"{result.requests_per_second:,.0f}, or --connections is too low"
        )
    return found


@contextmanager
def progress(title: Title, warm_up_s: float, duration_s: float, *, quiet: bool) -> Iterator[Callable[[Moment], None]]:
    """A line that follows the run, on a terminal; nothing elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda moment: None
        return
    from rich.live import Live
    from rich.text import Text

    with Live(Text(f"connecting to {title.url} …"), console=console, transient=True, refresh_per_second=4) as live:
        yield lambda moment: live.update(Text(line(moment, warm_up_s, duration_s)))


def line(moment: Moment, warm_up_s: float, duration_s: float) -> str:
    p50, p99 = (value / 1e6 for value in moment.histogram.percentiles_ns((50, 99)))
    whole = duration_s if moment.phase != "warming up" else warm_up_s
    parts = [
        f"{moment.phase} {min(moment.elapsed_s, whole):.0f}/{whole:g} s",
        f"{moment.rate:,.0f} requests/s",
        f"p50 {p50:.2f} ms",
        f"p99 {p99:.2f} ms",
    ]
    if moment.late:
        parts.append(f"{moment.late:,} due")
    if moment.errors:
        parts.append(f"{moment.errors:,} errors")
    return "   ".join(parts)
