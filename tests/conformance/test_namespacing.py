"""--model-namespacing: models of one name in two repositories, over HTTP and gRPC with Triton's own clients.

What is expected is the behaviour of Triton's L0_model_namespacing: an ensemble takes the model of its own repository,
and a name that two models have is of none of them alone.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("namespacing")

CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_FP32 dims: 1 }
"""
MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", request.inputs()[0].as_numpy() + ADDED)])
            for request in requests
        ]
"""
ENSEMBLE = """
platform: "ensemble"
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_FP32 dims: 1 }
ensemble_scheduling { step {
    model_name: "same" model_version: -1
    input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }
} }
"""


def save(repository: Path, name: str, config: str, code: str = "") -> None:
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(config)
    if code:
        (repository / name / "1" / "model.py").write_text(code)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    for repository, ensemble, added in ((first, "adds_ten", 10), (second, "adds_twenty", 20)):
        save(repository, "same", CONFIG, MODEL.replace("ADDED", str(added)))
        save(repository, ensemble, ENSEMBLE)
    save(second, "alone", CONFIG, MODEL.replace("ADDED", "1"))
    with ServerProcess(first, f"--model-repository={second}", "--model-namespacing=true") as found:
        found.first = str(first)  # type: ignore[attr-defined]
        yield found


@pytest.fixture(params=["http", "grpc"])
def module(request: pytest.FixtureRequest) -> Any:
    return triton_http if request.param == "http" else triton_grpc


@pytest.fixture
def client(server: ServerProcess, module: Any) -> Iterator[Any]:
    address = server.grpc if module is triton_grpc else server.http.removeprefix("http://")
    with module.InferenceServerClient(address) as found:
        yield found


def infer(module: Any, client: Any, model: str) -> float:
    tensor = module.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.ones(1, np.float32))
    return float(client.infer(model, [tensor]).as_numpy("y")[0])


def test_an_ensemble_takes_the_model_of_its_own_repository(module: Any, client: Any) -> None:
    assert [infer(module, client, name) for name in ("adds_ten", "adds_twenty", "alone")] == [11, 21, 2]
    assert all(client.is_model_ready(name) for name in ("adds_ten", "adds_twenty", "alone"))


def test_a_name_that_two_models_have_is_refused(module: Any, client: Any) -> None:
    with pytest.raises(InferenceServerException) as caught:
        infer(module, client, "same")
    assert caught.value.message() == (
        "There are 2 identifiers of model 'same' in global map, model namespace must be provided to resolve ambiguity."
    )
    assert infer(module, client, "alone") == 2


def test_the_index_and_the_metrics_have_both(server: ServerProcess, module: Any, client: Any) -> None:
    index = client.get_model_repository_index()
    rows = index if module is triton_http else [{"name": row.name, "state": row.state} for row in index.models]
    assert sorted((row["name"], row["state"]) for row in rows) == [
        (name, "READY") for name in ("adds_ten", "adds_twenty", "alone", "same", "same")
    ]
    before = _successes(server)
    infer(module, client, "adds_ten")
    after = _successes(server)
    assert {found for found in after if after[found] == before[found] + 1} == {
        ("adds_ten", server.first),  # type: ignore[attr-defined]
        ("same", server.first),  # type: ignore[attr-defined]
    }


def _successes(server: ServerProcess) -> dict[tuple[str, str], float]:
    """By model and namespace."""
    with urllib.request.urlopen(server.metrics_url, timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.labels["model"], sample.labels["namespace"]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.removesuffix("_total") == "nv_inference_request_success"
    }
