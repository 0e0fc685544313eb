"""OpenTelemetry: what reaches a collector over OTLP/HTTP, and that no collector can harm the server."""

from __future__ import annotations

import base64
import http.server
import json
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from doorstep.testing.onnx_models import save_identity
from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("tracing")

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"
COMPUTE = ["COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END"]

CALLING = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            print("context", request.trace().get_context(), flush=True)
            call = pb_utils.InferenceRequest(
                model_name="ident", requested_output_names=["y"], trace=request.trace(),
                inputs=[pb_utils.get_input_tensor_by_name(request, "x")],
            )
            answer = call.exec()
            responses.append(pb_utils.InferenceResponse([pb_utils.get_output_tensor_by_name(answer, "y")]))
        return responses
"""

CHAIN = """
platform: "ensemble"
input { name: "x" data_type: TYPE_FP32 dims: [-1, 4] }
output { name: "y" data_type: TYPE_FP32 dims: [-1, 4] }
ensemble_scheduling {
  step { model_name: "ident" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "mid" } }
  step {
    model_name: "calling" model_version: -1 input_map { key: "x" value: "mid" } output_map { key: "y" value: "y" }
  }
}
"""


class Collector(http.server.ThreadingHTTPServer):
    """Takes OTLP, as a collector does, and keeps it by request. `status` is what it answers."""

    daemon_threads = True

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.requests: queue.Queue[ExportTraceServiceRequest] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1/traces"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def spans(self, count: int) -> list[Any]:
        """The next `count` spans, of however many requests."""
        found: list[Any] = []
        while len(found) < count:
            request = self.requests.get(timeout=60)
            found += [span for r in request.resource_spans for scope in r.scope_spans for span in scope.spans]
        assert len(found) == count
        return found


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.path == "/v1/traces"
        assert self.headers["content-type"] == "application/json"
        self.server.requests.put(parse(body))
        self.send_response(self.server.status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


def parse(body: bytes) -> ExportTraceServiceRequest:
    """OTLP's JSON is protobuf's, but for ids, which are hexadecimal (opentelemetry-proto, docs/specification.md)."""

    def ids(found: dict[str, Any]) -> dict[str, Any]:
        for name in ("traceId", "spanId", "parentSpanId"):
            if name in found:
                found[name] = base64.b64encode(bytes.fromhex(found[name])).decode()
        return found

    return json_format.ParseDict(json.loads(body, object_hook=ids), ExportTraceServiceRequest())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("spanned")
    save_identity(found / "ident" / "7" / "model.onnx")
    (found / "calling" / "1").mkdir(parents=True)
    (found / "calling" / "1" / "model.py").write_text(CALLING)
    (found / "calling" / "config.pbtxt").write_text(
        'backend: "python" input [ { name: "x" data_type: TYPE_FP32 dims: [-1, 4] } ]'
        ' output [ { name: "y" data_type: TYPE_FP32 dims: [-1, 4] } ]'
    )
    (found / "chain" / "2").mkdir(parents=True)
    (found / "chain" / "config.pbtxt").write_text(CHAIN)
    return found


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as found:
        yield found


def options(url: str, *more: str) -> list[str]:
    settings = ["level=TIMESTAMPS", "rate=1", "mode=opentelemetry", f"opentelemetry,url={url}", *more]
    return [f"--trace-config={setting}" for setting in settings]


QUICK = "opentelemetry,bsp_schedule_delay=50"


def http_infer(server: ServerProcess, id: str = "", model: str = "ident", **headers: str) -> None:
    tensor = triton_http.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros([1, 4], np.float32))
    with triton_http.InferenceServerClient(server.http) as client:
        client.infer(model, [tensor], request_id=id, headers=headers)


def grpc_infer(server: ServerProcess, id: str = "", model: str = "ident", **headers: str) -> None:
    tensor = triton_grpc.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros([1, 4], np.float32))
    with triton_grpc.InferenceServerClient(server.grpc) as client:
        client.infer(model, [tensor], request_id=id, headers=headers)


def events(span: Any) -> list[str]:
    return [event.name for event in span.events]


def attributes(found: Any) -> dict[str, Any]:
    return {a.key: a.value.string_value or a.value.int_value for a in found.attributes}


@pytest.mark.parametrize(("infer", "front"), [(http_infer, "HTTP_RECV_START"), (grpc_infer, "GRPC_WAITREAD_START")])
def test_a_request_is_three_spans_one_in_the_other(models: Path, collector: Collector, infer: Any, front: str) -> None:
    with ServerProcess(models, *options(collector.url, QUICK)) as server:
        infer(server, "my-id")
        root, model, compute = collector.spans(3)
    assert (root.name, model.name, compute.name) == ("InferRequest", "ident", "compute")
    assert len({span.trace_id for span in (root, model, compute)}) == 1
    assert (root.parent_span_id, model.parent_span_id, compute.parent_span_id) == (b"", root.span_id, model.span_id)
    assert events(root)[0] == front
    assert events(root)[-1] == front.split("_")[0] + "_SEND_END"
    assert events(model) == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]
    assert events(compute) == COMPUTE
    assert attributes(model) == {
        "triton.model_name": "ident", "triton.model_version": 7, "triton.trace_id": 1, "triton.trace_parent_id": 0,
        "triton.request_id": "my-id",
    }  # fmt: skip
    for outer, inner in ((root, model), (model, compute)):
        assert outer.start_time_unix_nano <= inner.start_time_unix_nano
        assert inner.end_time_unix_nano <= outer.end_time_unix_nano
        assert inner.start_time_unix_nano <= inner.end_time_unix_nano
    assert root.kind == model.kind == compute.kind == 2  # SPAN_KIND_SERVER


@pytest.mark.parametrize("infer", [http_infer, grpc_infer])
def test_whoever_sends_a_trace_context_is_traced_in_it_whatever_the_rate(
    models: Path, collector: Collector, infer: Any
) -> None:
    with ServerProcess(models, *options(collector.url, QUICK, "rate=0")) as server:
        infer(server, "untraced")
        infer(server, "no context", traceparent="00-nonsense-01")
        infer(server, "traced", traceparent=TRACEPARENT, tracestate="vendor=1")
        root, model, _ = collector.spans(3)
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE_ID, SPAN_ID)
    assert root.trace_state == "vendor=1"
    assert attributes(model)["triton.request_id"] == "traced"
    assert collector.requests.empty()


def test_the_context_goes_on_through_a_model_that_calls_another(models: Path, collector: Collector) -> None:
    with ServerProcess(models, *options(collector.url, QUICK, "rate=0")) as server:
        http_infer(server, "outer", "calling", traceparent=TRACEPARENT, tracestate="vendor=1")
        spans = collector.spans(5)
        [line] = [line for line in server.logs().splitlines() if "context {" in line]
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    by_name = {span.name: span for span in spans if span.name != "compute"}
    calling, called = by_name["calling"], by_name["ident"]
    assert called.parent_span_id == calling.span_id
    assert calling.parent_span_id == by_name["InferRequest"].span_id
    assert attributes(called)["triton.trace_parent_id"] == attributes(calling)["triton.trace_id"]
    assert json.loads(line[line.index("{") :]) == {
        "traceparent": f"00-{TRACE_ID}-{calling.span_id.hex()}-01",
        "tracestate": "vendor=1",
    }


@pytest.mark.parametrize("infer", [http_infer, grpc_infer])
def test_steps_of_an_ensemble_are_spans_in_its_span(models: Path, collector: Collector, infer: Any) -> None:
    with ServerProcess(models, *options(collector.url, QUICK, "rate=0")) as server:
        infer(server, "whole", "chain", traceparent=TRACEPARENT, tracestate="vendor=1")
        spans = collector.spans(8)
    assert {span.trace_id.hex() for span in spans} == {TRACE_ID}
    by_id = {span.span_id: span for span in spans}

    def path(span: Any) -> str:
        above = by_id.get(span.parent_span_id)
        return span.name if above is None else f"{path(above)}/{span.name}"

    assert sorted(map(path, spans)) == sorted(
        [
            "InferRequest",
            "InferRequest/chain",
            "InferRequest/chain/ident",
            "InferRequest/chain/ident/compute",
            "InferRequest/chain/calling",
            "InferRequest/chain/calling/compute",
            "InferRequest/chain/calling/ident",
            "InferRequest/chain/calling/ident/compute",
        ]
    )
    [root] = [span for span in spans if span.name == "InferRequest"]
    assert root.parent_span_id.hex() == SPAN_ID
    for span in spans:
        if span is not root:
            above = by_id[span.parent_span_id]
            assert above.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= above.end_time_unix_nano
    whole, step = (next(s for s in spans if path(s).endswith(end)) for end in ("/chain", "/chain/ident"))
    assert attributes(whole)["triton.request_id"] == "whole"
    assert attributes(step)["triton.trace_parent_id"] == attributes(whole)["triton.trace_id"]


def test_the_resource_says_which_service_it_is(models: Path, collector: Collector) -> None:
    with ServerProcess(models, *options(collector.url, QUICK)) as server:
        http_infer(server)
        resource = collector.requests.get(timeout=60).resource_spans[0].resource
    assert attributes(resource)["service.name"] == "triton-inference-server"
    more = ("opentelemetry,resource=service.name=mine", "opentelemetry,resource=zone=a=b")
    with ServerProcess(models, *options(collector.url, QUICK, *more)) as server:
        http_infer(server)
        found = collector.requests.get(timeout=60).resource_spans[0]
    assert attributes(found.resource)["service.name"] == "mine"
    assert attributes(found.resource)["zone"] == "a=b"
    assert found.scope_spans[0].scope.name == "triton-server"


def test_what_waits_is_sent_in_batches_before_the_server_ends(models: Path, collector: Collector) -> None:
    slow = ("opentelemetry,bsp_schedule_delay=3600000", "opentelemetry,bsp_max_export_batch_size=10")
    with ServerProcess(models, *options(collector.url, *slow)) as server:
        for _ in range(7):
            http_infer(server)
    sizes = [len(r.resource_spans[0].scope_spans[0].spans) for r in list(collector.requests.queue)]
    assert sum(sizes) == 21
    assert max(sizes) <= 10


def test_settings_say_where_spans_go_and_can_be_changed(models: Path, collector: Collector) -> None:
    with ServerProcess(models, *options(collector.url, QUICK)) as server:
        with triton_http.InferenceServerClient(server.http) as client:
            found = client.get_trace_settings()
            changed = client.update_trace_settings(settings={"trace_level": ["OFF"]})
        http_infer(server)
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
        http_infer(server, "second")
        _, model, _ = collector.spans(3)
    assert found == {
        "trace_level": ["TIMESTAMPS"], "trace_rate": "1", "trace_count": "-1", "trace_mode": "opentelemetry",
        "url": collector.url, "bsp_schedule_delay": "50", "bsp_max_queue_size": "2048",
        "bsp_max_export_batch_size": "512",
    }  # fmt: skip
    assert changed["trace_level"] == ["OFF"]
    assert attributes(model)["triton.request_id"] == "second"


def test_a_collector_that_is_not_there_harms_nothing(models: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1/traces"
        with ServerProcess(models, *options(url, QUICK)) as server:
            for _ in range(50):
                http_infer(server)
            assert server.stop() == 0
            assert "cannot be reached" in server.logs()


def test_a_collector_that_refuses_is_reported(models: Path) -> None:
    with Collector(status=503) as collector, ServerProcess(models, *options(collector.url, QUICK)) as server:
        http_infer(server)
        collector.spans(3)
        assert server.stop() == 0
        assert "answers 503" in server.logs()


def test_a_collector_that_never_answers_holds_up_nobody_and_memory_stays_bounded(models: Path) -> None:
    small = ("opentelemetry,bsp_max_queue_size=30", "opentelemetry,bsp_max_export_batch_size=3", QUICK)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with ServerProcess(models, *options(url, *small), "--exit-timeout-secs=2") as server:
            for _ in range(200):
                http_infer(server)
            assert server.stop() == 0
            assert "did not end in time: the writing of traces" in server.logs()
