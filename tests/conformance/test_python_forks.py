"""A model that forks: what its children ask of the server fails at once, and the model itself goes on."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from doorstep.testing.server import ServerProcess

pytestmark = [pytest.mark.timeout(120), pytest.mark.xdist_group("python-forks")]

FORKS = """
import multiprocessing
import numpy as np
import triton_python_backend_utils as pb_utils


def ask(_):
    pb_utils.Logger.log_info("said by a child")
    request = pb_utils.InferenceRequest(
        model_name="twice", requested_output_names=["Y"], inputs=[pb_utils.Tensor("X", np.array([4], np.int32))]
    )
    response = request.exec()
    if response.has_error():
        return response.error().message()
    return str(response.output_tensors()[0].as_numpy()[0])


def ready(_):
    try:
        return str(pb_utils.is_model_ready("twice"))
    except pb_utils.TritonModelException as error:
        return str(error)


class TritonPythonModel:
    def execute(self, requests):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            said = [pool.map(ask, range(2)), pool.map(ready, range(1)), [ask(0)]]
        text = np.array([item.encode() for items in said for item in items], np.object_)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("SAID", text)]) for _ in requests]
"""
TWICE = """
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("Y", r.inputs()[0].as_numpy() * 2)]) for r in requests
        ]
"""
X = 'input { name: "X" data_type: TYPE_INT32 dims: 1 } '
MODELS = {
    "forks": (X + 'output { name: "SAID" data_type: TYPE_STRING dims: -1 }', FORKS),
    "twice": (X + 'output { name: "Y" data_type: TYPE_INT32 dims: 1 }', TWICE),
}
REFUSED = "a process that the model has forked cannot ask the server; use threads, or async_exec"
SAID = [
    *[f"Model twice - Error when running inference: {REFUSED}"] * 2,
    f"Failed to check model readiness: {REFUSED}",
    "8",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    for name, (config, source) in MODELS.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.py").write_text(source)
        (models / name / "config.pbtxt").write_text(f'backend: "python" {config}')
    with ServerProcess(models) as process:
        yield process


def said_over_http(server: ServerProcess) -> Any:
    body = {"inputs": [{"name": "X", "datatype": "INT32", "shape": [1], "data": [1]}]}
    url = f"http://127.0.0.1:{server.http_port}/v2/models/forks/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60) as answer:
        return json.load(answer)["outputs"][0]["data"]


def said_over_grpc(server: ServerProcess) -> Any:
    tensor = grpcclient.InferInput("X", [1], "INT32").set_data_from_numpy(np.array([1], np.int32))
    with grpcclient.InferenceServerClient(server.grpc) as client:
        return [item.decode() for item in client.infer("forks", [tensor], client_timeout=60).as_numpy("SAID")]


@pytest.mark.parametrize("ask", [said_over_http, said_over_grpc])
def test_children_are_refused_and_the_model_goes_on(server: ServerProcess, ask) -> None:
    assert ask(server) == SAID
    assert "said by a child" in server.logs()
