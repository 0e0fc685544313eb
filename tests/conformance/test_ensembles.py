"""Ensembles over HTTP and gRPC with tritonclient: every shape of graph, streams, sequences, failures, statistics, the
models they need loaded and unloaded. What Triton answers is compared in test_triton_differential; here is the rest."""

from __future__ import annotations

import json
import queue
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from doorstep.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parent))

from differential.ensemble_cases import MODELS

pytestmark = pytest.mark.xdist_group("ensembles")

STREAM = """
    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender = request.get_response_sender()
                count = int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0])
                for i in range(count):
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([i, count], np.int32))]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
TOTAL = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.totals = {}

        def execute(self, requests):
            responses = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
                started = pb_utils.get_input_tensor_by_name(request, "START").as_numpy().ravel()[0]
                key = request.correlation_id()
                self.totals[key] = x if started else self.totals[key] + x
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", self.totals[key])]))
            return responses
"""
SAME = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", r.inputs()[0].as_numpy())]) for r in requests]
"""
TENSORS = 'input { name: "X" data_type: TYPE_INT32 dims: [ 2 ] } output { name: "Y" data_type: TYPE_INT32 dims: [ 2 ] }'
ENDS = 'input { name: "IN" data_type: TYPE_INT32 dims: [ 2 ] } output { name: "OUT" data_type: TYPE_INT32 dims: [ 2 ] }'


def steps(*models: str, limit: int = 0) -> str:
    """A row of models from IN to OUT."""
    names = ["IN", *(f"t{i}" for i in range(1, len(models))), "OUT"]
    text = "".join(
        f'step {{ model_name: "{m}" model_version: -1 input_map {{ key: "X" value: "{names[i]}" }} '
        f'output_map {{ key: "Y" value: "{names[i + 1]}" }} }} '
        for i, m in enumerate(models)
    )
    return f'platform: "ensemble" {ENDS} ensemble_scheduling {{ {text} max_inflight_requests: {limit} }}'


def labelled(tensors: str, output: str) -> str:
    return tensors.replace(f'name: "{output}"', f'name: "{output}" label_filename: "labels.txt"')


OWN: dict[str, tuple[str, str | None]] = {
    "stream": (f'backend: "python" {TENSORS} model_transaction_policy {{ decoupled: true }}', STREAM),
    "total": (
        f'backend: "python" {TENSORS} max_batch_size: 4 sequence_batching {{ control_input {{ name: "START" '
        "control { kind: CONTROL_SEQUENCE_START int32_false_true: [ 0, 1 ] } } }",
        TOTAL,
    ),
    "counted": (steps("stream", "e_add"), None),
    "limited": (steps("stream", "e_add", limit=2), None),
    "sums": (steps("e_add", "total"), None),
    "named": (f'backend: "python" {labelled(TENSORS, "Y")}', SAME),
    "scored": (steps("e_add", "named"), None),
    "rescored": (steps("scored").replace('"X"', '"IN"').replace('"Y"', '"OUT"'), None),
    "own": (labelled(steps("named"), "OUT"), None),
}
LABELS = {"named": "cat\ndog\n", "own": "Katze\nHund\n"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    models = {name: (config, code) for name, (config, code, _, _) in MODELS.items() if not name.startswith("x_")}
    for name, (config, code) in {**models, **OWN}.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(config)
        if name in LABELS:
            (folder / name / "labels.txt").write_text(LABELS[name])
        if code is not None:
            (folder / name / "1" / "model.py").write_text(dedent(code).lstrip("\n"))
    options = ("--model-control-mode=explicit", *(f"--load-model={n}" for n in (*models, *OWN) if n != "e_broken"))
    with ServerProcess(folder, *options) as running:
        running.models = folder  # type: ignore[attr-defined]
        yield running


Infer = Callable[..., dict[str, Any]]


@pytest.fixture(params=["http", "http-json", "grpc"])
def infer(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Infer]:
    """infer(model, IN=array, …, outputs=(…), sequence_id=…) → outputs by name."""
    module: Any = grpcclient if request.param == "grpc" else httpclient
    client = module.InferenceServerClient(server.grpc if request.param == "grpc" else f"127.0.0.1:{server.http_port}")
    binary = {} if request.param == "grpc" else {"binary_data": request.param == "http"}

    def call(
        model: str, outputs: tuple[str, ...] = (), options: Any = None, classes: int = 0, **inputs: Any
    ) -> dict[str, Any]:
        sent = []
        for name, array in inputs.items():
            tensor = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
            tensor.set_data_from_numpy(array, **binary)
            sent.append(tensor)
        asked = [module.InferRequestedOutput(name, class_count=classes, **binary) for name in outputs] or None
        result = client.infer(model, sent, outputs=asked, **(options or {}))
        response = result.get_response()
        listed = response["outputs"] if isinstance(response, dict) else response.outputs
        names = [o["name"] if isinstance(o, dict) else o.name for o in listed]
        return {name: result.as_numpy(name) for name in names}

    yield call
    client.close()


def ints(*values: int, rows: int = 0) -> Any:
    array = np.array(values, np.int32)
    return array.reshape(rows, -1) if rows else array


@pytest.mark.parametrize(("model", "inputs", "expected"), [
    ("line", {"IN": ints(1, 2)}, {"OUT": [3, 4]}),
    ("diamond", {"IN": ints(1, 2)}, {"OUT": [5, 7]}),  # (x + 1) + (x + 2)
    ("fork", {"IN": ints(1, 2)}, {"P": [2, 3], "Q": [2, 3]}),
    ("maybe", {"IN": ints(1, 2), "MORE": ints(10, 20)}, {"OUT": [11, 22]}),
    ("maybe", {"IN": ints(1, 2)}, {"OUT": [1, 2]}),
    ("texts", {"IN": np.array(["a", "", "grün"], object)}, {"OUT": [b"A", b"", "grün".encode().upper()]}),
    ("nested", {"IN": ints(1, 2)}, {"OUT": [4, 5]}),
    ("batches", {"IN": ints(1, 2, 3, 4, rows=2)}, {"OUT": [[3, 4], [5, 6]]}),
    ("single", {"IN": ints(1, 2)}, {"OUT": [3, 4]}),
    ("reshaped", {"IN": ints(1, 2, rows=1)}, {"OUT": [[2, 3]]}),
])  # fmt: skip
def test_every_shape_of_graph_answers(infer: Infer, model: str, inputs: Any, expected: Any) -> None:
    assert {name: array.tolist() for name, array in infer(model, **inputs).items()} == expected


def test_only_what_is_asked_for_comes(infer: Infer) -> None:
    assert list(infer("fork", outputs=("Q",), IN=ints(1, 2))) == ["Q"]


def test_a_member_that_keeps_sequences_gets_their_flags(infer: Infer) -> None:
    sequence = {"sequence_id": 77}
    started = infer("sums", IN=ints(1, 1), options={**sequence, "sequence_start": True})
    again = infer("sums", IN=ints(2, 2), options=sequence)
    ended = infer("sums", IN=ints(3, 3), options={**sequence, "sequence_end": True})
    assert [a["OUT"].tolist() for a in (started, again, ended)] == [[2, 2], [5, 5], [9, 9]]


def test_a_step_that_fails_is_named(infer: Infer, server: ServerProcess) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer("nested", IN=ints(-5, 0))
    text = "in ensemble 'nested', in ensemble 'line', below zero (step 0, model 'e_add')"
    assert caught.value.message().endswith(text)
    assert infer("nested", IN=ints(1, 2))["OUT"].tolist() == [4, 5]


def test_a_request_that_is_wrong_is_refused_before_any_step(infer: Infer, server: ServerProcess) -> None:
    before = numbers(server, "e_add")["inference_count"]
    with pytest.raises(InferenceServerException, match="unexpected shape for input 'IN' for model 'line'"):
        infer("line", IN=ints(1, 2, 3))
    assert numbers(server, "e_add")["inference_count"] == before


def stream(server: ServerProcess, model: str, count: int) -> list[Any]:
    """(outputs, whether it was the final one) of each response."""
    got: queue.Queue[Any] = queue.Queue()
    found = []
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: got.put((result, error)))
        tensor = grpcclient.InferInput("IN", [2], "INT32")
        tensor.set_data_from_numpy(ints(count, 0))
        client.async_stream_infer(model, [tensor], enable_empty_final_response=True)
        while True:
            result, error = got.get(timeout=60)
            assert error is None, error
            final = result.get_response().parameters["triton_final_response"].bool_param
            found.append(result.as_numpy("OUT").tolist() if result.get_response().outputs else None)
            if final:
                break
        client.stop_stream()
    return found


@pytest.mark.parametrize("model", ["counted", "limited"])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_a_decoupled_step_makes_the_whole_decoupled(server: ServerProcess, model: str, count: int) -> None:
    answers = [a for a in stream(server, model, count) if a is not None]
    assert answers == [[i + 1, count + 1] for i in range(count)]
    assert json.loads(get(server, f"/v2/models/{model}/config"))["model_transaction_policy"] == {"decoupled": True}


def get(server: ServerProcess, path: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def numbers(server: ServerProcess, model: str) -> Any:
    return json.loads(get(server, f"/v2/models/{model}/stats"))["model_stats"][0]


def test_the_whole_and_its_steps_are_counted(infer: Infer, server: ServerProcess) -> None:
    before, step_before = numbers(server, "batches"), numbers(server, "e_batch")
    infer("batches", IN=ints(1, 2, 3, 4, rows=2))
    after, step_after = numbers(server, "batches"), numbers(server, "e_batch")
    for was, now in ((before, after), (step_before, step_after)):
        assert now["inference_count"] - was["inference_count"] == 2
        assert now["execution_count"] - was["execution_count"] == 1
        assert now["inference_stats"]["success"]["count"] - was["inference_stats"]["success"]["count"] == 1
    spent = {
        k: after["inference_stats"][k]["ns"] - before["inference_stats"][k]["ns"] for k in before["inference_stats"]
    }
    assert 0 < spent["compute_infer"] < spent["success"]
    assert (
        spent["queue"] + spent["compute_input"] + spent["compute_infer"] + spent["compute_output"] <= spent["success"]
    )


def test_many_at_once_are_all_answered_and_leave_nothing(infer: Infer, server: ServerProcess) -> None:
    before = numbers(server, "diamond")["inference_stats"]["success"]["count"]
    rows = [[i, -i - 1 if i % 10 == 0 else i] for i in range(1000)]
    bodies = [json.dumps({"inputs": [{"name": "IN", "datatype": "INT32", "shape": [2], "data": row}]}) for row in rows]

    def ask(body: str) -> Any:
        try:
            return json.loads(get(server, "/v2/models/diamond/infer", body.encode()))["outputs"][0]["data"]
        except urllib.error.HTTPError as error:
            return json.loads(error.read())["error"]

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, bodies))
    failed = "in ensemble 'diamond', below zero (step 0, model 'e_add')"
    assert answers == [failed if i % 10 == 0 else [2 * i + 3] * 2 for i in range(1000)]
    assert numbers(server, "diamond")["inference_stats"]["success"]["count"] - before == 900
    assert_idle(server)


def assert_idle(server: ServerProcess) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    inflight = [line for line in lines if line.startswith("doorstep_inflight_requests{")]
    assert inflight, "the gauge is there"
    assert all(float(line.rsplit(" ", 1)[1]) == 0 for line in inflight), inflight


def test_a_model_that_goes_takes_the_ensemble_with_it_and_brings_it_back(server: ServerProcess, infer: Infer) -> None:
    with httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        client.unload_model("e_text")
        assert not client.is_model_ready("texts")
        with pytest.raises(InferenceServerException, match="'texts' has no available versions"):
            infer("texts", IN=np.array(["a"], object))
        client.load_model("e_text")
        assert client.is_model_ready("texts")
    assert infer("texts", IN=np.array(["a"], object))["OUT"].tolist() == [b"A"]


def test_an_output_has_the_labels_of_the_step_that_makes_it(infer: Infer, server: ServerProcess) -> None:
    def classes(model: str) -> Any:
        found = infer(model, ("OUT",), classes=2, IN=ints(1, 7))["OUT"].tolist()
        return [text if isinstance(text, bytes) else text.encode() for text in found]  # text where it came as JSON

    try:
        assert classes("scored") == [b"8:1:dog", b"2:0:cat"]
        assert classes("rescored") == [b"8:1:dog", b"2:0:cat"], "through an ensemble in an ensemble"
        assert classes("own") == [b"7:1:Hund", b"1:0:Katze"], "its own labels win"
        relabel(server, "chat\nchien\n")
        assert classes("scored") == [b"8:1:chien", b"2:0:chat"]
        assert classes("rescored") == [b"8:1:chien", b"2:0:chat"]
    finally:
        relabel(server, LABELS["named"])


def relabel(server: ServerProcess, text: str) -> None:
    (server.models / "named" / "labels.txt").write_text(text)  # type: ignore[attr-defined]
    with httpclient.InferenceServerClient(server.http) as client:
        client.load_model("named")
