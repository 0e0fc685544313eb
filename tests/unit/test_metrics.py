"""/metrics: names, labels and numbers; judged by Prometheus' own parsers and, where it is installed, by promtool."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from doorstep import __version__, proto
from doorstep.cache.local import LocalCache
from doorstep.errors import FailureReason
from doorstep.latencies import Latencies
from doorstep.llm_stats import LLMStatistics
from doorstep.observability.llm_metrics import LLMReading, llm_families
from doorstep.observability.machine_metrics import CpuAndMemory, LoopLag
from doorstep.observability.metrics import MetricsEndpoint, Snapshot, render
from doorstep.repository.base import IndexEntry
from doorstep.scheduler.slots import SlotScheduler
from doorstep.stats import ModelStatistics
from doorstep.wire.context import ListenerContext
from doorstep.wire.router import Router

MS = 1_000_000  # nanoseconds
ROOT = Path(__file__).parents[2]
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class FakeModel:
    def __init__(self, name: str = "resnet", version: str = "1", **tags: str) -> None:
        self.name = name
        self.version = version
        self.config = SimpleNamespace(proto=proto.ModelConfig(name=name, metric_tags=tags))
        self.stats = ModelStatistics()
        self.scheduler = SimpleNamespace(queued_count=0)
        self.inflight_count = 0
        self.saturation = 0.0


def busy_model() -> FakeModel:
    """Two executions, of 3 rows and of 1, that answered three requests; two refused, one failed by the model."""
    model = FakeModel()
    stats = model.stats
    stats.record_batch(3, 1 * MS, 20 * MS, 2 * MS)
    stats.record_successes([(30 * MS, 5 * MS), (26 * MS, 3 * MS)], 1 * MS, 20 * MS, 2 * MS)
    stats.record_batch(1, 1 * MS, 4 * MS, 1 * MS)
    stats.record_successes([(7 * MS, 0)], 1 * MS, 4 * MS, 1 * MS)
    stats.record_failure(1 * MS, FailureReason.REJECTED)
    stats.record_failure(1 * MS, FailureReason.REJECTED)
    stats.record_failure(9 * MS, FailureReason.BACKEND)
    stats.load_seconds = 1.25
    stats.worker_restarts = 2
    model.scheduler.queued_count = 4
    model.inflight_count = 7
    model.saturation = 0.75
    return model


async def exposition_of(
    models: list[FakeModel],
    accept: str = "",
    index: Callable[[], list[IndexEntry]] = list,
    cpu: bool = True,
    cache: Callable[[], Any] = lambda: None,
) -> tuple[str, str]:
    contexts = [ListenerContext("http", Router()), ListenerContext("grpc", Router())]
    contexts[0].counters.accepted = 5
    contexts[0].counters.requests = 12
    endpoint = MetricsEndpoint(lambda: models, contexts, index, cpu=cpu, cache=cache)
    content_type, body = render(endpoint.snapshot(), accept)
    return content_type, body.decode()


def exposition(*models: FakeModel, **options: Any) -> str:
    return asyncio.run(exposition_of(list(models), **options))[1]


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (written_name(sample.name, text), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def written_name(name: str, text: str) -> str:
    """The parser gives every counter the `_total` that Triton's do not have."""
    return name if f"\n{name}{{" in text or f"\n{name} " in text else name.removesuffix("_total")


def of(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, frozenset(({"model": "resnet", "version": "1"} | labels).items())]


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("nv_inference_request_success", {}, 3),
        ("nv_inference_request_failure", {"reason": "REJECTED"}, 2),
        ("nv_inference_request_failure", {"reason": "BACKEND"}, 1),
        ("nv_inference_request_failure", {"reason": "CANCELED"}, 0),
        ("nv_inference_request_failure", {"reason": "OTHER"}, 0),
        ("nv_inference_count", {}, 4),
        ("nv_inference_exec_count", {}, 2),
        ("nv_inference_request_duration_us", {}, 63_000),
        ("nv_inference_queue_duration_us", {}, 8_000),
        ("nv_inference_compute_input_duration_us", {}, 3_000),
        ("nv_inference_compute_infer_duration_us", {}, 44_000),
        ("nv_inference_compute_output_duration_us", {}, 5_000),
        ("nv_inference_pending_request_count", {}, 4),
        ("nv_model_load_duration_secs", {}, 1.25),
        ("doorstep_model_load_seconds", {}, 1.25),
        ("doorstep_queue_depth", {}, 4),
        ("doorstep_inflight_requests", {}, 7),
        ("doorstep_saturation_ratio", {}, 0.75),
        ("doorstep_worker_restarts_total", {}, 2),
        ("doorstep_request_duration_seconds_count", {}, 3),
        ("doorstep_request_duration_seconds_sum", {}, 0.063),
        ("doorstep_request_duration_seconds_bucket", {"le": "0.005"}, 0),
        ("doorstep_request_duration_seconds_bucket", {"le": "0.01"}, 1),
        ("doorstep_request_duration_seconds_bucket", {"le": "0.025"}, 1),
        ("doorstep_request_duration_seconds_bucket", {"le": "0.05"}, 3),
        ("doorstep_request_duration_seconds_bucket", {"le": "30"}, 3),
        ("doorstep_request_duration_seconds_bucket", {"le": "+Inf"}, 3),
        ("doorstep_queue_duration_seconds_bucket", {"le": "0.0001"}, 1),
        ("doorstep_queue_duration_seconds_bucket", {"le": "0.005"}, 3),
        ("doorstep_compute_duration_seconds_count", {}, 2),
        ("doorstep_compute_duration_seconds_sum", {}, 0.029),
        ("doorstep_batch_size_bucket", {"le": "1"}, 1),
        ("doorstep_batch_size_bucket", {"le": "2"}, 1),
        ("doorstep_batch_size_bucket", {"le": "4"}, 2),
        ("doorstep_batch_size_sum", {}, 4),
        ("doorstep_batch_size_count", {}, 2),
    ],
)
def test_what_happened_is_what_is_said(name: str, labels: dict[str, str], value: float) -> None:
    assert of(values(exposition(busy_model())), name, **labels) == pytest.approx(value)


def test_text_format_knows_tritons_counters_as_counters() -> None:
    content_type, text = asyncio.run(exposition_of([busy_model()]))
    assert content_type.startswith("text/plain; version=0.0.4")
    for name in (
        "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
        "nv_inference_request_duration_us", "nv_inference_queue_duration_us", "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us", "nv_inference_compute_output_duration_us",
    ):  # fmt: skip
        assert re.search(rf"^# TYPE {name} counter$", text, re.MULTILINE)
        assert re.search(rf'^{name}{{model="resnet",[^}}]*version="1"}} [0-9]', text, re.MULTILINE)
    types = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert types["nv_inference_pending_request_count"] == "gauge"
    assert types["doorstep_request_duration_seconds"] == "histogram"
    assert " untyped" not in text


def test_openmetrics_keeps_every_name_and_passes_its_strict_parser() -> None:
    content_type, text = asyncio.run(exposition_of([busy_model(), FakeModel("bert", "2")], accept=OPENMETRICS))
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")
    families = {f.name: f for f in openmetrics.text_string_to_metric_families(text)}
    assert families["nv_inference_request_success"].samples[0].name == "nv_inference_request_success"
    assert families["nv_inference_request_success"].type == "unknown"
    assert families["doorstep_worker_restarts"].samples[0].name == "doorstep_worker_restarts_total"
    plain = {name for name, _ in values(exposition(busy_model()))}
    assert plain == {s.name for f in families.values() for s in f.samples}


def test_models_versions_and_tags_are_labels() -> None:
    text = exposition(
        FakeModel("a", "1"), FakeModel("a", "2"), FakeModel("b", "1", team="vision", **{"cost-centre": 'x"y'})
    )
    found = values(text)
    assert ("nv_inference_count", frozenset({("model", "a"), ("version", "2")})) in found
    tags = {("_team", "vision"), ("_cost_centre", 'x"y')}
    assert ("nv_inference_count", frozenset({("model", "b"), ("version", "1")} | tags)) in found
    list(openmetrics.text_string_to_metric_families(exposition(FakeModel("b", team='"\n\\'), accept=OPENMETRICS)))


def test_states_are_one_hot_and_a_model_never_loaded_has_none() -> None:
    index = [
        IndexEntry("resnet", "1", "UNLOADING", ""),
        IndexEntry("resnet", "2", "READY", ""),
        IndexEntry("broken", "", "UNAVAILABLE", "no such file"),
        IndexEntry("never"),
    ]
    found = values(exposition(index=lambda: index))
    states = {
        (dict(labels)["model"], dict(labels)["version"], dict(labels)["state"]): value
        for (name, labels), value in found.items()
        if name == "doorstep_model_state"
    }
    assert len(states) == 12
    assert {key for key, value in states.items() if value} == {
        ("resnet", "1", "UNLOADING"), ("resnet", "2", "READY"), ("broken", "", "UNAVAILABLE"),
    }  # fmt: skip


def test_the_server_says_what_it_is_and_how_its_listeners_fare() -> None:
    found = values(exposition())
    assert found["doorstep_connections_accepted_total", frozenset({("listener", "http")})] == 5
    assert found["doorstep_connections_accepted_total", frozenset({("listener", "grpc")})] == 0
    assert found["doorstep_wire_requests_total", frozenset({("listener", "http")})] == 12
    assert found["doorstep_connections", frozenset({("listener", "http")})] == 0
    (build,) = (dict(labels) for name, labels in found if name == "doorstep_build_info")
    assert build["version"] == __version__
    assert found["process_resident_memory_bytes", frozenset()] > 1_000_000
    assert ("doorstep_event_loop_lag_seconds", frozenset()) in found


def test_cache_counters_are_those_of_models_that_have_a_cache() -> None:
    model = FakeModel()
    assert "nv_cache" not in exposition(model)
    model.scheduler.cache = LocalCache(1)
    assert of(values(exposition(model)), "nv_cache_num_hits_per_model") == 0
    model.stats.cache_hit_count, model.stats.cache_hit_ns = 2, 5000
    found = values(exposition(model))
    assert of(found, "nv_cache_num_hits_per_model") == 2
    assert of(found, "nv_cache_hit_duration_per_model") == 5
    assert of(found, "nv_cache_num_misses_per_model") == 0


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, of Debian's package prometheus")
def test_promtool_has_no_objection_but_to_tritons_names() -> None:
    index = [IndexEntry("resnet", "1", "READY", "")]
    text = exposition(busy_model(), FakeModel("bert"), index=lambda: index)
    command = ["promtool", "check", "metrics"]
    checked = subprocess.run(command, input=text, text=True, capture_output=True, timeout=60, check=False)
    said = (checked.stdout + checked.stderr).splitlines()
    assert [line for line in said if not line.startswith("nv_")] == []
    assert all("should" in line for line in said), "advice, not errors"


# ---- the machine


def machine(tmp_path: Path, stat: str, meminfo: str) -> Path:
    (tmp_path / "stat").write_text(stat)
    (tmp_path / "meminfo").write_text(meminfo)
    return tmp_path


def machine_values(source: CpuAndMemory) -> dict[str, float]:
    return {family.name: family.samples[0].value for family in source.families()}


def test_cpu_utilization_is_the_busy_share_since_the_last_look(tmp_path: Path) -> None:
    memory = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 400 kB\nHugePages_Total: 0\n"
    #     user nice system idle iowait irq softirq steal guest guest_nice
    machine(tmp_path, "cpu 100 0 50 800 50 0 0 0 9 9\ncpu0 1\n", memory)
    source = CpuAndMemory(tmp_path)
    machine(tmp_path, "cpu 120 5 60 850 60 2 2 1 99 99\ncpu0 1\n", memory)
    assert machine_values(source) == {
        "nv_cpu_utilization": pytest.approx(40 / 100),
        "nv_cpu_memory_total_bytes": 1000 * 1024,
        "nv_cpu_memory_used_bytes": 600 * 1024,
    }
    assert machine_values(source)["nv_cpu_utilization"] == 0.0, "no time has passed"


@pytest.mark.parametrize(("stat", "meminfo"), [("", ""), ("cpu one two", "MemTotal"), ("intr 1", "MemTotal: 5 kB")])
def test_a_machine_that_does_not_say_has_no_such_metrics(tmp_path: Path, stat: str, meminfo: str) -> None:
    assert machine_values(CpuAndMemory(machine(tmp_path, stat, meminfo))) == {}
    assert machine_values(CpuAndMemory(tmp_path / "missing")) == {}


def test_cpu_metrics_can_be_left_out() -> None:
    assert "nv_cpu_memory_total_bytes" in exposition()
    assert "nv_cpu" not in exposition(cpu=False)


def test_loop_lag_is_the_longest_delay_of_this_window_and_the_one_before() -> None:
    async def main() -> None:
        now = 0.0
        lag = LoopLag(asyncio.get_running_loop(), clock=lambda: now)
        lag.start()

        def tick(late: float) -> None:
            nonlocal now
            assert lag._timer is not None
            lag._timer.cancel()
            now += LoopLag.PERIOD_S + late
            lag.tick()

        tick(0.25)
        tick(0.125)
        assert lag.seconds == 0.25
        for _ in range(LoopLag.WINDOW):
            tick(0.0)
        assert lag.seconds == 0.25, "still in the window before"
        for _ in range(LoopLag.WINDOW):
            tick(0.0)
        assert lag.seconds == 0.0
        assert lag._timer is not None
        lag._timer.cancel()

    asyncio.run(main())


def test_a_snapshot_is_read_beside_a_loop_that_goes_on_counting() -> None:
    """The histogram's count is the sum of its own buckets, whatever is recorded while it is rendered."""

    async def main() -> None:
        model = busy_model()
        endpoint = MetricsEndpoint(lambda: [model], [], list)
        snapshot = endpoint.snapshot()

        def scrape(snapshot: Snapshot) -> str:
            return render(snapshot, "")[1].decode()

        scraping = asyncio.ensure_future(asyncio.to_thread(scrape, snapshot))
        while not scraping.done():
            model.stats.record_successes([(MS, MS)], MS, MS, MS)
            await asyncio.sleep(0)
        found = values(await scraping)
        name = "doorstep_request_duration_seconds"
        assert of(found, f"{name}_count") == of(found, f"{name}_bucket", le="+Inf") >= 3

    asyncio.run(main())


def test_the_documentation_lists_every_metric_and_no_other() -> None:
    documented = set(re.findall(r"`((?:nv|doorstep)_\w+)`", (ROOT / "docs" / "observability.md").read_text()))
    model = busy_model()
    model.scheduler.cache = cache = LocalCache(1)
    model.stats.latencies = Latencies((0.5,), (1,))
    uncached = FakeModel("bert")
    uncached.stats.latencies = Latencies((0.5,), ())
    text = exposition(model, uncached, cache=lambda: cache)
    text += language_models()
    emitted = set(re.findall(r"^# TYPE ((?:nv|doorstep)_\w+)", text, re.MULTILINE))
    assert documented == emitted


def language_models() -> str:
    llm = LLMStatistics(4, 4096)
    scheduler = SimpleNamespace(llm=llm, queued_count=0, adapters_running=list, adapters_waiting=list)
    reading = LLMReading(cast(SlotScheduler, scheduler), {"model": "chat", "version": "1"}, 0)
    encode, _ = choose_encoder("")
    return str(encode(cast(CollectorRegistry, SimpleNamespace(collect=lambda: llm_families([reading])))), "utf-8")


def test_the_names_that_routers_scrape_are_documented() -> None:
    documented = set(re.findall(r"`(vllm:\w+)`", (ROOT / "docs" / "observability.md").read_text()))
    assert documented == set(re.findall(r"^# TYPE (vllm:\w+)", language_models(), re.MULTILINE))
