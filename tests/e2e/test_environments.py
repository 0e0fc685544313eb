"""What else may be installed beside the server: another protobuf than the clients', a backend of somebody else's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import google.protobuf
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from doorstep.testing.onnx_models import save_adder
from doorstep.testing.server import ServerProcess

MODEL = """
import google.protobuf
import doorstep

class Model(doorstep.Model):
    def predict(self, x: int) -> str:
        return google.protobuf.__version__
"""

BACKEND = """
from doorstep.backends.base import Backend, TensorInstance

class Doubling(Backend):
    name = "doubling"
    default_filename = "factor.txt"

    def load_instance(self, context):
        instance = Instance(context.config)
        instance.factor = int(context.artefact(self.default_filename).read_text())
        return instance

class Instance(TensorInstance):
    def run(self, inputs, outputs):
        return {"y": inputs["x"] * self.factor}
"""
CONFIG = """
backend: "doubling"
max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
"""


@pytest.fixture(scope="module")
def other_protobuf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the newest protobuf of the other major version that is supported: 7 beside 6, or 6 beside 7."""
    here = int(google.protobuf.__version__.split(".")[0])
    other = 7 if here == 6 else 6
    folder = tmp_path_factory.mktemp("protobuf")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(folder), f"protobuf=={other}.*"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"protobuf {other} is not to be had here: {done.stderr.strip()[-200:]}")
    return folder


def with_path(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))}


def test_server_and_clients_need_not_agree_on_protobuf(other_protobuf: Path, tmp_path: Path) -> None:
    save_adder(tmp_path / "add" / "1" / "model.onnx", 1)
    (tmp_path / "add" / "config.pbtxt").write_text("max_batch_size: 8 dynamic_batching { preferred_batch_size: 4 }")
    (tmp_path / "which" / "1").mkdir(parents=True)
    (tmp_path / "which" / "1" / "model.py").write_text(MODEL)
    with ServerProcess(tmp_path, env=with_path(other_protobuf)) as server:
        with grpcclient.InferenceServerClient(server.grpc) as client:
            x = grpcclient.InferInput("x", [1], "INT64").set_data_from_numpy(np.array([0]))
            version = client.infer("which", [x]).as_numpy("output")[0].decode()
            assert version.split(".")[0] != google.protobuf.__version__.split(".")[0]
            x = grpcclient.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.ones((1, 1), np.float32))
            assert client.infer("add", [x]).as_numpy("y").tolist() == [[2.0]]
            assert client.get_model_config("add").config.dynamic_batching.preferred_batch_size == [4]
            assert client.get_inference_statistics("add").model_stats[0].inference_count == 1
            assert [m.name for m in client.get_model_repository_index().models] == ["add", "which"]
        with httpclient.InferenceServerClient(server.http) as client:
            assert client.get_model_config("add")["max_batch_size"] == 8
            assert client.get_model_metadata("add")["inputs"][0]["shape"] == [-1, 1]


@pytest.fixture
def install_backend(tmp_path: Path) -> Callable[[str], Path]:
    """Lays out an installed package with a backend, as pip would."""

    def install(source: str) -> Path:
        folder = tmp_path / "site"
        info = folder / "doubling-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / "doubling.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubling\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[doorstep.backends]\ndoubling = doubling:Doubling\n")
        return folder

    return install


@pytest.mark.parametrize("execution", ["inline", "thread", "process"])
def test_a_backend_of_another_package_is_found_by_its_entry_point(
    install_backend: Callable[[str], Path], tmp_path: Path, execution: str
) -> None:
    site, models = install_backend(BACKEND), tmp_path / "models"
    (models / "twice" / "1").mkdir(parents=True)
    (models / "twice" / "1" / "factor.txt").write_text("2")
    where = f'parameters {{ key: "execution" value {{ string_value: "{execution}" }} }}'
    (models / "twice" / "config.pbtxt").write_text(CONFIG + where)
    with ServerProcess(models, env=with_path(site)) as server, httpclient.InferenceServerClient(server.http) as client:
        x = httpclient.InferInput("x", [2, 1], "FP32").set_data_from_numpy(np.array([[1], [4]], np.float32))
        assert client.infer("twice", [x]).as_numpy("y").tolist() == [[2.0], [8.0]]
        assert client.get_model_config("twice")["parameters"]["execution"]["string_value"] == execution


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_installed", "backend 'doubling' (doubling:Doubling) cannot be loaded: No module named"),
        ("class Doubling: pass", "backend 'doubling' (doubling:Doubling) is not a doorstep.backends.base.Backend"),
    ],
)
def test_a_backend_that_cannot_be_loaded_is_named(
    install_backend: Callable[[str], Path], tmp_path: Path, source: str, reason: str
) -> None:
    site, models = install_backend(source), tmp_path / "models"
    (models / "twice" / "1").mkdir(parents=True)
    (models / "twice" / "config.pbtxt").write_text(CONFIG)
    server = ServerProcess(models, env=with_path(site))
    server.launch()
    assert server.wait() == 1
    assert reason in server.logs()


def test_protobuf_without_c_answers_too(tmp_path: Path) -> None:
    """Some packages turn protobuf to its implementation in Python, in the environment of all that comes after."""
    save_adder(tmp_path / "add" / "1" / "model.onnx", 1)
    slow = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    with ServerProcess(tmp_path, env=slow) as server, grpcclient.InferenceServerClient(server.grpc) as client:
        x = grpcclient.InferInput("x", [1, 1], "FP32")
        x.set_data_from_numpy(np.array([[1]], np.float32))
        assert client.infer("add", [x]).as_numpy("y").tolist() == [[2.0]]
        assert client.get_model_config("add").config.name == "add"
        assert client.get_inference_statistics("add").model_stats[0].inference_count == 1
