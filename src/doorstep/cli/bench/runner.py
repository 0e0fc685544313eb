"""Starts the load processes, follows them while they run, and gathers what they counted. Shows nothing."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import numpy as np

from doorstep.cli.bench.histogram import LatencyHistogram
from doorstep.cli.bench.loadgen import main
from doorstep.cli.bench.plan import Plan
from doorstep.cli.bench.ring import Ring, Slot, create_ring_file, remove_ring_file
from doorstep.errors import Unavailable

_TICK_S = 0.1


@dataclass(slots=True)
class Moment:
    """How it goes, ten times a second. `histogram` covers the last second or so."""

    phase: str  # "warming up", "measuring", "waiting for the last answers"
    elapsed_s: float  # since measuring began
    rate: float
    errors: int
    late: int  # requests that are due and wait for a free connection
    histogram: LatencyHistogram


@dataclass(slots=True)
class Outcome:
    histogram: LatencyHistogram = field(default_factory=LatencyHistogram)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    cpu_share: float = 0.0  # of the busiest load process
    timeline: list[tuple[float, float, float]] = field(default_factory=list)  # (second, requests/s, p99 in ns)

    @property
    def rate(self) -> float:
        return self.histogram.count / self.seconds if self.seconds else 0.0


def split(plan: Plan, processes: int) -> list[Plan]:
    """The plan's connections and rate, shared out evenly."""
    processes = max(1, min(processes, plan.connections))
    return [
        replace(
            plan,
            connections=plan.connections // processes + (number < plan.connections % processes),
            rate=plan.rate / processes,
            seed=plan.seed + number,
        )
        for number in range(processes)
    ]


def run_plans(plans: Sequence[Plan], watch: Callable[[Moment], None]) -> Outcome:
    """Raises Unavailable where the server cannot be reached."""
    with ExitStack() as stack:
        crew = []
        for plan in plans:
            path = create_ring_file()
            stack.callback(remove_ring_file, path)
            crew.append(_Worker(replace(plan, ring=path)))
            stack.callback(crew[-1].end)
        _begin(crew)
        return _follow(crew, plans[0], watch)


class _Worker:
    def __init__(self, plan: Plan) -> None:
        context = multiprocessing.get_context("spawn")
        self.ring = Ring(plan.ring)
        self.position = 0
        self.result: dict[str, object] | None = None
        self._receiver: Connection
        self._receiver, sender = context.Pipe(duplex=False)
        self._process: SpawnProcess = context.Process(target=main, args=(plan, sender), daemon=True)
        self._process.start()
        sender.close()

    def look(self) -> None:
        """Takes the result, if it is there. Raises Unavailable where there will be none."""
        if self.result is None and self._receiver.poll():
            try:
                self.result = self._receiver.recv()
            except EOFError:
                raise Unavailable("a load process ended without a result") from None
            if failure := self.result.get("failure"):
                raise Unavailable(str(failure))

    def end(self) -> None:
        self._process.join(timeout=0.5 if self.result else 0)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._receiver.close()


def _begin(crew: Sequence[_Worker]) -> None:
    while not all(worker.ring.slots[Slot.CONNECTED] for worker in crew):
        for worker in crew:
            worker.look()
        time.sleep(0.005)
    start = time.monotonic_ns() + 20_000_000
    for worker in crew:
        worker.ring.slots[Slot.START_NS] = start


def _follow(crew: Sequence[_Worker], plan: Plan, watch: Callable[[Moment], None]) -> Outcome:
    outcome = Outcome()
    began = time.monotonic()  # of measuring, once that has begun
    measuring = False
    recent: list[tuple[float, LatencyHistogram]] = []  # ticks of the last second
    second = LatencyHistogram()
    while any(worker.result is None for worker in crew):
        time.sleep(_TICK_S)
        tick = LatencyHistogram()
        for worker in crew:
            worker.look()
            _drain(worker, tick)
        now = time.monotonic()
        if not measuring and all(worker.ring.slots[Slot.MEASURING] for worker in crew):
            measuring, began = True, now
            outcome.histogram = LatencyHistogram()
            for worker in crew:
                worker.position = 0
            tick = LatencyHistogram()
            for worker in crew:
                _drain(worker, tick)
            began -= _TICK_S / 2
        if measuring:
            outcome.histogram.merge(tick)
            second.merge(tick)
            at = now - began
            if at >= len(outcome.timeline) + 1 and at <= plan.duration_s + 0.5:
                outcome.timeline.append((at, float(second.count), second.percentiles_ns([99])[0]))
                second = LatencyHistogram()
        recent.append((now, tick))
        recent = [(at, part) for at, part in recent if now - at < 1.0]
        watch(_moment(crew, plan, recent, measuring, now - began))
    for worker in crew:
        _drain(worker, outcome.histogram)
        _add(outcome, worker)
    return outcome


def _drain(worker: _Worker, histogram: LatencyHistogram) -> None:
    pieces, worker.position = worker.ring.since(worker.position)
    for piece in pieces:
        histogram.add(np.frombuffer(piece, np.int64))


def _moment(
    crew: Sequence[_Worker], plan: Plan, recent: list[tuple[float, LatencyHistogram]], measuring: bool, elapsed: float
) -> Moment:
    histogram = LatencyHistogram()
    for _, part in recent:
        histogram.merge(part)
    phase = "warming up"
    if measuring:
        phase = "measuring" if elapsed <= plan.duration_s else "waiting for the last answers"
    return Moment(
        phase,
        elapsed,
        histogram.count / (len(recent) * _TICK_S),
        sum(worker.ring.slots[Slot.ERRORS] for worker in crew),
        sum(worker.ring.slots[Slot.LATE] for worker in crew),
        histogram,
    )


def _add(outcome: Outcome, worker: _Worker) -> None:
    result: dict[str, object] = worker.result or {}
    outcome.errors.update(result["errors"])  # type: ignore[call-overload]
    outcome.seconds = max(outcome.seconds, float(result["seconds"]))  # type: ignore[arg-type]
    outcome.bytes_in += int(result["bytes_in"])  # type: ignore[call-overload]
    outcome.bytes_out += int(result["bytes_out"])  # type: ignore[call-overload]
    outcome.cpu_share = max(outcome.cpu_share, float(result["cpu_share"]))  # type: ignore[arg-type]
