"""`ResponseIterator.cancel()`: the called model is asked to stop, and what it sends all the same still comes."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from doorstep.testing.server import ServerProcess

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("calls-asked-to-stop")]

COUNTS = """
import threading
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            obeys = bool(request.inputs()[0].as_numpy()[0])
            threading.Thread(target=self.count, args=(request.get_response_sender(), obeys)).start()

    def count(self, sender, obeys):
        def send(value, flags=0):
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("N", np.array([value], np.int32))]), flags)

        send(0)
        while not sender.is_cancelled():
            threading.Event().wait(0.001)
        if obeys:
            error = pb_utils.TritonError("stopped", pb_utils.TritonError.CANCELLED)
            sender.send(pb_utils.InferenceResponse(error=error), FINAL)
            return
        for value in (1, 2, 3):
            send(value)
        send(4, FINAL)
"""
ASKS = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("SEEN", self.ask(r))]) for r in requests]

    def ask(self, request):
        call = pb_utils.InferenceRequest(
            model_name="counts", requested_output_names=["N"], inputs=[request.inputs()[0]]
        )
        seen = []
        answers = call.exec(decoupled=True)
        for answer in answers:
            answers.cancel()
            if answer.has_error():
                seen.append(-answer.error().code())
            seen.extend(int(tensor.as_numpy()[0]) for tensor in answer.output_tensors())
        answers.cancel()
        return np.array(seen, np.int32)
"""
INPUT = 'input { name: "OBEYS" data_type: TYPE_INT32 dims: 1 } '
CONFIGS = {
    "counts": (INPUT + 'output { name: "N" data_type: TYPE_INT32 dims: 1 }'
               " model_transaction_policy { decoupled: true }", COUNTS),
    "asks": (INPUT + 'output { name: "SEEN" data_type: TYPE_INT32 dims: -1 }',
             ASKS),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    for name, (config, source) in CONFIGS.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.py").write_text(source)
        (models / name / "config.pbtxt").write_text(f'backend: "python" {config}')
    with ServerProcess(models) as process:
        yield process


def seen_over_http(server: ServerProcess, obeys: int) -> list[int]:
    body = {"inputs": [{"name": "OBEYS", "datatype": "INT32", "shape": [1], "data": [obeys]}]}
    url = f"http://127.0.0.1:{server.http_port}/v2/models/asks/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
        return json.load(answer)["outputs"][0]["data"]


def seen_over_grpc(server: ServerProcess, obeys: int) -> list[int]:
    tensor = grpcclient.InferInput("OBEYS", [1], "INT32").set_data_from_numpy(np.array([obeys], np.int32))
    with grpcclient.InferenceServerClient(server.grpc) as client:
        return client.infer("asks", [tensor], client_timeout=60).as_numpy("SEEN").tolist()


@pytest.mark.parametrize("ask", [seen_over_http, seen_over_grpc])
def test_a_model_that_goes_on_is_heard_to_the_end(server: ServerProcess, ask) -> None:
    assert ask(server, 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ask", [seen_over_http, seen_over_grpc])
def test_a_model_that_stops_says_so_itself(server: ServerProcess, ask) -> None:
    assert ask(server, 1) == [0, -7]


def test_nothing_is_left_of_them(server: ServerProcess) -> None:
    for obeys in (0, 1):
        seen_over_http(server, obeys)
    with urllib.request.urlopen(server.metrics_url, timeout=60) as answer:
        text = answer.read().decode()
    pending = [line for line in text.splitlines() if line.startswith("nv_inference_pending_request_count{")]
    assert len(pending) == 2
    assert all(line.endswith((" 0", " 0.0")) for line in pending)
