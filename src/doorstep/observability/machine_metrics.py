"""The machine's and the process's own numbers: CPU, memory, how late the event loop is. Knows no model."""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric

from doorstep._version import __version__


class CpuAndMemory:
    """`nv_cpu_*`, as Triton counts them, from /proc; nothing where there is none. Reads files."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._before = self._cpu_times()

    def families(self) -> Iterable[Metric]:
        times = self._cpu_times()
        if times is not None and self._before is not None:
            busy, idle = (max(now - then, 0) for now, then in zip(times, self._before, strict=True))
            share = busy / (busy + idle) if busy + idle else 0.0
            yield GaugeMetricFamily("nv_cpu_utilization", "Busy share of all CPUs since the last look, 0 to 1", share)
        self._before = times
        memory = self._memory()
        if memory is not None:
            total, available = memory
            yield GaugeMetricFamily("nv_cpu_memory_total_bytes", "Memory of the machine", total)
            yield GaugeMetricFamily("nv_cpu_memory_used_bytes", "Memory in use on the machine", total - available)

    def _cpu_times(self) -> tuple[int, int] | None:
        """(busy, idle) ticks of all CPUs since they started."""
        try:
            words = (self._proc / "stat").read_text().split("\n", 1)[0].split()
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, words[1:9])
        except (OSError, ValueError):
            return None
        return user + nice + system + irq + softirq + steal, idle + iowait

    def _memory(self) -> tuple[int, int] | None:
        """(total, available) bytes."""
        try:
            lines = (self._proc / "meminfo").read_text().splitlines()
            kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
            return kib["MemTotal"] * 1024, min(kib["MemAvailable"], kib["MemTotal"]) * 1024
        except (OSError, ValueError, KeyError, IndexError):
            return None


class LoopLag:
    """How late the event loop runs what is due: the longest delay of the last 15 to 30 seconds.

    One timer, twice a second. Touched only from the event loop."""

    PERIOD_S = 0.5
    WINDOW = 30  # periods

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] | None = None) -> None:
        self._loop = loop
        self._clock = clock or loop.time
        self._due = 0.0
        self._ticks = 0
        self._longest = [0.0, 0.0]  # of the window before, and of this one
        self._timer: asyncio.TimerHandle | None = None

    @property
    def seconds(self) -> float:
        return max(self._longest)

    def start(self) -> None:
        if self._timer is None:
            self._arm()

    def tick(self) -> None:
        self._ticks += 1
        if self._ticks % self.WINDOW == 0:
            self._longest = [self._longest[1], 0.0]
        self._longest[1] = max(self._longest[1], self._clock() - self._due)
        self._arm()

    def _arm(self) -> None:
        self._due = self._clock() + self.PERIOD_S
        self._timer = self._loop.call_later(self.PERIOD_S, self.tick)


def build_family() -> Metric:
    family = GaugeMetricFamily("doorstep_build_info", "1; the labels say what runs")
    labels = {"version": __version__, "python": platform.python_version(), "machine": platform.machine()}
    family.add_sample(family.name, labels, 1)
    return family


_process = ProcessCollector(registry=None)


def process_families() -> Iterable[Metric]:
    """`process_*`: CPU seconds, memory, open files. Reads files."""
    return _process.collect()
