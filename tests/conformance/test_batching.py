"""Batching, queues and cancellation as a client sees them. Knows nothing of the scheduler's insides.

The models stop in every batch until the test lets them go on, so what is queued when is the test's choice and not the
machine's. What a model was given it tells over a pipe.
"""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2, service_pb2_grpc

from doorstep.testing.onnx_models import save_identity, save_model
from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("batching")

SECONDS = 60  # nothing here takes as long; a test that waits longer has failed
FULL = "[request id: <id_unknown>] Exceeds maximum queue size"  # as Triton 2.51 says it
NEVER_US = 3_600_000_000  # a queue delay no test lives to see the end of

GATED = """
import json, os
import doorstep
import numpy as np
import numpy.typing as npt

class Model(doorstep.Model):
    max_batch_size = 8

    def load(self):
        folder = self.context.model_directory
        for pipe in ("seen", f"gate.{self.context.instance}"):
            if not os.path.exists(folder / pipe):
                try:
                    os.mkfifo(folder / pipe)
                except FileExistsError:
                    pass
        self.seen = os.open(folder / "seen", os.O_RDWR)
        self.gate = os.open(folder / f"gate.{self.context.instance}", os.O_RDWR)

    def predict(self, x: npt.NDArray[np.int32], b: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.int32]:
        batch = {"instance": self.context.instance, "x": x.tolist(), "b": None if b is None else b.tolist()}
        os.write(self.seen, json.dumps(batch).encode() + b"\\n")
        os.read(self.gate, 1)
        return x * 10 if b is None else x * 10 + b
"""

# The same in Triton's words: a doorstep.Model that has max_batch_size always batches.
TRITON_GATED = """
import json, os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        folder, self.instance = args["model_repository"], args["model_instance_name"]
        for pipe in ("seen", f"gate.{self.instance}"):
            os.mkfifo(os.path.join(folder, pipe))
        self.seen = os.open(os.path.join(folder, "seen"), os.O_RDWR)
        self.gate = os.open(os.path.join(folder, f"gate.{self.instance}"), os.O_RDWR)

    def execute(self, requests):
        arrays = [r.inputs()[0].as_numpy() for r in requests]
        batch = {"instance": self.instance, "x": [row for a in arrays for row in a.tolist()], "b": None}
        os.write(self.seen, json.dumps(batch).encode() + b"\\n")
        os.read(self.gate, 1)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", a * 10)]) for a in arrays]
"""
TRITON_CONFIG = """
max_batch_size: 8
input { name: "x" data_type: TYPE_INT32 dims: -1 }
output { name: "output" data_type: TYPE_INT32 dims: -1 }
"""

CONFIGS = {
    "plain": TRITON_CONFIG,
    "dynamic": "dynamic_batching { }",
    "preferred": "dynamic_batching { preferred_batch_size: [ 4, 2 ] }",
    "patient": f"dynamic_batching {{ max_queue_delay_microseconds: {NEVER_US} preferred_batch_size: [ 3, 8 ] }}",
    "bounded": "dynamic_batching { default_queue_policy { max_queue_size: 2 } }",
    "hasty": "dynamic_batching { default_queue_policy { default_timeout_microseconds: 50000 } }",
    "override": "dynamic_batching { default_queue_policy {"
    f" default_timeout_microseconds: {NEVER_US} allow_timeout_override: true }} }}",
    "pair": "dynamic_batching { } instance_group { count: 2 kind: KIND_CPU }",
    "orderly": "dynamic_batching { preserve_ordering: true } instance_group { count: 2 kind: KIND_CPU }",
}


def save_recorder(folder: Path) -> None:
    """Writes every batch to a file, and does not wait: for warm-up."""
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(
        "import doorstep\nimport numpy as np\nimport numpy.typing as npt\n\n"
        "class Model(doorstep.Model):\n    max_batch_size = 8\n\n"
        "    def predict(self, x: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:\n"
        "        with open(self.context.model_directory / 'seen.txt', 'a') as seen:\n"
        "            seen.write(f'{self.context.instance} {x.tolist()}\\n')\n        return x\n"
    )
    (folder / "config.pbtxt").write_text(
        "instance_group { count: 2 }\n"
        'model_warmup { name: "zeros" batch_size: 2 count: 3\n'
        '  inputs { key: "x" value { data_type: TYPE_INT32 dims: 2 zero_data: true } } }\n'
        'model_warmup { name: "data" batch_size: 1\n'
        '  inputs { key: "x" value { data_type: TYPE_INT32 dims: 1 input_data_file: "x.bin" } } }\n'
    )
    (folder / "warmup").mkdir()
    (folder / "warmup" / "x.bin").write_bytes(np.array([7], "<i4").tobytes())


def save_powers(path: Path) -> None:
    """y = x to the 32nd, of square matrices of any size: nothing for the smallest, much for large ones."""
    nodes = [helper.make_node("MatMul", [f"p{i}", f"p{i}"], [f"p{i + 1}"]) for i in range(5)]
    nodes[0].input[0] = nodes[0].input[1] = "x"
    nodes[-1].output[0] = "y"
    shape = [1, "N", "N"]
    save_model(path, nodes, [("x", TensorProto.FLOAT, shape)], [("y", TensorProto.FLOAT, shape)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("batching")
    for name, config in CONFIGS.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.py").write_text(TRITON_GATED if name == "plain" else GATED)
        (models / name / "config.pbtxt").write_text(config)
    save_recorder(models / "recorder")
    save_identity(models / "small" / "1" / "model.onnx")
    (models / "large" / "1").mkdir(parents=True)
    nodes = [helper.make_node("MatMul", ["x", "x"], ["p0"])]
    nodes += [helper.make_node("MatMul", [f"p{i}", "x"], [f"p{i + 1}" if i < 9 else "y"]) for i in range(10)]
    square = [400, 400]
    save_model(
        models / "large" / "1" / "model.onnx",
        nodes, [("x", TensorProto.FLOAT, square)], [("y", TensorProto.FLOAT, square)],
    )  # fmt: skip
    save_powers(models / "powers" / "1" / "model.onnx")
    (models / "powers" / "config.pbtxt").write_text('parameters { key: "execution" value { string_value: "inline" } }')
    with ServerProcess(models) as found:
        found.models = models  # type: ignore[attr-defined]
        yield found


class Gated:
    """One of the models that stop: what it was given, and its gates."""

    def __init__(self, server: ServerProcess, name: str) -> None:
        self.server, self.name = server, name
        folder: Path = server.models / name  # type: ignore[attr-defined]
        self._seen = os.fdopen(os.open(folder / "seen", os.O_RDWR), "rb", buffering=0)
        self._gates = {path.name.removeprefix("gate."): os.open(path, os.O_RDWR) for path in folder.glob("gate.*")}
        self.instances = sorted(self._gates)
        self._rest = b""
        self.before = self.statistics()

    def seen(self) -> dict[str, Any]:
        """What the next batch was given. Waits for it."""
        while b"\n" not in self._rest:
            assert select.select([self._seen], [], [], SECONDS)[0], f"no batch came\n{self.server.logs()}"
            self._rest += self._seen.read(65536)
        line, self._rest = self._rest.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def release(self, instance: str = "", count: int = 1) -> None:
        os.write(self._gates[instance or self.instances[0]], b"." * count)

    def send(
        self, value: int, *, width: int = 1, rows: int = 1, b: int | None = None, **parameters: Any
    ) -> Future[Any]:
        """One request over HTTP: rows of `width` times the value. Resolves to (status, document)."""
        future: Future[Any] = Future()
        body = json.dumps(request_document(value, width, rows, b, parameters))

        def run() -> None:
            connection = http.client.HTTPConnection(self.server.http, timeout=SECONDS)
            try:
                connection.request("POST", f"/v2/models/{self.name}/infer", body)
                answer = connection.getresponse()
                future.set_result((answer.status, json.loads(answer.read())))
            except Exception as error:
                future.set_exception(error)
            finally:
                connection.close()

        threading.Thread(target=run, daemon=True).start()
        return future

    def queued(self, *values: int, **options: Any) -> list[Future[Any]]:
        """Requests one after the other, each in the queue before the next is sent."""
        base = self.pending()
        futures = []
        for count, value in enumerate(values, 1):
            futures.append(self.send(value, **options))
            self.wait_pending(base + count)
        return futures

    def running(self, value: int = 0) -> Future[Any]:
        """A request that the (first) instance is busy with."""
        future = self.send(value)
        assert self.seen()["x"] == [[value]]
        return future

    def pending(self) -> int:
        return int(self.metric("nv_inference_pending_request_count"))

    def wait_pending(self, count: int) -> None:
        until(lambda: self.pending() == count, lambda: f"{self.pending()} pending instead of {count}")

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.server, name, model=self.name, version="1", **labels)

    def failures(self, reason: str) -> float:
        return self.metric("nv_inference_request_failure", reason=reason)

    def statistics(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.server.url(f"/v2/models/{self.name}/stats"), timeout=SECONDS) as answer:
            (found,) = json.load(answer)["model_stats"]
        statistics: dict[str, Any] = found
        return statistics

    def batches(self) -> dict[int, int]:
        """Batches of each size since the test began."""
        counts = {b["batch_size"]: b["compute_infer"]["count"] for b in self.statistics()["batch_stats"]}
        for batch in self.before["batch_stats"]:
            counts[batch["batch_size"]] -= batch["compute_infer"]["count"]
        return {size: count for size, count in sorted(counts.items()) if count}

    def grown(self, key: str) -> int:
        return int(self.statistics()[key] - self.before[key])

    def close(self) -> None:
        self._seen.close()
        for gate in self._gates.values():
            os.close(gate)


def request_document(value: int, width: int, rows: int, b: int | None, parameters: dict[str, Any]) -> dict[str, Any]:
    def tensor(name: str, element: int) -> dict[str, Any]:
        return {"name": name, "datatype": "INT32", "shape": [rows, width], "data": [element] * rows * width}

    inputs = [tensor("x", value)] if b is None else [tensor("x", value), tensor("b", b)]
    return {"inputs": inputs, "parameters": parameters} if parameters else {"inputs": inputs}


def until(condition: Callable[[], bool], what: Callable[[], str] = lambda: "") -> None:
    """Asks again and again; only a server that never gets there fails."""
    turn = threading.Event()
    for _ in range(SECONDS * 200):
        if condition():
            return
        turn.wait(0.005)
    raise AssertionError(what())


def metric(server: ServerProcess, name: str, **labels: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=SECONDS) as answer:
        text = answer.read().decode()
    found = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.removesuffix("_total") == name and sample.labels == labels
    ]
    assert len(found) == 1, (name, labels, found)
    return float(found[0])


def answers(futures: list[Future[Any]]) -> list[Any]:
    """The data of successful answers."""
    found = [future.result(SECONDS) for future in futures]
    assert all(status == 200 for status, _ in found), found
    return [document["outputs"][0]["data"] for _, document in found]


@pytest.fixture
def gated(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[Gated]:
    found = Gated(server, request.param)
    yield found
    found.close()


def on(name: str) -> Any:
    return pytest.mark.parametrize("gated", [name], indirect=True)


# What runs together


@on("dynamic")
def test_what_waits_while_an_instance_is_busy_becomes_one_batch(gated: Gated) -> None:
    first = gated.running(1)
    rest = gated.queued(2, 3, 4, 5, 6)
    gated.release()
    assert gated.seen()["x"] == [[2], [3], [4], [5], [6]]
    gated.release()
    assert answers([first, *rest]) == [[10], [20], [30], [40], [50], [60]]
    assert gated.batches() == {1: 1, 5: 1}
    assert (gated.grown("inference_count"), gated.grown("execution_count")) == (6, 2)


@on("plain")
def test_without_dynamic_batching_every_request_runs_alone_and_in_order(gated: Gated) -> None:
    first = gated.running(1)
    rest = gated.queued(2, 3, 4)
    gated.release(count=4)
    assert [gated.seen()["x"] for _ in range(3)] == [[[2]], [[3]], [[4]]]
    assert answers([first, *rest]) == [[10], [20], [30], [40]]
    assert gated.batches() == {1: 4}


@on("dynamic")
def test_rows_are_counted_not_requests_and_no_request_is_split(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(1, 2, 3, rows=3)
    gated.release()
    assert gated.seen()["x"] == [[1]] * 3 + [[2]] * 3, "nine rows do not fit into eight"
    gated.release()
    assert gated.seen()["x"] == [[3]] * 3
    gated.release()
    assert answers([first, *rest]) == [[0], [10] * 3, [20] * 3, [30] * 3]
    assert gated.batches() == {1: 1, 3: 1, 6: 1}
    assert gated.grown("inference_count") == 10


@on("dynamic")
def test_a_batch_is_never_larger_than_max_batch_size(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(*range(1, 12))
    gated.release()
    assert len(gated.seen()["x"]) == 8
    gated.release()
    assert len(gated.seen()["x"]) == 3
    gated.release()
    answers([first, *rest])


@on("preferred")
def test_the_largest_preferred_size_there_is_goes_first(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(1, 2, 3, 4, 5, 6, 7)
    gated.release(count=4)
    assert [len(gated.seen()["x"]) for _ in range(3)] == [4, 2, 1]
    answers([first, *rest])


@on("dynamic")
def test_requests_of_other_shapes_or_other_inputs_get_batches_of_their_own(gated: Gated) -> None:
    first = gated.running()
    futures = gated.queued(1, 2, width=1)
    futures += gated.queued(3, 4, width=2)
    futures += gated.queued(5, 6, width=2, b=1)
    futures += gated.queued(7, width=1)
    gated.release(count=5)
    batches = [gated.seen() for _ in range(4)]
    assert [batch["x"] for batch in batches] == [[[1], [2]], [[3, 3], [4, 4]], [[5, 5], [6, 6]], [[7]]]
    assert [batch["b"] for batch in batches] == [None, None, [[1, 1], [1, 1]], None]
    assert answers([first, *futures]) == [[0], [10], [20], [30, 30], [40, 40], [51, 51], [61, 61], [70]]


@on("pair")
def test_instances_run_at_the_same_time(gated: Gated) -> None:
    futures = [gated.send(1)]
    one = gated.seen()["instance"]
    futures.append(gated.send(2))
    other = gated.seen()["instance"]  # the first has not been let go
    assert sorted([one, other]) == gated.instances
    assert gated.metric("doorstep_saturation_ratio") == 1.0
    assert gated.metric("doorstep_inflight_requests") == 2
    gated.release(other)
    assert answers(futures[1:]) == [[20]], "the second is not held up by the first"
    gated.release(one)
    assert answers(futures) == [[10], [20]]


@on("orderly")
def test_preserve_ordering_holds_an_answer_back_until_those_before_it_are_out(gated: Gated) -> None:
    first = gated.send(1)
    one = gated.seen()["instance"]
    second = gated.send(2)
    other = gated.seen()["instance"]
    assert one != other
    gated.release(other)
    until(lambda: gated.grown("inference_count") == 1)
    assert not second.done()
    assert not first.done()
    gated.release(one)
    assert answers([first, second]) == [[10], [20]]


@on("orderly")
def test_preserve_ordering_is_not_stuck_by_one_who_left(gated: Gated) -> None:
    leaving = leaver(gated, 1)
    one = gated.seen()["instance"]
    second = gated.send(2)
    other = gated.seen()["instance"]
    gated.release(other)
    until(lambda: gated.grown("inference_count") == 1)
    leaving.close()
    until(lambda: gated.failures("CANCELED") == 1)
    gated.release(one)
    assert answers([second]) == [[20]]


@on("orderly")
def test_who_leaves_while_the_answer_waits_for_its_turn_is_counted_as_answered(gated: Gated) -> None:
    before = gated.failures("CANCELED")
    first = gated.send(1)
    one = gated.seen()["instance"]
    connection = leaver(gated, 2)
    gated.release(gated.seen()["instance"])
    until(lambda: gated.grown("inference_count") == 1)
    connections = metric(gated.server, "doorstep_connections", listener="http")
    connection.close()
    until(lambda: metric(gated.server, "doorstep_connections", listener="http") < connections)
    gated.release(one)
    assert answers([first]) == [[10]]
    assert gated.failures("CANCELED") == before
    assert (
        gated.statistics()["inference_stats"]["success"]["count"]
        == gated.before["inference_stats"]["success"]["count"] + 2
    )


# Time


@on("patient")
def test_a_batch_waits_for_company_and_a_preferred_size_ends_the_wait(gated: Gated) -> None:
    futures = gated.queued(1, 2)  # in the queue, though the instance is idle
    assert gated.metric("doorstep_saturation_ratio") == 0.0
    futures.append(gated.send(3))
    assert gated.seen()["x"] == [[1], [2], [3]]
    gated.release()
    assert answers(futures) == [[10], [20], [30]]


@on("patient")
def test_a_request_that_cannot_join_ends_the_wait_of_those_before_it(gated: Gated) -> None:
    futures = gated.queued(1, 2)
    futures.append(gated.send(3, width=2))
    assert gated.seen()["x"] == [[1], [2]]
    gated.release()
    assert answers(futures[:2]) == [[10], [20]]
    futures += gated.queued(4, width=2)  # pending already: the one of width 2 waits for its own company
    futures.append(gated.send(5, width=2))
    assert gated.seen()["x"] == [[3, 3], [4, 4], [5, 5]]
    gated.release()
    answers(futures)


def test_the_queue_delay_is_in_microseconds(tmp_path: Path) -> None:
    save_identity(tmp_path / "slow" / "1" / "model.onnx")
    (tmp_path / "slow" / "config.pbtxt").write_text(
        "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 20000 }"
    )
    with ServerProcess(tmp_path) as server:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
        request = urllib.request.Request(server.url("/v2/models/slow/infer"), json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(server.url("/v2/models/slow/stats"), timeout=SECONDS) as answer:
            queue = json.load(answer)["model_stats"][0]["inference_stats"]["queue"]
    assert queue["count"] == 1
    assert 20_000_000 <= queue["ns"] < 10_000_000_000, "20 ms, and not 20 µs or 20 s"


@on("hasty")
def test_a_request_that_waits_too_long_is_refused_while_the_model_is_still_busy(gated: Gated) -> None:
    first = gated.running()
    status, document = gated.send(1).result(SECONDS)
    assert (status, document["error"]) == (503, "Request timeout expired")
    with pytest.raises(grpc.RpcError) as caught:
        infer_over_grpc(gated, 2).result()
    assert (caught.value.code().name, caught.value.details()) == ("UNAVAILABLE", "Request timeout expired")
    gated.release()
    assert answers([first]) == [[0]]
    assert gated.failures("REJECTED") == 2
    assert gated.batches() == {1: 1}


@on("override")
def test_a_requests_own_timeout_counts_where_the_model_lets_it(gated: Gated) -> None:
    first = gated.running()
    status, document = gated.send(1, timeout=1000).result(SECONDS)
    assert (status, document["error"]) == (503, "Request timeout expired")
    rest = gated.queued(2)
    gated.release(count=2)
    assert answers([first, *rest]) == [[0], [20]]
    assert gated.seen()["x"] == [[2]]


@on("dynamic")
def test_a_requests_own_timeout_does_not_count_elsewhere(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(1, timeout=1)
    gated.release(count=2)
    assert answers([first, *rest]) == [[0], [10]]
    gated.seen()


@on("bounded")
def test_a_full_queue_refuses_over_http_and_grpc(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(1, 2)
    assert gated.metric("doorstep_saturation_ratio") == 1.0
    status, document = gated.send(3).result(SECONDS)
    assert (status, document["error"]) == (503, FULL)
    with pytest.raises(grpc.RpcError) as caught:
        infer_over_grpc(gated, 4).result()
    assert (caught.value.code().name, caught.value.details()) == ("UNAVAILABLE", FULL)
    gated.release()
    assert gated.seen()["x"] == [[1], [2]]
    gated.release()
    assert answers([first, *rest]) == [[0], [10], [20]]
    assert gated.failures("REJECTED") == 2
    assert answers(_after_release(gated, 5)) == [[50]], "there is room again"


def _after_release(gated: Gated, value: int) -> list[Future[Any]]:
    future = gated.running(value)
    gated.release()
    return [future]


# Who does not wait


def leaver(gated: Gated, value: int) -> socket.socket:
    """A request on a connection of its own, not answered yet."""
    body = json.dumps(request_document(value, 1, 1, None, {})).encode()
    head = f"POST /v2/models/{gated.name}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", gated.server.http_port), SECONDS)
    connection.sendall(head.encode() + body)
    return connection


def infer_over_grpc(gated: Gated, value: int, timeout: float = SECONDS) -> Any:
    """A call under way: a grpc.Future."""
    channel = grpc.insecure_channel(gated.server.grpc)
    call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(message_of(gated, value), timeout)
    call.add_done_callback(lambda _: threading.Thread(target=channel.close, daemon=True).start())
    return call


def message_of(gated: Gated, value: int) -> Any:
    message = service_pb2.ModelInferRequest(model_name=gated.name)
    message.inputs.add(name="x", datatype="INT32", shape=[1, 1])
    message.raw_input_contents.append(np.array([value], "<i4").tobytes())
    return message


def leave_over_http(gated: Gated) -> None:
    connection = leaver(gated, 99)
    gated.wait_pending(1)
    connection.close()


def leave_over_grpc(gated: Gated) -> None:
    call = infer_over_grpc(gated, 99)
    gated.wait_pending(1)
    call.cancel()


def leave_by_deadline(gated: Gated) -> None:
    call = infer_over_grpc(gated, 99, timeout=1.0)
    with pytest.raises(grpc.RpcError) as caught:
        call.result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def leave_by_stream(gated: Gated) -> None:
    channel = grpc.insecure_channel(gated.server.grpc)
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    never = threading.Event()

    def requests() -> Iterator[Any]:
        yield message_of(gated, 99)
        never.wait(SECONDS)

    call = stub.ModelStreamInfer(requests())
    gated.wait_pending(1)
    call.cancel()
    never.set()
    channel.close()


@on("dynamic")
@pytest.mark.parametrize("leave", [leave_over_http, leave_over_grpc, leave_by_deadline, leave_by_stream])
def test_whoever_leaves_the_queue_is_skipped_and_counted(
    server: ServerProcess, leave: Callable[[Gated], None], gated: Gated
) -> None:
    before = gated.failures("CANCELED")
    first = gated.running()
    leave(gated)
    gated.wait_pending(0)
    rest = gated.queued(1)
    gated.release()
    assert gated.seen()["x"] == [[1]], "the model never sees the one who left"
    gated.release()
    assert answers([first, *rest]) == [[0], [10]]
    assert gated.failures("CANCELED") == before + 1
    assert gated.grown("inference_count") == 2


@on("dynamic")
def test_whoever_leaves_a_running_batch_takes_nothing_from_the_others(gated: Gated) -> None:
    before = gated.failures("CANCELED")
    first = gated.running()
    connection = leaver(gated, 1)
    gated.wait_pending(1)
    rest = gated.queued(2)
    gated.release()
    assert gated.seen()["x"] == [[1], [2]]
    connection.close()
    until(lambda: gated.failures("CANCELED") == before + 1)
    gated.release()
    assert answers([first, *rest]) == [[0], [20]]
    assert gated.failures("CANCELED") == before + 1, "counted once"


# Warm-up, and where a model runs


def test_warm_up_samples_run_on_every_instance_and_count_in_no_statistics(server: ServerProcess) -> None:
    gave = (server.models / "recorder" / "seen.txt").read_text().splitlines()  # type: ignore[attr-defined]
    for instance in ("recorder_0_0", "recorder_0_1"):
        assert [line for line in gave if line.startswith(instance)] == [
            *[f"{instance} [[0, 0], [0, 0]]"] * 3,
            f"{instance} [[7]]",
        ]
    assert len(gave) == 8
    with urllib.request.urlopen(server.url("/v2/models/recorder/stats"), timeout=SECONDS) as answer:
        (found,) = json.load(answer)["model_stats"]
    assert (found["inference_count"], found["execution_count"], found["inference_stats"]["success"]["count"]) == (
        0,
        0,
        0,
    )


def execution_of(server: ServerProcess, model: str) -> str:
    with urllib.request.urlopen(server.url(f"/v2/models/{model}/config"), timeout=SECONDS) as answer:
        found: str = json.load(answer)["parameters"]["execution"]["string_value"]
    return found


def test_auto_says_what_it_chose_in_the_config_and_the_log(server: ServerProcess) -> None:
    assert execution_of(server, "small") == "inline"
    assert execution_of(server, "large") == "thread"
    assert execution_of(server, "plain") == "process"
    assert "small_0: runs inline: its largest batch took" in server.logs()
    assert "large_0: runs in a thread: its largest batch took" in server.logs()


def test_an_inline_model_that_turns_slow_is_moved_off_the_loop_and_says_so(server: ServerProcess) -> None:
    assert execution_of(server, "powers") == "inline"
    size = 700  # well over a millisecond, whatever the machine
    matrix = np.eye(size, dtype=np.float32)
    text = json.dumps({
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, size, size],
                    "parameters": {"binary_data_size": matrix.nbytes}}],
        "parameters": {"binary_data_output": True},
    }).encode()  # fmt: skip
    for _ in range(5):
        request = urllib.request.Request(
            server.url("/v2/models/powers/infer"),
            text + matrix.tobytes(),
            {"inference-header-content-length": str(len(text))},
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            body = answer.read()
            start = int(answer.headers["inference-header-content-length"])
        assert np.array_equal(np.frombuffer(body[start:], np.float32).reshape(size, size), matrix)
    until(
        lambda: (
            "powers_0: its batches take over a millisecond on the event loop; it runs in a thread now" in server.logs()
        )
    )
    assert execution_of(server, "powers") == "thread"
