"""GET /metrics, in the text format or in OpenMetrics, as the scraper asks. Counts nothing itself: it reads.

A scrape costs the event loop a few reads per model; naming, formatting and compressing run in a thread. Every name
is in docs/observability.md.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from doorstep.cache.base import ResponseCache
from doorstep.observability.cache_metrics import CacheReading, cache_families, cache_reading
from doorstep.observability.custom_metrics import CustomMetrics
from doorstep.observability.llm_metrics import llm_families
from doorstep.observability.machine_metrics import CpuAndMemory, LoopLag, build_family, process_families
from doorstep.observability.model_metrics import MeasuredModel, ModelReading, model_families, state_family
from doorstep.repository.base import IndexEntry
from doorstep.wire.compression import choose_coding, compress
from doorstep.wire.context import ListenerContext
from doorstep.wire.exchange import Buffer, Exchange
from doorstep.wire.router import Router

# name, what it says, how to read it
_Listener = Callable[[ListenerContext], float]
LISTENER_GAUGES: tuple[tuple[str, str, _Listener], ...] = (
    ("doorstep_connections", "Open connections", lambda c: len(c.connections)),
    ("doorstep_held_body_bytes", "Bytes of large request bodies that are still arriving", lambda c: c.held_bytes),
)
LISTENER_COUNTERS: tuple[tuple[str, str, _Listener], ...] = (
    ("doorstep_connections_accepted", "Connections accepted", lambda c: c.counters.accepted),
    ("doorstep_connections_refused", "Connections refused: there were too many", lambda c: c.counters.refused),
    ("doorstep_wire_requests", "Requests whose head arrived whole, of every kind", lambda c: c.counters.requests),
    ("doorstep_protocol_errors", "Requests and connections refused for what they sent",
     lambda c: c.counters.protocol_errors),
    ("doorstep_wire_timeouts", "Connections closed by a time limit", lambda c: c.counters.timeouts),
)  # fmt: skip


class MetricsEndpoint:
    """Touched only from the event loop."""

    def __init__(
        self,
        models: Callable[[], Sequence[MeasuredModel]],
        contexts: Sequence[ListenerContext],
        index: Callable[[], Iterable[IndexEntry]],
        *,
        custom: CustomMetrics | None = None,
        cache: Callable[[], ResponseCache | None] = lambda: None,
        counter_latencies: bool = True,
        cpu: bool = True,
    ) -> None:
        """`models()`: the loaded ones; `contexts`: the listeners', a list that may still grow; `custom`: what models
        count themselves; `cpu`: `nv_cpu_*`."""
        self._custom = custom or CustomMetrics()
        self._cache = cache  # the response cache, if there is one
        self._counter_latencies = counter_latencies
        self._models = models
        self._contexts = contexts
        self._index = index
        self._cpu = CpuAndMemory() if cpu else None
        self._lag: LoopLag | None = None

    def register(self, router: Router) -> None:
        router.add("GET", "/metrics", self.answer)

    async def answer(self, exchange: Exchange) -> None:
        accept = exchange.headers.get(b"accept", b"").decode("latin-1")
        coding = choose_coding(exchange.headers.get(b"accept-encoding"))
        content_type, body = await asyncio.to_thread(_render, self.snapshot(), accept, coding)
        headers = [(b"content-type", content_type.encode())]
        if coding != b"identity":
            headers.append((b"content-encoding", coding))
        exchange.respond(200, headers, *body)

    def snapshot(self) -> Snapshot:
        """All that may be read only on the event loop."""
        if self._lag is None:
            self._lag = LoopLag(asyncio.get_running_loop())
            self._lag.start()
        return Snapshot(
            [ModelReading(model) for model in self._models()],
            list(self._index()),
            [_listener_reading(context) for context in self._contexts],
            self._lag.seconds,
            self._cpu,
            self._custom,
            cache=cache_reading(self._cache()),
            counter_latencies=self._counter_latencies,
        )


class Snapshot:
    """One scrape's numbers: a prometheus_client collector."""

    def __init__(
        self,
        models: Sequence[ModelReading],
        index: Sequence[IndexEntry],
        listeners: Sequence[tuple[str, dict[str, float]]],
        loop_lag_s: float,
        cpu: CpuAndMemory | None,
        custom: CustomMetrics | None = None,
        *,
        cache: CacheReading | None = None,
        counter_latencies: bool = True,
    ) -> None:
        self._cache = cache or {}
        self._counter_latencies = counter_latencies
        self.custom = custom or CustomMetrics()
        self._models = models
        self._index = index
        self._listeners = listeners
        self._loop_lag_s = loop_lag_s
        self._cpu = cpu

    def collect(self) -> Iterable[Metric]:
        yield from model_families(self._models, counter_latencies=self._counter_latencies)
        yield from llm_families([model.llm for model in self._models if model.llm is not None])
        yield state_family(self._index)
        for name, text, _ in LISTENER_GAUGES:
            family: Metric = GaugeMetricFamily(name, text)
            for listener, values in self._listeners:
                family.add_sample(name, {"listener": listener}, values[name])
            yield family
        for name, text, _ in LISTENER_COUNTERS:
            family = CounterMetricFamily(name, text)
            for listener, values in self._listeners:
                family.add_sample(f"{name}_total", {"listener": listener}, values[name])
            yield family
        yield GaugeMetricFamily(
            "doorstep_event_loop_lag_seconds",
            "The longest that the event loop was late in the last 15 to 30 seconds",
            self._loop_lag_s,
        )
        yield build_family()
        if self._cpu is not None:
            yield from self._cpu.families()
        yield from process_families()
        yield from cache_families(self._cache)
        yield from self.custom.families()


_UNTYPED = re.compile(rb"^# TYPE (\S+) untyped$", re.MULTILINE)


def render(snapshot: Snapshot, accept: str) -> tuple[str, bytes]:
    """(content type, body). Not on the event loop: it takes milliseconds, and reads files."""
    encode, content_type = choose_encoder(accept)
    body = encode(snapshot)
    if content_type.startswith("text/plain"):
        # OpenMetrics has no counter without `_total`, so the library knows these as untyped; the text format has.
        body = _UNTYPED.sub(rb"# TYPE \1 counter", body)
    return content_type, body


def _render(snapshot: Snapshot, accept: str, coding: bytes) -> tuple[str, tuple[Buffer, ...]]:
    content_type, body = render(snapshot, accept)
    return content_type, (body,) if coding == b"identity" else compress(coding, body)


def _listener_reading(context: ListenerContext) -> tuple[str, dict[str, float]]:
    return context.name, {name: read(context) for name, _, read in (*LISTENER_GAUGES, *LISTENER_COUNTERS)}
