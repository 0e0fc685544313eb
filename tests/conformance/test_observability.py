"""What an operator sees of known traffic: /metrics, statistics and logs, which have to agree. Knows nothing inside."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from doorstep.testing.onnx_models import save_adder, save_identity
from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("observability")

SECONDS = 60
HOUR_US = 3_600_000_000

RAISING = """
import doorstep
from doorstep.errors import InvalidArgument

class Model(doorstep.Model):
    def predict(self, x: int) -> int:
        if x == 1:
            raise RuntimeError("the model is broken")
        if x == 2:
            raise InvalidArgument("the request is broken")
        return x
"""
# Durations that Triton counts, and where V2 statistics have them (core, metric_model_reporter.cc).
DURATIONS = {
    "nv_inference_request_duration_us": "success",
    "nv_inference_queue_duration_us": "queue",
    "nv_inference_compute_input_duration_us": "compute_input",
    "nv_inference_compute_infer_duration_us": "compute_infer",
    "nv_inference_compute_output_duration_us": "compute_output",
}
COUNTERS = (
    "nv_inference_request_success", "nv_inference_request_failure", "nv_inference_count", "nv_inference_exec_count",
    *DURATIONS,
)  # fmt: skip
GAUGES = (
    "nv_inference_pending_request_count", "nv_model_load_duration_secs", "nv_cpu_utilization",
    "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes",
)  # fmt: skip
REASONS = ("REJECTED", "CANCELED", "BACKEND", "OTHER")


def save_models(models: Path) -> None:
    for name in ("counted", "grpc-counted", "logged"):
        save_identity(models / name / "1" / "model.onnx")
    save_identity(models / "impatient" / "1" / "model.onnx")
    (models / "impatient" / "config.pbtxt").write_text(
        f"max_batch_size: 8 dynamic_batching {{ max_queue_delay_microseconds: {HOUR_US}\n"
        "  default_queue_policy { default_timeout_microseconds: 1000 } }"
    )
    save_identity(models / "patient" / "1" / "model.onnx")
    (models / "patient" / "config.pbtxt").write_text(
        f"max_batch_size: 8 dynamic_batching {{ max_queue_delay_microseconds: {HOUR_US} }}"
    )
    (models / "raising" / "1").mkdir(parents=True)
    (models / "raising" / "1" / "model.py").write_text(RAISING)
    save_adder(models / "tagged" / "1" / "model.onnx", 1)
    (models / "tagged" / "config.pbtxt").write_text('metric_tags { key: "team" value: "vision" }')


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("observed")
    save_models(models)
    with ServerProcess(models, "--log-format=json", "--access-log=true") as found:
        yield found


def get(url: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPMessage, bytes]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=SECONDS) as answer:
        return answer.headers, answer.read()


def post(
    server: ServerProcess, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection(server.http, timeout=SECONDS)
    try:
        connection.request("POST", path, json.dumps(body), headers or {})
        answer = connection.getresponse()
        text = answer.read()
        found = {k.lower(): v for k, v in answer.getheaders()}
        if found.get("content-encoding") == "gzip":
            text = gzip.decompress(text)
        return answer.status, found, json.loads(text) if text else None
    finally:
        connection.close()


def rows_of(count: int, id: str = "") -> dict[str, Any]:
    body: dict[str, Any] = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [count, 4], "data": [1.0] * 4 * count}]
    }
    return {**body, "id": id} if id else body


def number(value: int) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1], "data": [value]}]}


def infer_message(model: str, id: str = "") -> Any:
    message = service_pb2.ModelInferRequest(model_name=model, id=id)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.zeros(4, "<f4").tobytes())
    return message


@pytest.fixture(scope="module")
def stub(server: ServerProcess) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


class Scrape:
    """/metrics, as Prometheus reads it."""

    def __init__(self, server: ServerProcess) -> None:
        self.text = get(server.metrics_url)[1].decode()
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}
        self.samples = {
            (sample.name.removesuffix("_total"), tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, tuple(sorted(labels.items()))]

    def of(self, model: str, name: str, **labels: str) -> float:
        return self(name, model=model, version="1", **labels)


def statistics(server: ServerProcess, model: str) -> dict[str, Any]:
    (found,) = json.loads(get(server.url(f"/v2/models/{model}/stats"))[1])["model_stats"]
    statistics: dict[str, Any] = found
    return statistics


def until(condition: Callable[[], bool], what: Callable[[], str] = lambda: "") -> None:
    turn = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        turn.wait(0.01)
    raise AssertionError(what())


def records(server: ServerProcess) -> list[dict[str, Any]]:
    """The log: every line is an object. The last may be on its way."""
    whole, _, _ = server.logs().rpartition("\n")
    return [json.loads(line) for line in whole.split("\n")]


def access(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    """The access line with these fields, of which there is one. Waits for it."""
    found: list[dict[str, Any]] = []

    def there() -> bool:
        found[:] = [r for r in records(server) if r["logger"] == "doorstep.access" and fields.items() <= r.items()]
        return bool(found)

    until(there, lambda: f"no access line with {fields} in\n{server.logs()[-4000:]}")
    assert len(found) == 1, found
    return found[0]


# Metrics


def test_metrics_are_what_the_client_did_and_equal_the_statistics(server: ServerProcess) -> None:
    for rows in (1, 1, 1, 1, 1, 2, 2, 4):
        assert post(server, "/v2/models/counted/infer", rows_of(rows))[0] == 200
    scrape, stats = Scrape(server), statistics(server, "counted")
    assert scrape.of("counted", "nv_inference_request_success") == 8
    assert scrape.of("counted", "nv_inference_count") == 13 == stats["inference_count"]
    assert scrape.of("counted", "nv_inference_exec_count") == 8 == stats["execution_count"]
    assert [scrape.of("counted", "nv_inference_request_failure", reason=reason) for reason in REASONS] == [0, 0, 0, 0]
    for name, key in DURATIONS.items():
        counted = stats["inference_stats"][key]
        assert counted["count"] == 8
        assert scrape.of("counted", name) == counted["ns"] // 1000, name
    assert {b["batch_size"]: b["compute_infer"]["count"] for b in stats["batch_stats"]} == {1: 5, 2: 2, 4: 1}
    assert scrape.of("counted", "nv_inference_pending_request_count") == 0
    assert scrape.of("counted", "doorstep_inflight_requests") == 0
    assert stats["last_inference"] > 1_700_000_000_000, "milliseconds since 1970"


def test_metrics_of_grpc_requests_are_the_same_numbers(server: ServerProcess, stub: Any) -> None:
    for _ in range(3):
        stub.ModelInfer(infer_message("grpc-counted"), timeout=SECONDS)
    list(stub.ModelStreamInfer(iter([infer_message("grpc-counted"), infer_message("grpc-counted")]), timeout=SECONDS))
    scrape = Scrape(server)
    (stats,) = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name="grpc-counted")).model_stats
    assert scrape.of("grpc-counted", "nv_inference_request_success") == 5 == stats.inference_stats.success.count
    assert scrape.of("grpc-counted", "nv_inference_count") == 5 == stats.inference_count
    assert scrape.of("grpc-counted", "nv_inference_exec_count") == stats.execution_count
    assert scrape.of("grpc-counted", "nv_inference_request_duration_us") == stats.inference_stats.success.ns // 1000


def test_histograms_count_every_request_once(server: ServerProcess) -> None:
    before = Scrape(server)
    for rows in (1, 3, 4):
        assert post(server, "/v2/models/logged/infer", rows_of(rows))[0] == 200
    after = Scrape(server)

    def grown(name: str, **labels: str) -> float:
        return after.of("logged", name, **labels) - before.of("logged", name, **labels)

    for family in ("request", "queue", "compute"):
        name = f"doorstep_{family}_duration_seconds"
        assert grown(f"{name}_count") == 3 == grown(f"{name}_bucket", le="+Inf")
        assert grown(f"{name}_bucket", le="30") == 3
        buckets = [
            v for (n, labels), v in after.samples.items() if n == f"{name}_bucket" and ("model", "logged") in labels
        ]
        assert buckets == sorted(buckets), "cumulative"
    assert [grown("doorstep_batch_size_bucket", le=le) for le in ("1", "2", "4", "+Inf")] == [1, 1, 3, 3]
    assert grown("doorstep_batch_size_sum") == 8
    seconds = after.of("logged", "doorstep_request_duration_seconds_sum")
    assert int(seconds * 1e6) == pytest.approx(after.of("logged", "nv_inference_request_duration_us"), abs=1)


def test_tritons_names_are_there_with_tritons_types_and_labels(server: ServerProcess) -> None:
    scrape = Scrape(server)
    for name in COUNTERS:
        assert f"# TYPE {name} counter\n" in scrape.text
        assert f"\n{name}{{model=" in scrape.text
    for name in GAUGES:
        assert f"# TYPE {name} gauge\n" in scrape.text
    assert {s.labels["model"] for s in scrape.families["nv_inference_count"].samples} == {
        "counted", "grpc-counted", "logged", "impatient", "patient", "raising", "tagged",
    }  # fmt: skip
    assert {frozenset(s.labels) for s in scrape.families["nv_inference_request_failure"].samples} == {
        frozenset({"model", "version", "reason"}),
        frozenset({"model", "version", "reason", "_team"}),
    }
    assert scrape("nv_inference_count", model="tagged", version="1", _team="vision") == 0
    assert scrape.of("counted", "nv_model_load_duration_secs") > 0
    assert scrape("nv_cpu_memory_total_bytes") >= scrape("nv_cpu_memory_used_bytes") > 0


def test_our_own_names_are_there(server: ServerProcess) -> None:
    scrape = Scrape(server)
    assert scrape.of("counted", "doorstep_model_state", state="READY") == 1
    assert scrape.of("counted", "doorstep_model_state", state="LOADING") == 0
    assert scrape.of("counted", "doorstep_saturation_ratio") == 0
    assert scrape.of("counted", "doorstep_queue_depth") == 0
    assert scrape.of("raising", "doorstep_worker_restarts") == 0
    (build,) = scrape.families["doorstep_build_info"].samples
    assert build.value == 1
    assert build.labels["version"] == json.loads(get(server.url("/v2"))[1])["version"]


def failures(server: ServerProcess, model: str) -> dict[str, int]:
    scrape = Scrape(server)
    found = {reason: int(scrape.of(model, "nv_inference_request_failure", reason=reason)) for reason in REASONS}
    return {reason: count for reason, count in found.items() if count}


def test_a_request_that_waited_too_long_is_rejected(server: ServerProcess) -> None:
    status, _, document = post(server, "/v2/models/impatient/infer", rows_of(1))
    assert (status, document["error"]) == (503, "Request timeout expired")
    assert failures(server, "impatient") == {"REJECTED": 1}
    assert statistics(server, "impatient")["inference_stats"]["fail"]["count"] == 1
    assert statistics(server, "impatient")["inference_stats"]["success"]["count"] == 0


def test_a_request_whose_client_left_is_canceled(server: ServerProcess) -> None:
    body = json.dumps(rows_of(1)).encode()
    head = f"POST /v2/models/patient/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.http_port), SECONDS) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: Scrape(server).of("patient", "nv_inference_pending_request_count") == 1)
        assert Scrape(server).of("patient", "doorstep_inflight_requests") == 1
    until(lambda: failures(server, "patient") == {"CANCELED": 1})
    assert statistics(server, "patient")["inference_stats"]["fail"]["count"] == 1
    assert Scrape(server).of("patient", "nv_inference_pending_request_count") == 0


def test_errors_of_the_model_and_of_the_request_are_told_apart(server: ServerProcess) -> None:
    before = failures(server, "raising")
    assert [post(server, "/v2/models/raising/infer", number(x))[0] for x in (0, 1, 1, 2)] == [200, 500, 500, 400]
    after = failures(server, "raising")
    assert {reason: after[reason] - before.get(reason, 0) for reason in after} == {"BACKEND": 2, "OTHER": 1}
    stats = statistics(server, "raising")["inference_stats"]
    assert (stats["success"]["count"], stats["fail"]["count"]) == (1, sum(after.values()))
    assert Scrape(server).of("raising", "nv_inference_request_success") == 1


def test_requests_that_never_reach_a_queue_are_not_the_models_failures(server: ServerProcess) -> None:
    """As in Triton: what validation refuses is counted nowhere."""
    before = statistics(server, "tagged")["inference_stats"]
    assert post(server, "/v2/models/tagged/infer", number(1))[0] == 400
    assert statistics(server, "tagged")["inference_stats"] == before


# Request ids


def test_http_answers_carry_the_callers_request_id(server: ServerProcess) -> None:
    ours = {"x-request-id": "trace-7/ü".encode().decode("latin-1")}
    assert "x-request-id" not in post(server, "/v2/models/logged/infer", rows_of(1), ours)[1], "no visible ASCII"
    ours = {"X-Request-Id": "trace-7"}
    for path, body, status in (
        ("/v2/models/logged/infer", rows_of(1), 200),
        ("/v2/models/logged/infer", {"inputs": []}, 400),
        ("/v2/models/nowhere/infer", rows_of(1), 404),
        ("/v2/repository/index", {}, 200),
    ):
        found, headers, _ = post(server, path, body, ours)
        assert (found, headers.get("x-request-id")) == (status, "trace-7"), path
    for path in ("/v2", "/v2/health/ready", "/v2/models/logged", "/v2/models/logged/ready", "/v2/models/stats"):
        assert get(server.url(path), ours)[0]["x-request-id"] == "trace-7", path
    _, headers, _ = post(server, "/v2/models/logged/infer", rows_of(1), {**ours, "accept-encoding": "gzip"})
    assert (headers["content-encoding"], headers["x-request-id"]) == ("gzip", "trace-7")
    assert "x-request-id" not in post(server, "/v2/models/logged/infer", rows_of(1))[1]


def test_grpc_answers_carry_the_callers_request_id(server: ServerProcess, stub: Any) -> None:
    ours = (("x-request-id", "trace-8"),)
    for rpc, message in (
        (stub.ModelInfer, infer_message("logged")),
        (stub.ServerMetadata, service_pb2.ServerMetadataRequest()),
        (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
    ):
        _, call = rpc.with_call(message, metadata=ours, timeout=SECONDS)
        assert dict(call.initial_metadata())["x-request-id"] == "trace-8"
    _, call = stub.ModelInfer.with_call(infer_message("logged"), timeout=SECONDS)
    assert "x-request-id" not in dict(call.initial_metadata())
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(infer_message("nowhere"), metadata=ours, timeout=SECONDS)
    told = dict([*(caught.value.initial_metadata() or ()), *(caught.value.trailing_metadata() or ())])
    assert told["x-request-id"] == "trace-8"
    stream = stub.ModelStreamInfer(iter([infer_message("logged")]), metadata=ours, timeout=SECONDS)
    assert dict(stream.initial_metadata())["x-request-id"] == "trace-8"
    list(stream)


# The log


def test_an_http_request_is_one_access_line_with_its_id(server: ServerProcess) -> None:
    body = rows_of(2, id="my-id-1")
    _, headers, _ = post(server, "/v2/models/logged/versions/1/infer", body, {"x-request-id": "not-this-one"})
    line = access(server, request_id="my-id-1")
    assert line["method"] == "POST"
    assert line["path"] == "/v2/models/logged/versions/1/infer"
    assert (line["status"], line["http_version"], line["model"], line["version"]) == (200, "1.1", "logged", "1")
    assert (line["bytes_in"], line["bytes_out"]) == (len(json.dumps(body)), int(headers["content-length"]))
    assert line["peer"].startswith("127.0.0.1:")
    assert 0 < line["duration_ms"] < SECONDS * 1000
    assert (line["level"], "grpc_status" in line) == ("info", False)


def test_a_refused_request_is_logged_with_its_id_too(server: ServerProcess) -> None:
    post(server, "/v2/models/logged/infer", {"id": "my-id-2", "inputs": []})
    assert access(server, request_id="my-id-2")["status"] == 400
    post(server, "/v2/models/nowhere/infer", {}, {"x-request-id": "my-id-3"})
    line = access(server, request_id="my-id-3")
    assert (line["status"], line["model"]) == (404, "nowhere")


def test_a_grpc_request_is_one_access_line_with_its_id(server: ServerProcess, stub: Any) -> None:
    stub.ModelInfer(infer_message("logged", id="my-id-4"), timeout=SECONDS)
    line = access(server, request_id="my-id-4")
    assert (line["path"], line["http_version"]) == ("/inference.GRPCInferenceService/ModelInfer", "2")
    assert (line["status"], line["grpc_status"], line["model"]) == (200, 0, "logged")
    message = infer_message("logged", id="my-id-5")
    message.inputs[0].datatype = "INT8"
    with pytest.raises(grpc.RpcError):
        stub.ModelInfer(message, timeout=SECONDS)
    line = access(server, request_id="my-id-5")
    assert line["grpc_status"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]


def test_a_stream_is_one_access_line(server: ServerProcess, stub: Any) -> None:
    list(stub.ModelStreamInfer(iter([infer_message("logged")] * 2), metadata=(("x-request-id", "my-id-6"),)))
    line = access(server, request_id="my-id-6")
    assert (line["path"], line["grpc_status"]) == ("/inference.GRPCInferenceService/ModelStreamInfer", 0)


def test_every_line_of_the_json_log_is_an_object_with_the_same_keys(server: ServerProcess) -> None:
    assert post(server, "/v2/models/raising/infer", number(1))[0] == 500
    until(lambda: "RuntimeError: the model is broken" in server.logs(), server.logs)
    lines = records(server)
    for line in lines:
        assert {"ts", "level", "logger", "message"} <= line.keys()
        assert line["level"] in ("verbose", "info", "warning", "error")
    messages = [line["message"] for line in lines]
    assert any(message.startswith("successfully loaded 'counted' version 1") for message in messages)
    broken = next(line for line in lines if "the model is broken" in json.dumps(line))
    assert broken["level"] == "error"
    assert "RuntimeError: the model is broken" in broken["exception"]


FORGED = (
    'x\n2026-01-01 00:00:00.000 INFO forged\r\n{"ts":"now","level":"info","logger":"l","message":"forged"}'
    "\x1b[31m\u2028"
)


@pytest.mark.parametrize("format", ["text", "json", "default", "ISO8601"])
def test_nothing_a_client_sends_can_begin_a_line_of_the_log(tmp_path: Path, format: str) -> None:
    save_identity(tmp_path / "logged" / "1" / "model.onnx")
    with ServerProcess(tmp_path, f"--log-format={format}", "--access-log=true") as server:
        assert post(server, "/v2/models/logged/infer", rows_of(1, id=FORGED))[0] == 200
        assert post(server, "/v2/models/%0Aforged%0D/infer", rows_of(1))[0] == 404
        assert post(server, "/v2/repository/models/%0Aforged%1B/load", {})[0] >= 400
        with grpc.insecure_channel(server.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            stub.ModelInfer(infer_message("logged", id=FORGED), timeout=SECONDS)
        assert server.stop() == 0
        text = server.logs()
    assert "forged" in text
    assert "\x1b" not in text
    assert "\u2028" not in text
    assert not [line for line in text.splitlines() if line.startswith(("2026-01-01", "forged", '{"ts":"now"'))]
    assert len([line for line in text.splitlines() if "POST" in line]) == 4, "one line for each request"
