"""What scenarios have in common: the servers that run, runs of one load against each, and figures out of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import goals
from benchmarks.goals import Figure, Goal
from benchmarks.load import HttpBody, Load, h2load, wrk
from benchmarks.measure import Run, Series, Target, alternate, call_once, post_once
from benchmarks.payloads import Payloads

INFER = "/v2/models/{}/infer"
IMAGE_MB = 4 * 3 * 224 * 224 * 2 / 1e6  # in and out again


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often."""

    seconds: float = 5.0
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers that run, and what they are sent."""

    targets: dict[str, Target]  # by name; "doorstep" is one of them
    payloads: Payloads
    plan: Plan
    raw: dict[str, Series]  # every sample of every scenario, for the JSON


def series_of(bench: Bench, scenario: str, names: tuple[str, ...], run: Run, wanted: tuple[Goal, ...]) -> list[Figure]:
    targets = [bench.targets[name] for name in names if name in bench.targets]
    series = bench.raw[scenario] = alternate(targets, run, seconds=bench.plan.seconds, rounds=bench.plan.rounds)
    return [figure_of(scenario, series, goal) for goal in wanted if goal.peer in series.samples]


def figure_of(scenario: str, series: Series, goal: Goal) -> Figure:
    ours, theirs = series.samples["doorstep"], series.samples[goal.peer]
    ratios = [getattr(a, goal.quantity) / getattr(b, goal.quantity) for a, b in zip(ours, theirs, strict=True)]
    return Figure(
        scenario,
        goals.UNITS[goal.quantity],
        series.median("doorstep", goal.quantity),
        series.median(goal.peer, goal.quantity),
        goal.peer,
        goal.factor,
        goal.at,
        min(ratios),
        max(ratios),
    )


def http_run(model: str, body: HttpBody, connections: int) -> Run:
    def run(target: Target, seconds: float) -> Load:
        return wrk(target.http_port, INFER.format(model), body, connections=connections, seconds=seconds)

    return run


def grpc_run(message: Path, answer_bytes: int, connections: int, streams: int = 1) -> Run:
    def run(target: Target, seconds: float) -> Load:
        return h2load(
            target.grpc_port,
            message,
            answer_bytes=answer_bytes,
            connections=connections,
            seconds=seconds,
            streams=streams,
        )

    return run


def check_http(bench: Bench, names: tuple[str, ...], model: str, body: HttpBody, least: int) -> None:
    for name in names:
        if name in bench.targets:
            answer = post_once(bench.targets[name].http_port, INFER.format(model), body)
            assert len(answer) >= least, f"{name} answers {model} with {answer[:200]!r}"


def check_grpc(bench: Bench, names: tuple[str, ...], message: Path) -> int:
    """The length of the shortest answer."""
    framed = message.read_bytes()
    return min(len(call_once(bench.targets[name].grpc_port, framed)) for name in names if name in bench.targets)


def bytes_of(
    bench: Bench, model: str, protocol: str, wanted: tuple[Goal, ...], run: Callable[[int], Run]
) -> list[Figure]:
    """MB per second through `model`, which gives back the image it gets; over 1 and 16 connections."""
    figures = []
    for connections in (1, 16):
        scenario = f"{model} [1,3,224,224] FP32, {protocol}, {connections} connection{'s' * (connections > 1)}"
        for f in series_of(bench, scenario, ("doorstep", "triton"), run(connections), wanted):
            ours, theirs = f.doorstep * IMAGE_MB, f.other * IMAGE_MB
            figures.append(
                Figure(scenario, "MB/s, in and out", ours, theirs, f.other_name, f.goal, f.at, f.low, f.high)
            )
    return figures
