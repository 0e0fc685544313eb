"""Trace files: the events of every kind of request, by whichever protocol, as Triton writes them. Knows nothing inside.

What Triton 2.51 wrote for the same requests is in `TRITON`, recorded from trace files of the real server.
"""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from doorstep.testing.onnx_models import save_identity
from doorstep.testing.server import ServerProcess, free_ports

pytestmark = pytest.mark.xdist_group("tracing")

COMPUTE = ["COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END"]
FRONT = ["GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "INFER_RESPONSE_COMPLETE", "GRPC_SEND_START", "GRPC_SEND_END"]
# The names of the events of a request's own trace, in the order of the file.
TRITON = {
    "http": [
        "HTTP_RECV_START", "HTTP_RECV_END", "REQUEST_START", "QUEUE_START", "INFER_RESPONSE_COMPLETE", *COMPUTE,
        "REQUEST_END", "HTTP_SEND_START", "HTTP_SEND_END",
    ],
    "grpc": ["REQUEST_START", "QUEUE_START", *COMPUTE, "REQUEST_END", *FRONT],
    "stream": ["REQUEST_START", "QUEUE_START", *COMPUTE, "REQUEST_END", *FRONT],
    "refused": ["HTTP_RECV_START", "HTTP_RECV_END"],
}  # fmt: skip
VALUES = [1.0, 2.0, 3.0, 4.5]
HOUR_US = 3_600_000_000

FAILING = """
import doorstep

class Model(doorstep.Model):
    def predict(self, x: float) -> float:
        raise RuntimeError("no such luck")
"""

TENSORS = """
input [ { name: "x" data_type: TYPE_FP32 dims: [4] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [4] } ]
"""
CHAIN = (
    'platform: "ensemble" max_batch_size: 8'
    + TENSORS
    + """
ensemble_scheduling { step [
  { model_name: "batched" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "mid" } },
  { model_name: "patiently" model_version: -1 input_map { key: "x" value: "mid" } output_map { key: "y" value: "y" } }
] }"""
)
CALLING = """
import json
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            pb_utils.Logger.log_info("context " + json.dumps(request.trace().get_context()))
            call = pb_utils.InferenceRequest(
                model_name="ident", requested_output_names=["y"], trace=request.trace(),
                inputs=[pb_utils.get_input_tensor_by_name(request, "x")],
            )
            answer = call.exec()
            responses.append(pb_utils.InferenceResponse([pb_utils.get_output_tensor_by_name(answer, "y")]))
        return responses
"""


def save_models(models: Path) -> None:
    save_identity(models / "ident" / "1" / "model.onnx")
    save_identity(models / "batched" / "3" / "model.onnx")
    (models / "batched" / "config.pbtxt").write_text("max_batch_size: 8 dynamic_batching {}")
    save_identity(models / "patient" / "1" / "model.onnx")
    (models / "patient" / "config.pbtxt").write_text(
        f"max_batch_size: 8 dynamic_batching {{ max_queue_delay_microseconds: {HOUR_US} }}"
    )
    save_identity(models / "patiently" / "1" / "model.onnx")
    (models / "patiently" / "config.pbtxt").write_text("max_batch_size: 8")
    (models / "calling" / "1").mkdir(parents=True)
    (models / "calling" / "1" / "model.py").write_text(CALLING)
    (models / "calling" / "config.pbtxt").write_text('backend: "python"' + TENSORS.replace("[4]", "[-1, 4]"))
    ensemble = models / "chain" / "1"
    ensemble.mkdir(parents=True)
    (models / "chain" / "config.pbtxt").write_text(CHAIN)
    (models / "failing" / "1").mkdir(parents=True)
    (models / "failing" / "1" / "model.py").write_text(FAILING)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("traced")
    save_models(found)
    return found


class Traced(ServerProcess):
    """A server that traces every request, each into a file of its own."""

    def __init__(
        self, models: Path, file: Path, *options: str, level: str = "TIMESTAMPS", env: dict[str, str] | None = None
    ) -> None:
        levels = [f"--trace-config=level={one}" for one in level.split("+")]
        super().__init__(
            models, *levels, "--trace-config=rate=1", f"--trace-config=triton,file={file}",
            "--trace-config=triton,log-frequency=1", *options, env=env,
        )  # fmt: skip
        self.file = file
        self.taken = 0

    def next(self) -> list[dict[str, Any]]:
        """The file of the next trace, waited for: it is written behind the answer."""
        path = Path(f"{self.file}.{self.taken}")
        done = threading.Event()
        for _ in range(3000):
            text = path.read_text() if path.exists() else ""
            if text.endswith("]"):
                break
            done.wait(0.01)
        else:
            raise AssertionError(f"{path} was not written; the log:\n{self.logs()}")
        self.taken += 1
        found: list[dict[str, Any]] = json.loads(text)
        return found


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    with Traced(models, tmp_path_factory.mktemp("traces") / "trace.json") as found:
        yield found


def http_infer(server: ServerProcess, model: str, id: str = "", **rest: Any) -> None:
    tensor = triton_http.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([VALUES], np.float32))
    with triton_http.InferenceServerClient(server.http) as client:
        client.infer(model, [tensor], request_id=id, **rest)


def grpc_input() -> Any:
    tensor = triton_grpc.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.array([VALUES], np.float32))
    return tensor


def grpc_infer(server: ServerProcess, model: str, id: str = "", **rest: Any) -> None:
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.infer(model, [grpc_input()], request_id=id, **rest)


def stream_infer(server: ServerProcess, model: str, id: str = "") -> None:
    answers: queue.Queue[Any] = queue.Queue()
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: answers.put(error))
        client.async_stream_infer(model, [grpc_input()], request_id=id)
        assert answers.get(timeout=60) is None
        client.stop_stream()


def refused(server: ServerProcess, model: str, body: Any) -> int:
    """The status of an answer that is an error."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url(f"/v2/models/{model}/infer"), data=data, method="POST")
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(request, timeout=60)
    with found.value as answer:
        return answer.code


def generate(server: ServerProcess, model: str, id: str = "", path: str = "generate") -> None:
    body = json.dumps({"id": id, "x": VALUES}).encode()
    request = urllib.request.Request(server.url(f"/v2/models/{model}/{path}"), data=body, method="POST")
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    assert json.loads(text.removeprefix(b"data: "))["y"] == VALUES


def names(entries: list[dict[str, Any]], id: int | None = None) -> list[str]:
    stamped = [entry for entry in entries if "timestamps" in entry and id in (None, entry["id"])]
    assert all(len(entry["timestamps"]) == 1 for entry in stamped)
    return [entry["timestamps"][0]["name"] for entry in stamped]


def times(entries: list[dict[str, Any]]) -> dict[str, int]:
    return {stamp["name"]: stamp["ns"] for entry in entries for stamp in entry.get("timestamps", ())}


def described(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if "model_name" in entry]


@pytest.mark.parametrize(
    ("way", "infer"), [("http", http_infer), ("grpc", grpc_infer), ("stream", stream_infer)], ids=lambda v: str(v)[:6]
)
@pytest.mark.parametrize(("model", "version"), [("ident", 1), ("batched", 3)])
def test_a_request_is_written_with_tritons_events_in_tritons_order(
    server: Traced, way: str, infer: Any, model: str, version: int
) -> None:
    infer(server, model, f"{way}-1")
    entries = server.next()
    assert names(entries) == TRITON[way]
    [what] = described(entries)
    assert what == {"id": what["id"], "model_name": model, "model_version": version, "request_id": f"{way}-1"}
    assert {entry["id"] for entry in entries} == {what["id"]}
    ns = times(entries)
    in_time = ["REQUEST_START", "QUEUE_START", *COMPUTE, "REQUEST_END"]
    assert [ns[name] for name in in_time] == sorted(ns[name] for name in in_time)
    start, end = ("HTTP_RECV_START", "HTTP_SEND_END") if way == "http" else ("GRPC_WAITREAD_START", "GRPC_SEND_END")
    assert (ns[start], ns[end]) == (min(ns.values()), max(ns.values()))


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_a_generated_answer_is_written_as_any_other_over_http(server: Traced, path: str) -> None:
    generate(server, "batched", "text-1", path)
    entries = server.next()
    assert sorted(names(entries)) == sorted(TRITON["http"])
    [what] = described(entries)
    assert what == {"id": what["id"], "model_name": "batched", "model_version": 3, "request_id": "text-1"}
    ns = times(entries)
    in_time = ["HTTP_RECV_START", "HTTP_RECV_END", "REQUEST_START", "QUEUE_START", *COMPUTE, "REQUEST_END"]
    assert [ns[name] for name in in_time] == sorted(ns[name] for name in in_time)
    assert ns["COMPUTE_END"] <= ns["HTTP_SEND_START"] <= ns["HTTP_SEND_END"] == max(ns.values())


@pytest.mark.parametrize("front", ["sagemaker", "vertex-ai"])
def test_what_comes_by_a_cloud_front_is_written_as_any_other_over_http(
    models: Path, tmp_path: Path, front: str
) -> None:
    (port,) = free_ports(1)
    env = {"SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "ident", "AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/ok"}
    more = (f"--allow-{front}=true", f"--{front}-port={port}", "--vertex-ai-default-model=ident")
    with Traced(models, tmp_path / "trace.json", *more, env=env) as server:
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": VALUES}
        path = "/invocations" if front == "sagemaker" else "/predict"
        body = json.dumps({"id": "cloudy", "inputs": [tensor]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, method="POST")
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["outputs"][0]["data"] == VALUES
        entries = server.next()
    assert names(entries) == TRITON["http"]
    assert described(entries)[0]["request_id"] == "cloudy"


def test_ids_of_traces_differ_and_one_without_a_request_id_does_not_say_one(server: Traced) -> None:
    http_infer(server, "ident")
    http_infer(server, "ident", 'a"b\n')
    first, second = described(server.next())[0], described(server.next())[0]
    assert "request_id" not in first
    assert second["request_id"] == 'a"b\n'
    assert first["id"] != second["id"]


def test_a_request_that_its_model_fails_has_its_whole_trace(server: Traced) -> None:
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "FP64", "data": [1.0]}]}
    assert refused(server, "failing", body) == 500
    assert names(server.next()) == TRITON["http"]
    tensor = triton_grpc.InferInput("x", [1], "FP64")
    tensor.set_data_from_numpy(np.array([1.0]))
    with triton_grpc.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException):
        client.infer("failing", [tensor])
    assert names(server.next()) == TRITON["grpc"]


@pytest.mark.parametrize(
    "body", [b"{", {"inputs": [{"name": "x", "shape": [3], "datatype": "FP32", "data": [1, 2, 3]}]}]
)
def test_a_request_that_is_refused_has_no_more_than_its_arrival(server: Traced, body: Any) -> None:
    assert refused(server, "ident", body) in (400, 500)
    entries = server.next()
    assert names(entries) == TRITON["refused"]
    assert not described(entries)


def test_a_request_that_was_cancelled_is_written_without_an_execution(server: Traced) -> None:
    with triton_grpc.InferenceServerClient(server.grpc) as client, pytest.raises(InferenceServerException):
        client.infer("patient", [grpc_input()], request_id="late", client_timeout=0.2)
    entries = server.next()
    assert described(entries)[0]["request_id"] == "late"
    assert names(entries)[:3] == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
    assert "COMPUTE_START" not in names(entries)


def test_a_request_for_a_model_that_is_not_there_is_not_traced(server: Traced) -> None:
    for infer in (http_infer, grpc_infer):
        with pytest.raises(InferenceServerException):
            infer(server, "nope")
    http_infer(server, "ident", "after")
    assert described(server.next())[0]["request_id"] == "after"


@pytest.mark.parametrize(("way", "infer"), [("http", http_infer), ("grpc", grpc_infer)])
def test_the_steps_of_an_ensemble_are_its_children_and_come_before_it(server: Traced, way: str, infer: Any) -> None:
    infer(server, "chain", "whole")
    entries = server.next()
    second, first, whole = described(entries)
    assert [what["model_name"] for what in (second, first, whole)] == ["patiently", "batched", "chain"]
    assert first["parent_id"] == second["parent_id"] == whole["id"]
    assert "parent_id" not in whole
    assert {what["request_id"] for what in (second, first, whole)} == {"whole"}
    for step in (first, second):
        assert names(entries, step["id"]) == ["REQUEST_START", "QUEUE_START", *COMPUTE, "REQUEST_END"]
    own = [name for name in TRITON[way] if name not in COMPUTE]  # it computes nothing by itself
    assert names(entries, whole["id"]) == own


def test_a_model_that_a_model_calls_is_its_child(server: Traced) -> None:
    http_infer(server, "calling", "outer")
    entries = server.next()
    called, outer = described(entries)
    assert (called["model_name"], called["parent_id"]) == ("ident", outer["id"])
    assert (outer["model_name"], outer["request_id"]) == ("calling", "outer")
    assert "request_id" not in called
    assert names(entries, called["id"]) == ["REQUEST_START", "QUEUE_START", *COMPUTE, "REQUEST_END"]
    assert names(entries, outer["id"]) == TRITON["http"]
    assert "context null" in server.logs()


def test_tensors_are_written_as_triton_writes_them(models: Path, tmp_path: Path) -> None:
    with Traced(models, tmp_path / "t", level="TENSORS") as server:
        http_infer(server, "ident")
        entries = server.next()
    data = {"data": "1,2,3,4.5", "shape": "1,4", "dtype": "FP32"}
    assert [(entry["activity"], entry["tensor"]) for entry in entries] == [
        ("TENSOR_QUEUE_INPUT", {"name": "x", **data}),
        ("TENSOR_BACKEND_OUTPUT", {"name": "y", **data}),
    ]


def test_tensors_stand_between_the_times_where_both_are_wanted(models: Path, tmp_path: Path) -> None:
    with Traced(models, tmp_path / "t", level="TIMESTAMPS+TENSORS") as server:
        grpc_infer(server, "ident")
        entries = server.next()
    order = [
        entry.get("activity") or (entry["timestamps"][0]["name"] if "timestamps" in entry else "") for entry in entries
    ]
    assert order[:6] == [
        "", "REQUEST_START", "QUEUE_START", "TENSOR_QUEUE_INPUT", "TENSOR_BACKEND_OUTPUT", "COMPUTE_START",
    ]  # fmt: skip


def test_one_file_is_whole_at_the_end_and_every_nth_request_is_in_it(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.json"
    options = ("--trace-config=level=TIMESTAMPS", "--trace-config=rate=3", f"--trace-config=triton,file={file}")
    with ServerProcess(models, *options) as server:
        for number in range(10):
            http_infer(server, "ident", str(number))
    entries = json.loads(file.read_text())
    assert [what["request_id"] for what in described(entries)] == ["2", "5", "8"]
    assert names(entries) == TRITON["http"] * 3


def test_a_count_ends_tracing_and_the_file_that_it_fills(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "few.json"
    options = ("level=TIMESTAMPS", "rate=1", "count=2", f"triton,file={file}")
    with ServerProcess(models, *(f"--trace-config={option}" for option in options)) as server:
        for number in range(5):
            http_infer(server, "ident", str(number))
        with urllib.request.urlopen(server.url("/v2/trace/setting"), timeout=60) as answer:
            assert json.load(answer)["trace_count"] == "0"
    assert [what["request_id"] for what in described(json.loads(Path(f"{file}.0").read_text()))] == ["0", "1"]
    assert not file.exists()


def test_files_that_cannot_be_written_hold_up_nobody(models: Path, tmp_path: Path) -> None:
    with Traced(models, tmp_path / "not" / "there" / "t") as server:
        for _ in range(20):
            http_infer(server, "ident")
        assert server.stop() == 0
        assert server.logs().count("failed creating trace file") == 1
