"""--metrics-config, metrics of models' own, and a log that changes while the server runs: on a real server."""

from __future__ import annotations

import math
import queue
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from doorstep.testing.onnx_models import save_identity
from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("detailed_metrics")

TENSORS = (
    "input [ { name: 'x' data_type: TYPE_FP32 dims: [4] } ] output [ { name: 'y' data_type: TYPE_FP32 dims: [4] } ]"
)
STREAMING = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            for _ in range(3):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
COUNTING = """
import os
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.counters = pb_utils.MetricFamily("rows_seen", "Rows this model saw", pb_utils.MetricFamily.COUNTER)
        self.counter = self.counters.Metric({"stage": "first"})
        self.sizes = pb_utils.MetricFamily("row_sum", "Sums of rows", pb_utils.MetricFamily.HISTOGRAM)
        self.size = self.sizes.Metric({}, [1, 10])

    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if x[0] == -1:
                os._exit(1)
            self.counter.increment(1)
            self.size.observe(float(x.sum()))
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]))
        return answers
"""
SUMMARIES = ("request", "queue", "compute_input", "compute_infer", "compute_output")


def save_python(folder: Path, code: str, config: str) -> None:
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(code)
    (folder / "config.pbtxt").write_text(f'backend: "python" {TENSORS} {config}')


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("detailed")
    save_identity(found / "ident" / "1" / "model.onnx")
    decoupled = "model_transaction_policy { decoupled: true }"
    save_python(found / "streaming", STREAMING, decoupled)
    buckets = (
        "model_metrics { metric_control { metric_identifier { family: 'nv_inference_first_response_histogram_ms' } "
        "histogram_options { buckets: [7, 60000] } } }"
    )
    save_python(found / "bucketed", STREAMING, f"{decoupled} {buckets}")
    save_python(found / "counting", COUNTING, "")
    return found


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    options = (
        "summary_latencies=true", "summary_quantiles=0.5:0.05,0.75:0.01", "histogram_latencies=true",
        "counter_latencies=false",
    )  # fmt: skip
    control = ("--model-control-mode=explicit", "--load-model=*", "--log-format=default")
    with ServerProcess(models, *(f"--metrics-config={option}" for option in options), *control) as found:
        yield found


def infer(server: ServerProcess, model: str, first: float = 1.0) -> None:
    shape = [1, 4] if model == "ident" else [4]
    tensor = triton_http.InferInput("x", shape, "FP32")
    tensor.set_data_from_numpy(np.full(shape, first, np.float32))
    with triton_http.InferenceServerClient(server.http) as client:
        client.infer(model, [tensor])


def stream(server: ServerProcess, model: str) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    tensor = triton_grpc.InferInput("x", [4], "FP32")
    tensor.set_data_from_numpy(np.zeros(4, np.float32))
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer(model, [tensor], enable_empty_final_response=True)
        assert [answers.get(timeout=60) for _ in range(4)] == [None] * 4
        client.stop_stream()


def scrape(server: ServerProcess) -> tuple[dict[tuple[str, tuple[tuple[str, str], ...]], float], dict[str, str]]:
    """(samples, types)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    # The parser adds to a counter's name what OpenMetrics wants there.
    samples = {
        (s.name.removesuffix("_total"), tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples
    }
    return samples, {f.name: f.type for f in families}


def of(model: str, **labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model": model, "version": "1", **labels}.items()))


def test_summaries_have_the_quantiles_that_were_asked_for(server: ServerProcess) -> None:
    for _ in range(5):
        infer(server, "ident")
    found, types = scrape(server)
    for part in SUMMARIES:
        name = f"nv_inference_{part}_summary_us"
        assert types[name] == "summary"
        assert found[f"{name}_count", of("ident")] == 5
        median, upper = (found[name, of("ident", quantile=q)] for q in ("0.5", "0.75"))
        assert 0 <= median <= upper
        assert found[f"{name}_sum", of("ident")] >= upper
        assert (name, of("ident", quantile="0.9")) not in found
    assert found["nv_inference_request_summary_us", of("ident", quantile="0.5")] > 0
    assert math.isnan(found["nv_inference_request_summary_us", of("counting", quantile="0.5")])


def test_counters_of_latencies_can_be_left_out_and_those_of_requests_stay(server: ServerProcess) -> None:
    found, _ = scrape(server)
    assert not any(name.endswith("_duration_us") for name, _ in found)
    assert ("nv_inference_request_success", of("ident")) in found
    assert ("nv_inference_exec_count", of("ident")) in found


def test_first_responses_of_decoupled_models_fill_a_histogram_once_per_request(server: ServerProcess) -> None:
    name = "nv_inference_first_response_histogram_ms"
    for _ in range(2):
        stream(server, "streaming")
        stream(server, "bucketed")
    found, types = scrape(server)
    assert types[name] == "histogram"
    bounds = {model: [dict(labels)["le"] for n, labels in found if n == f"{name}_bucket" and ("model", model) in labels]
              for model in ("streaming", "bucketed", "ident")}  # fmt: skip
    assert bounds == {
        "streaming": ["100", "500", "2000", "5000", "+Inf"],
        "bucketed": ["7", "60000", "+Inf"],
        "ident": [],
    }
    for model in ("streaming", "bucketed"):
        assert found[f"{name}_count", of(model)] == 2
        assert found[f"{name}_bucket", of(model, le="+Inf")] == 2
        assert found[f"{name}_sum", of(model)] > 0


def test_a_models_own_metrics_outlive_its_process_and_go_with_the_model(server: ServerProcess) -> None:
    for first in (0.0, 1.0, 5.0):
        infer(server, "counting", first)
    rows = ("rows_seen", (("stage", "first"),))
    found, types = scrape(server)
    assert found[rows] == 3
    assert (types["rows_seen"], types["row_sum"]) == ("counter", "histogram")
    assert [found["row_sum_bucket", (("le", bound),)] for bound in ("1", "10", "+Inf")] == [1, 2, 3]
    assert found["row_sum_sum", ()] == 24
    with pytest.raises(InferenceServerException):
        infer(server, "counting", -1.0)
    until(lambda: _answers(server))
    assert scrape(server)[0][rows] == 4
    with triton_http.InferenceServerClient(server.http) as client:
        client.unload_model("counting")
        until(lambda: rows not in scrape(server)[0])
        client.load_model("counting")
    infer(server, "counting")
    assert scrape(server)[0][rows] == 1


def _answers(server: ServerProcess) -> bool:
    try:
        infer(server, "counting")
    except InferenceServerException:
        return False
    return True


def until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        urllib.request.urlopen(f"http://127.0.0.1:{SLOWLY[0]}/v2/health/live", timeout=60).close()
    raise AssertionError("it did not come to that")


SLOWLY: list[int] = []


@pytest.fixture(autouse=True)
def pace(server: ServerProcess) -> None:
    SLOWLY[:] = [server.http_port]


def test_the_format_of_the_log_and_what_is_in_it_change_at_once(server: ServerProcess) -> None:
    with triton_http.InferenceServerClient(server.http) as client:

        def lines(**settings: Any) -> list[str]:
            client.update_log_settings(settings)
            before = len(server.logs())
            client.unload_model("ident")
            client.load_model("ident")
            client.update_log_settings({"log_info": True})
            client.unload_model("streaming")
            client.load_model("streaming")
            until(lambda: "loading: streaming:1" in server.logs()[before:])
            return [line for line in server.logs()[before:].splitlines() if "ident" in line]

        assert any(re.match(r"I\d{4} \d\d:\d\d:\d\d\.\d{6} \d+ \w+\.py:\d+\] \"", line) for line in lines())
        found = lines(log_format="ISO8601")
        assert found
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ I \d+ \w+\.py:\d+\] \"", line) for line in found)
        assert lines(log_format="default", log_info=False) == []
        verbose = lines(log_info=True, log_verbose_level=1)
        assert any(line.startswith("V") for line in verbose)
        assert not any(line.startswith("V") for line in lines(log_verbose_level=0))


def test_nothing_more_is_counted_where_nothing_more_is_asked_for(models: Path) -> None:
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=ident") as server:
        infer(server, "ident")
        found, _ = scrape(server)
    assert not any("summary" in name or "first_response" in name for name, _ in found)
    assert found["nv_inference_request_duration_us", of("ident")] > 0
