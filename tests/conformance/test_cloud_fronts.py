"""SageMaker's and Vertex AI's fronts of a real server, with Triton's answers.

(server, sagemaker_server.cc and vertex_ai_server.cc)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.http as httpclient

from doorstep.testing.onnx_models import save_adder
from doorstep.testing.server import ServerProcess, free_ports

TIMEOUT_S = 20
SAGEMAKER = "application/vnd.sagemaker-triton.binary+json;json-header-size="
VERTEX = "application/vnd.vertex-ai-triton.binary+json;json-header-size="
SECRET = {"admin-key": "s"}
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1]}]}


class Front:
    """A server with one vendor's front."""

    def __init__(self, server: ServerProcess, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}"

    def call(self, method: str, path: str, **rest: Any) -> requests.Response:
        return requests.request(method, self.url + path, timeout=TIMEOUT_S, **rest)

    def redirected(self, to: str, **rest: Any) -> requests.Response:
        headers = {"X-Vertex-Ai-Triton-Redirect": to, **rest.pop("headers", {})}
        return self.call("POST", "/predict", headers=headers, **rest)


def binary_body(mime: str) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    text = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    return text + np.float32(1).tobytes(), {"content-type": f"{mime}{len(text)}"}


def binary_answer(found: requests.Response, mime: str) -> float:
    kind = found.headers["content-type"]
    assert kind.startswith(mime), (kind, found.content)
    size = int(kind.removeprefix(mime))
    assert json.loads(found.content[:size])["outputs"][0]["parameters"] == {"binary_data_size": 4}
    return float(np.frombuffer(found.content[size:], np.float32)[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_adder(root / "adder" / "1" / "model.onnx", 10.0)
    return root


@pytest.fixture(scope="module")
def sagemaker(models: Path) -> Iterator[Front]:
    (port,) = free_ports(1)
    env = {"SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "adder"}
    with ServerProcess(
        models,
        "--allow-sagemaker=true",
        f"--sagemaker-port={port}",
        "--http-restricted-api=model-repository:admin-key=s",
        env=env,
    ) as server:
        yield Front(server, port)


@pytest.fixture(scope="module")
def vertex(models: Path) -> Iterator[Front]:
    (port,) = free_ports(1)
    env = {"AIP_MODE": "PREDICTION", "AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/health"}
    with ServerProcess(
        models,
        "--allow-http=true",
        f"--vertex-ai-port={port}",
        "--http-restricted-api=model-config,statistics:admin-key=s",
        env=env,
    ) as server:
        yield Front(server, port)


# SageMaker


def test_sagemaker_pings(sagemaker: Front) -> None:
    assert (sagemaker.call("GET", "/ping").status_code, sagemaker.call("GET", "/ping").content) == (200, b"")
    assert sagemaker.call("POST", "/ping").status_code == 405


def test_sagemaker_invokes_its_default_model(sagemaker: Front) -> None:
    found = sagemaker.call("POST", "/invocations", json=BODY)
    assert (found.status_code, found.json()["outputs"][0]["data"]) == (200, [11.0])
    assert sagemaker.call("GET", "/invocations").status_code == 405


def test_sagemakers_type_says_how_long_the_json_is(sagemaker: Front) -> None:
    body, headers = binary_body(SAGEMAKER)
    # What the V2 protocol uses instead does not come through, and nothing is compressed.
    headers |= {"inference-header-content-length": "3", "accept-encoding": "gzip"}
    found = sagemaker.call("POST", "/invocations", data=body, headers=headers)
    assert binary_answer(found, SAGEMAKER) == 11.0
    assert "content-encoding" not in found.headers


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        (f"x;{SAGEMAKER}3", f"expect MIME type for binary data starts with '{SAGEMAKER}', got: x;{SAGEMAKER}3"),
        (f"{SAGEMAKER}abc", "Unable to parse inference header size, got: abc"),
        (f"{SAGEMAKER}99999999999", "Unable to parse inference header size, value is out of range, got: 99999999999"),
        (f"{SAGEMAKER}-1", "inference header size should be in range (0, 2), got: -1"),
        (f"{SAGEMAKER}3", "inference header size should be in range (0, 2), got: 3"),
    ],
)
def test_a_wrong_type_is_refused(sagemaker: Front, content_type: str, text: str) -> None:
    found = sagemaker.call("POST", "/invocations", data=b"{}", headers={"content-type": content_type})
    assert (found.status_code, found.json()) == (400, {"error": text})


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/"), ("GET", "/v2"), ("POST", "/v2/models/adder/infer"), ("PUT", "/models")]
)
def test_sagemaker_has_no_other_paths(sagemaker: Front, method: str, path: str) -> None:
    found = sagemaker.call(method, path)
    assert (found.status_code, found.content) == (400, b"")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/models"), ("POST", "/models"), ("GET", "/models/a"), ("DELETE", "/models/a")]
)
def test_restrictions_hold_for_sagemakers_models(sagemaker: Front, method: str, path: str) -> None:
    found = sagemaker.call(method, path)
    text = "This API is restricted, expecting header 'admin-key'"
    assert (found.status_code, found.json()) == (403, {"error": text})
    assert sagemaker.call(method, path, headers=SECRET).status_code != 403


def test_models_are_loaded_in_explicit_mode_only(sagemaker: Front) -> None:
    assert sagemaker.call("GET", "/models", headers=SECRET).json() == {"models": []}
    assert sagemaker.call("GET", "/models/a", headers=SECRET).status_code == 404
    assert sagemaker.call("DELETE", "/models/a", headers=SECRET).status_code == 404
    assert sagemaker.call("POST", "/models/a/invoke", json=BODY).status_code == 404


@pytest.mark.parametrize("url", ["/proc/self", "/dev/shm/x", "/opt/ml/models/../../../sys/x", "/tmp/x", "", "/opt/ml"])
def test_a_path_that_is_not_sagemakers_is_refused(sagemaker: Front, url: str) -> None:
    found = sagemaker.call("POST", "/models", json={"model_name": "a", "url": url}, headers=SECRET)
    assert found.status_code == 400
    assert sagemaker.call("GET", "/models", headers=SECRET).json() == {"models": []}


@pytest.fixture
def archive() -> Iterator[Path]:
    """Where SageMaker puts a model; its path is fixed."""
    root = Path("/opt/ml/models") / f"doorstep{os.getpid()}"
    try:
        (root / "model").mkdir(parents=True)
    except OSError:
        pytest.skip("/opt/ml/models cannot be written here")
    yield root
    shutil.rmtree(root)


def test_a_model_of_a_multi_model_endpoint_is_loaded_invoked_and_unloaded(archive: Path, tmp_path: Path) -> None:
    save_adder(archive / "model" / "inner" / "1" / "model.onnx", 5.0)
    (archive / "model" / "inner" / "config.pbtxt").write_text('name: "inner"\nbackend: "onnxruntime"\n')
    (port,) = free_ports(1)
    options = ("--model-control-mode=explicit", "--allow-sagemaker=true", f"--sagemaker-port={port}")
    load = {"model_name": "hash1", "url": f"{archive}/model"}
    target = {"X-Amzn-SageMaker-Target-Model": "adder.tar.gz"}
    with ServerProcess(tmp_path, *options) as server:
        front = Front(server, port)
        found = front.call("POST", "/models", json=load, headers=target)
        assert (found.status_code, found.content) == (200, b"")
        assert front.call("POST", "/models", json=load, headers=target).status_code == 409
        assert front.call("GET", "/models/hash1").json() == {"modelName": "hash1", "modelUrl": f"{archive}/model"}
        found = front.call("POST", "/models/hash1/invoke", json=BODY, headers=target)
        assert found.json()["outputs"][0]["data"] == [6.0]
        wrong = {"inputs": [{**BODY["inputs"][0], "datatype": "INT32"}]}
        assert front.call("POST", "/models/hash1/invoke", json=wrong, headers=target).status_code == 400
        assert front.call("POST", "/models/hash1/invoke", json=BODY).status_code == 400  # no model is called so
        found = front.call("DELETE", "/models/hash1", headers=target)
        assert (found.status_code, found.content) == (200, b"")
        assert front.call("GET", "/models").json() == {"models": []}
        assert front.call("POST", "/models/hash1/invoke", json=BODY, headers=target).status_code == 404
        missing = {"model_name": "hash2", "url": f"{archive}/model/nothing"}
        assert front.call("POST", "/models", json=missing).status_code == 400
        assert front.call("POST", "/models", json=load, headers=target).status_code == 200  # and again


# Vertex AI


def test_vertex_ai_asks_for_health_and_predicts_with_the_only_model(vertex: Front) -> None:
    assert vertex.call("GET", "/health").status_code == 200
    found = vertex.call("POST", "/predict", json=BODY)
    assert (found.status_code, found.json()["outputs"][0]["data"]) == (200, [11.0])


def test_vertex_ais_type_says_how_long_the_json_is_and_answers_have_the_header(vertex: Front) -> None:
    body, headers = binary_body(VERTEX)
    headers |= {"accept-encoding": "gzip"}
    for found in (
        vertex.call("POST", "/predict", data=body, headers=headers),
        vertex.redirected("v2/models/adder/versions/1/infer", data=body, headers=headers),
    ):
        assert (found.headers["content-type"], found.headers.get("content-encoding")) == (
            "application/octet-stream",
            None,
        )
        result = httpclient.InferenceServerClient.parse_response_body(
            found.content, header_length=int(found.headers["Inference-Header-Content-Length"])
        )
        assert result.as_numpy("y").tolist() == [[11.0]]


@pytest.mark.parametrize(
    ("to", "key"),
    [
        ("v2", "extensions"),
        ("v2/models/adder", "platform"),
        ("v2/models/adder/versions/1", "platform"),
    ],
)
def test_a_redirect_reaches_what_reads(vertex: Front, to: str, key: str) -> None:
    found = vertex.redirected(to)
    assert (found.status_code, key in found.json()) == (200, True)


@pytest.mark.parametrize(
    ("to", "body"),
    [
        ("v2/health/live", b""),
        ("v2/health/ready", b""),
        ("v2/models/adder/ready", b""),
        ("v2/systemsharedmemory/status", b"[]"),
        ("v2/cudasharedmemory/status", b"[]"),
        ("v2/repository/index", b'[{"name":"adder","version":"1","state":"READY"}]'),
    ],
)
def test_a_redirect_reaches_health_and_lists(vertex: Front, to: str, body: bytes) -> None:
    found = vertex.redirected(to)
    assert (found.status_code, found.content) == (200, body)


def test_a_redirect_reaches_the_metrics(vertex: Front) -> None:
    assert "nv_inference_count" in vertex.redirected("metrics").text


@pytest.mark.parametrize("to", ["v2/models/adder/config", "v2/models/adder/stats", "v2/models/stats"])
def test_restrictions_hold_for_what_a_redirect_reaches(vertex: Front, to: str) -> None:
    found = vertex.redirected(to)
    text = "This API is restricted, expecting header 'admin-key'"
    assert (found.status_code, found.json()) == (403, {"error": text})
    assert vertex.redirected(to, headers=SECRET).status_code == 200


@pytest.mark.parametrize(
    "to",
    [
        "v2/repository/models/adder/unload",
        "v2/repository/models/adder/load",
        "v2/repository/x/models/adder/load",
        "v2/systemsharedmemory/region/a/register",
        "v2/systemsharedmemory/unregister",
        "v2/cudasharedmemory/region/a/unregister",
    ],
)
def test_a_redirect_reaches_nothing_that_changes(vertex: Front, to: str) -> None:
    found = vertex.redirected(to, headers=SECRET)
    assert (found.status_code, found.content) == (403, b"")


@pytest.mark.parametrize("to", ["", "v2/nope", "predict", "//v2", "v2/models/adder/generate", "v2/logging"])
def test_a_redirect_to_anywhere_else_is_refused(vertex: Front, to: str) -> None:
    assert vertex.redirected(to, headers=SECRET).status_code == 400


def test_vertex_ai_has_no_other_paths(vertex: Front) -> None:
    assert vertex.call("GET", "/predict").status_code in (400, 405)
    assert vertex.call("GET", "/v2").status_code == 400


def test_vertex_ai_needs_one_model_or_a_name(models: Path, tmp_path: Path) -> None:
    save_adder(tmp_path / "other" / "1" / "model.onnx", 1.0)
    (port,) = free_ports(1)
    env = {"AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/health", "AIP_HTTP_PORT": str(port)}
    for options, text in (
        ([], "Expect the model repository contains only a single model if default model is not specified"),
        (["--vertex-ai-default-model=nope"], "Expect the default model 'nope' is loaded"),
    ):
        server = ServerProcess([models, tmp_path], "--allow-vertex-ai=true", *options, env=env)
        server.launch()
        assert server.wait() == 1
        assert text in server.logs()
    with ServerProcess([models, tmp_path], "--allow-vertex-ai=true", "--vertex-ai-default-model=other", env=env):
        found = Front(server, port).call("POST", "/predict", json=BODY)
        assert found.json()["outputs"][0]["data"] == [2.0]
