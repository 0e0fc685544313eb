"""Backends that are a model.py in --backend-directory, native models that stream and call, parameters of responses."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from doorstep.testing.server import ServerFailed, ServerProcess

pytestmark = pytest.mark.xdist_group("python-based")

BACKEND = """
import json
import helper
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "X", "data_type": "TYPE_STRING", "dims": [1]})
        config.add_output({"name": "Y", "data_type": "TYPE_STRING", "dims": [1]})
        return config

    def initialize(self, args):
        with open(pb_utils.get_model_dir() + "/settings.json") as file:
            self.word = json.load(file)["word"]
        self.runtime = json.loads(args["model_config"])["runtime"]

    def execute(self, requests):
        responses = []
        for request in requests:
            text = f"{self.word} {helper.WORD} {self.runtime} {request.inputs()[0].as_numpy()[0].decode()}"
            tensor = pb_utils.Tensor("Y", np.array([text.encode()], np.object_))
            responses.append(pb_utils.InferenceResponse([tensor], parameters={"n": 1, "s": "x", "b": True}))
        return responses
"""

WORDS = """
from collections.abc import Iterator
import doorstep
class Model(doorstep.Model):
    def predict(self, X: str) -> Iterator[str]:
        for word in X.split():
            yield str(self.server.infer("greeter", X=word)["Y"][0].decode())
"""


def post(server: ServerProcess, path: str, body: Any) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.read()


def tensor(text: str) -> Any:
    return {"inputs": [{"name": "X", "datatype": "BYTES", "shape": [1], "data": [text]}]}


def save(folder: Path) -> tuple[Path, Path]:
    backends, models = folder / "backends", folder / "models"
    (backends / "greet").mkdir(parents=True)
    (backends / "greet" / "model.py").write_text(BACKEND)
    (backends / "greet" / "helper.py").write_text("WORD = 'dear'\n")
    (models / "greeter" / "1").mkdir(parents=True)
    (models / "greeter" / "1" / "settings.json").write_text('{"word": "hello"}')
    (models / "greeter" / "config.pbtxt").write_text('backend: "greet"\n')
    (models / "words" / "1").mkdir(parents=True)
    (models / "words" / "1" / "model.py").write_text(WORDS)
    return backends, models


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    backends, models = save(tmp_path_factory.mktemp("based"))
    # By its name alone, as Triton takes it: <model>.<backend>.
    (models / "bare.greet" / "1").mkdir(parents=True)
    (models / "bare.greet" / "1" / "settings.json").write_text('{"word": "hi"}')
    with ServerProcess(models, f"--backend-directory={backends}") as running:
        yield running


@pytest.mark.parametrize(("model", "word"), [("greeter", "hello"), ("bare.greet", "hi")])
def test_a_model_runs_on_the_model_py_of_its_backend(server: ServerProcess, model: str, word: str) -> None:
    answer = json.loads(post(server, f"/v2/models/{model}/infer", tensor("Zoe")))
    assert answer["outputs"][0]["data"] == [f"{word} dear model.py Zoe"]
    assert answer["parameters"] == {"n": 1, "s": "x", "b": True}


def test_parameters_of_a_response_over_grpc(server: ServerProcess) -> None:
    given = grpcclient.InferInput("X", [1], "BYTES").set_data_from_numpy(np.array([b"Zoe"], np.object_))
    with grpcclient.InferenceServerClient(server.grpc) as client:
        response = client.infer("greeter", [given]).get_response()
    told = {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in response.parameters.items()}
    assert told == {"n": 1, "s": "x", "b": True}


def test_a_native_model_streams_what_another_model_says(server: ServerProcess) -> None:
    body = post(server, "/v2/models/words/generate_stream", {"X": "Ann Bob"}).decode()
    events = [json.loads(line.removeprefix("data: ")) for line in body.splitlines() if line.startswith("data: ")]
    assert [event["output"] for event in events] == ["hello dear model.py Ann", "hello dear model.py Bob"]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('backend: "nowhere" runtime: "model.py"', "nowhere"),
        ('backend: "greet" runtime: "libother.so"', "unable to find backend library 'libother.so' for model 'greeter'"),
        ('backend: "python" runtime: "model.py"',
         "unable to find Python backend based backend library 'model.py' for model 'greeter', searched: "),
    ],
)  # fmt: skip
def test_a_backend_or_runtime_that_is_not_there_fails_the_load(tmp_path: Path, written: str, text: str) -> None:
    backends, models = save(tmp_path)
    (models / "greeter" / "config.pbtxt").write_text(written)
    with pytest.raises(ServerFailed, match=text), ServerProcess(models, f"--backend-directory={backends}"):
        pass
