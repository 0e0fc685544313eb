"""Models whose metrics are meant to break /metrics, the log or the server's memory."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

import pytest
from harm import Victim, attacked, check_text, save_python, tensor
from prometheus_client.parser import text_string_to_metric_families

from doorstep.testing.onnx_models import save_adder

METERED = """
import numpy as np
import triton_python_backend_utils as pb_utils
C, G, H = pb_utils.MetricFamily.COUNTER, pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.HISTOGRAM
kept = []

class TritonPythonModel:
    def execute(self, requests):
        return [self.one(pb_utils.get_input_tensor_by_name(r, "x").as_numpy().ravel()[0].decode()) for r in requests]

    def one(self, text):
        try:
            exec(text, globals())
            said = "done"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([said.encode()], np.object_))])
"""
CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    models = tmp_path_factory.mktemp("metered") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_python(models, "metered", METERED, CONFIG)
    with Victim(models, "--model-control-mode=explicit", "--load-model=add", "--load-model=metered") as victim:
        yield victim
        victim.assert_sound()


def run(server: Victim, code: str) -> str:
    status, answer = server.infer("metered", tensor("x", [1], "BYTES", [code]))
    check_text(str(answer), code)
    assert status == 200, answer
    return str(answer["outputs"][0]["data"][0])


def scrape(server: Victim) -> dict[str, float]:
    """Every sample by its name and labels; each is there once, and each family."""
    with urllib.request.urlopen(server.metrics_url, timeout=30) as answer:
        text = answer.read().decode()
    found: dict[str, float] = {}
    types = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(types) == len(set(types)), sorted(types)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = f"{sample.name}{sorted(sample.labels.items())}"
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


@pytest.fixture(autouse=True)
def anew(server: Victim) -> None:
    """The model without its metrics."""
    reload(server)


def reload(server: Victim) -> None:
    assert server.post("/v2/repository/models/metered/unload")[0] == 200
    assert server.post("/v2/repository/models/metered/load")[0] == 200


NAMES = [
    *("nv_inference_count", "nv_inference_request_success", "nv_cache_num_hits_per_model", "nv_cpu_utilization"),
    *("nv_inference_request_summary_us", "nv_energy_consumption", "nv_pinned_memory_pool_used_bytes"),
    *("doorstep_inflight_requests", "process_open_fds", "nv_gpu_utilization"),
    *("", "a b", "a\nb", "1a", "a-b", "\xe4", 'a{b="c"}', "# HELP", "a" * 100_000, "\ud800", "__name__"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_the_servers_or_none(server: Victim, name: str) -> None:
    with attacked(server):
        before = {key for key in scrape(server) if "custom" not in key}
        said = run(server, f"f = pb_utils.MetricFamily({name!a}, 'd', C); kept += [f, f.Metric({{}})]")
        assert said != "done" or len(name) > 1000
        assert before <= scrape(server).keys()


def test_text_stays_text(server: Victim) -> None:
    """Newlines, quotes and backslashes in descriptions and values do not become lines of the page."""
    with attacked(server):
        evil = r'"a\\nevil 1\\n# TYPE evil counter\\nevil{x=\"\\\\\"} 2\\r\\n\\x00\\x1b[31m \\u2028\""'
        assert run(server, f"evil = {evil}; f = pb_utils.MetricFamily('custom_a', evil, G)") == "done"
        assert run(server, "m = f.Metric({'x': evil, 'model': evil}); m.set(5); kept += [f, m]") == "done"
        for value in ("float('nan')", "float('inf')", "-float('inf')", "1e308", "-0.0"):
            assert run(server, f"m.set({value})") == "done"
            scrape(server)
        for code in ("m.set('x')", "m.set(None)", "m.set(10 ** 400)", "m.set([1])", "m.increment('x')", "m.set(1j)"):
            assert run(server, code) != "done"
        samples = scrape(server)
        assert not any(key.startswith("evil") for key in samples)


@pytest.mark.parametrize(
    "code",
    [
        "f.Metric({'a b': 'c'})",
        "f.Metric({'a': '\\ud800'})",
        "f.Metric({'\\ud800': 'a'})",
        "f.Metric({'a': 5})",
        "f.Metric({5: 'a'})",
        "f.Metric({'a': None})",
        "f.Metric({'__name__': 'a'})",
        "f.Metric({'a\\n': 'a'})",
        "f.Metric({'le': 'a'}, buckets=[1.0])",
        "h.Metric({'le': 'a'}, buckets=[1.0])",
        "h.Metric({}, buckets=[2.0, 1.0])",
        "h.Metric({}, buckets=[float('nan')])",
        "h.Metric({}, buckets=[float('nan'), 1.0])",
        "h.Metric({}, buckets=['x'])",
        "h.Metric({}, buckets=[1.0] * 100_000)",
        "pb_utils.MetricFamily('custom_b', 5, G).Metric({}).set(1)",
        "pb_utils.MetricFamily('custom_b', '\\ud800', G).Metric({}).set(1)",
        "pb_utils.MetricFamily('custom_b', 'b', 17).Metric({})",
        "pb_utils.MetricFamily('custom_f', 'another', C).Metric({})",
        "f.Metric(5)",
    ],
)
def test_metrics_that_are_none(server: Victim, code: str) -> None:
    with attacked(server):
        prepare = "f = pb_utils.MetricFamily('custom_f', 'd', G); h = pb_utils.MetricFamily('custom_h', 'd', H)"
        use = "kept += [f, h, f.Metric({'x': 'y'}), h.Metric({}, buckets=[1.0])]"
        assert run(server, f"{prepare}; {use}") == "done"
        said = run(server, f"kept.append({code})")
        scrape(server)
        assert said != "done"


def test_names_that_only_the_page_makes_equal(server: Victim) -> None:
    """A histogram's lines have names of their own; no other family may have them."""
    taken = "TritonModelException: Error when creating MetricFamily: Family name already exists"
    with attacked(server):
        run(server, "h = pb_utils.MetricFamily('custom_h', 'd', H); kept += [h, h.Metric({}, buckets=[1.0])]")
        for name in ("custom_h_bucket", "custom_h_count", "custom_h_sum"):
            assert run(server, f"f = pb_utils.MetricFamily('{name}', 'd', C)") == taken
        run(server, "g = pb_utils.MetricFamily('custom_g_sum', 'd', G); kept += [g, g.Metric({})]")
        assert run(server, "h = pb_utils.MetricFamily('custom_g', 'd', H)") == taken
        for name in ("custom_t", "custom_t_created", "custom_t_info"):
            assert run(server, f"f = pb_utils.MetricFamily('{name}', 'd', C); kept += [f, f.Metric({{}})]") == "done"
        scrape(server)


def test_more_labels_than_there_may_be(server: Victim) -> None:
    """Their end, and the time that unloading takes: the neighbour is answered all the while."""
    many = """
f = pb_utils.MetricFamily('custom_many', 'd', C)
kept.append(f)
made = 0
try:
    for i in range(12_000):
        kept.append(f.Metric({'n': str(i)}))
        made += 1
finally:
    extra = [f.Metric({'n': '0'}) for _ in range(5_000)]
    kept += extra
"""
    with attacked(server, grown=128 << 20) as neighbour:
        said = run(server, many)
        assert "10000 custom metrics already" in said
        assert len([key for key in scrape(server) if key.startswith("custom_many")]) == 10_000
        reload(server)
        neighbour.assert_served()
        assert not [key for key in scrape(server) if key.startswith("custom_many")]
        assert run(server, "f = pb_utils.MetricFamily('custom_after', 'd', C); kept += [f, f.Metric({})]") == "done"


def test_a_storm_of_updates_is_counted_whole(server: Victim) -> None:
    with attacked(server):
        run(server, "f = pb_utils.MetricFamily('custom_storm', 'd', C); m = f.Metric({}); kept += [f, m]")
        storm = """
import threading
threads = [threading.Thread(target=lambda: [m.increment(1) for _ in range(10_000)]) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
        assert run(server, storm) == "done"
        assert run(server, "assert m.value() == 80_000, m.value()") == "done"


def test_a_process_that_dies_takes_its_metrics_along(server: Victim) -> None:
    with attacked(server):
        run(server, "f = pb_utils.MetricFamily('custom_dead', 'd', C); m = f.Metric({}); m.increment(3)")
        for _ in range(3):
            server.infer("metered", tensor("x", [1], "BYTES", ["import os; os._exit(1)"]))
            server.wait_for(lambda: server.infer("metered", tensor("x", [1], "BYTES", ["1"]))[0] == 200, "it is back")
            scrape(server)
        reload(server)
        assert not [key for key in scrape(server) if key.startswith("custom_dead")]
