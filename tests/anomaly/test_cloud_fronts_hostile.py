"""Ways around a restricted API, and a multi-model endpoint whose caller means it ill."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from harm import PATIENCE_S, Victim, attacked, check_text, grpc_error, raw_stub, row, save_python

from doorstep.testing.http2_client import Http2Client, request
from doorstep.testing.onnx_models import save_adder
from doorstep.testing.server import free_ports

CLOSED = "health,metadata,inference,shared-memory,model-config,model-repository,statistics,trace,logging"
SECRET = "open sesame"
KEY = {"X-Key": SECRET}
TEXTS = """
backend: "python"
input { name: "x" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
"""
SLOW = """
import os
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def initialize(self, args):
        open(os.environ["GATE"]).read()

    def execute(self, requests):
        pass
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("fronts") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    return models


class Closed(Victim):
    sagemaker: int
    vertex: int


@pytest.fixture(scope="module")
def closed(models: Path) -> Iterator[Closed]:
    sagemaker, vertex = free_ports(2)
    options = (
        *("--allow-sagemaker=true", f"--sagemaker-port={sagemaker}", "--allow-vertex-ai=true"),
        *(f"--vertex-ai-port={vertex}", "--vertex-ai-default-model=add", "--model-control-mode=explicit"),
        *("--load-model=add", "--allow-client-shm=true", "--http-header-forward-pattern=.*"),
        f"--http-restricted-api={CLOSED}:X-Key={SECRET}",
        f"--grpc-restricted-protocol={CLOSED}:x-key={SECRET}",
    )
    env = {
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_HEALTH_ROUTE": "/health",
        "SAGEMAKER_TRITON_DEFAULT_MODEL_NAME": "add",
    }
    server = Closed(models, *options, env=env)
    server.ready_url = server.metrics_url  # its health is closed too
    server.sagemaker, server.vertex = sagemaker, vertex
    with server:
        server.wait_for(lambda: server.call("GET", "/v2/health/ready", headers=KEY)[0] == 200, "it is ready")
        yield server
        server.assert_sound()


PATHS = [
    *("/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/models/add", "/v2/models/add/ready"),
    *("/v2/models/add/config", "/v2/models/add/stats", "/v2/models/stats", "/v2/models/add/versions/1"),
    *("/v2/models/add/versions/1/config", "/v2/models/add/versions/1/ready", "/v2/models/add/versions/1/stats"),
    *("/v2/models/add/infer", "/v2/models/add/versions/1/infer", "/v2/models/add/generate"),
    *("/v2/models/add/generate_stream", "/v2/models/add/versions/1/generate", "/v2/repository/index"),
    *("/v2/repository/models/add/load", "/v2/repository/models/add/unload", "/v2/repository/r/models/add/unload"),
    *("/v2/repository/r/models/add/load", "/v2/repository/r/index", "/v2/logging", "/v2/trace/setting"),
    *("/v2/models/add/trace/setting", "/v2/systemsharedmemory/status", "/v2/cudasharedmemory/status"),
    *("/v2/systemsharedmemory/region/r/register", "/v2/systemsharedmemory/unregister"),
    *("/v2/systemsharedmemory/region/r/status", "/v2/cudasharedmemory/region/r/register"),
    *("/ping", "/invocations", "/models", "/models/", "/models/add", "/models/add/invoke", "/predict", "/health"),
]


def spellings(path: str) -> Iterator[str]:
    yield path
    yield path + "/"
    yield path + "?x=1"
    yield path + ";x=1"
    yield path + "%2f"
    yield path + "#x"
    yield path.replace("/", "//", 1)
    yield path.replace("/", "//")
    yield path.replace("/", "/./")
    yield path.replace("/", "/x/../", 1)
    yield path.replace("/", "/%2e/", 1)
    yield path.replace("add", "%61dd")
    yield path.replace("add", "add%00")
    yield path.replace("v2", "%762").replace("models", "model%73")
    yield path.upper()
    yield path.replace("/", "\\")
    yield "/" + path.replace("/", "%2F")[3:]
    yield "http://x" + path
    yield "http://x:1@y" + path
    yield path.replace("infer", "INFER").replace("load", "Load").replace("models", "MODELS")


def one(connection: http.client.HTTPConnection, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    connection.putrequest(method, path, skip_accept_encoding=True)
    for name, value in {"content-length": str(len(BODY)), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders(BODY)
    answer = connection.getresponse()
    text = answer.read()
    check_text(text, path)
    return answer.status, text


BODY = json.dumps({"inputs": [row()], "x": [1.0], "model_name": "add", "url": "/opt/ml/models/a/model"}).encode()


@pytest.mark.parametrize("front", ["http", "sagemaker", "vertex"])
def test_no_other_spelling_opens_what_is_closed(closed: Closed, front: str) -> None:
    port = {"http": closed.http_port, "sagemaker": closed.sagemaker, "vertex": closed.vertex}[front]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    for path in PATHS:
        for spelt in dict.fromkeys(spellings(path)):
            for method in ("GET", "POST", "DELETE"):
                status, text = one(connection, method, spelt, {})
                assert status in (400, 403, 404, 405), (method, spelt, status, text)
    connection.close()


WRONG_KEYS = ["", SECRET[:-1], SECRET + "x", SECRET.upper(), f"{SECRET}, {SECRET}", f'"{SECRET}"', "None", "*"]


@pytest.mark.parametrize("name", ["X-Key", "triton-grpc-protocol-x-key", "X-Key-Bin", "Cookie", "Authorization"])
def test_no_other_key_opens_what_is_closed(closed: Closed, name: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", closed.http_port, timeout=PATIENCE_S)
    for key in [*WRONG_KEYS, *([SECRET] if name != "X-Key" else [])]:
        assert one(connection, "GET", "/v2/models/add/config", {name: key})[0] == 403
    assert one(connection, "GET", "/v2/models/add/config", {"x-kEY": SECRET})[0] == 200
    connection.close()


@pytest.mark.parametrize("key", [None, *WRONG_KEYS])
def test_a_redirect_opens_nothing(closed: Closed, key: str | None) -> None:
    """Vertex AI's front reaches the V2 paths by a header: each asks for its own key."""
    connection = http.client.HTTPConnection("127.0.0.1", closed.vertex, timeout=PATIENCE_S)
    headers = {} if key is None else {"X-Key": key}
    for path in PATHS:
        for spelt in dict.fromkeys(spellings(path)):
            redirect = {"X-Vertex-Ai-Triton-Redirect": spelt.lstrip("/"), **headers}
            status, text = one(connection, "POST", "/predict", redirect)
            assert status in (400, 403, 404, 405), (spelt, status, text)
    connection.close()


METHODS = [
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig"),
    *("ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "LogSettings"),
    *("CudaSharedMemoryStatus", "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister"),
]


@pytest.mark.parametrize("where", ["grpc", "http_port", "sagemaker", "vertex"])
def test_no_grpc_method_is_open_on_any_port(closed: Closed, where: str) -> None:
    port = closed.grpc_port if where == "grpc" else getattr(closed, where)
    headers = ((b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"x-key", SECRET.encode()))
    with closed.raw(port) as raw:
        client = Http2Client(raw)
        for number, method in enumerate(METHODS):
            path = f"/inference.GRPCInferenceService/{method}".encode()
            stream = 2 * number + 1
            client.send(request(stream, path, b"\0\0\0\0\0", extra=headers))
            status, body = client.answer(stream)
            # On gRPC's own port the error is in the trailers; the vendors' fronts know no such path.
            assert status in (400, 404) or (status, body) == (200, b""), (method, status, body)


def test_prefixes_of_the_key_say_nothing_over_grpc(closed: Closed) -> None:
    with closed.channel() as channel:
        for name in ("triton-grpc-protocol-x-key", "x-key", "triton-grpc-protocol-x-key-bin"):
            for key in WRONG_KEYS:
                metadata = [(name, key.encode() if name.endswith("-bin") else key)]
                code, text = grpc_error(lambda m=metadata: raw_stub(channel, "ModelConfig")(b"", metadata=m))
                assert (code, SECRET in text) == ("UNAVAILABLE", False)


# A multi-model endpoint


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gate") / "gate"
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def endpoint(models: Path, gate: Path) -> Iterator[Victim]:
    (port,) = free_ports(1)
    options = (
        "--model-control-mode=explicit",
        "--load-model=add",
        "--allow-sagemaker=true",
        f"--sagemaker-port={port}",
    )
    with Victim(models, *options, env={"GATE": str(gate), "TMPDIR": str(gate.parent)}) as server:
        server.sagemaker = port  # type: ignore[attr-defined]
        server.temporary = gate.parent  # type: ignore[attr-defined]
        yield server
        server.assert_sound()


@pytest.fixture
def archive() -> Iterator[Path]:
    """Where SageMaker puts a model; its path is fixed."""
    root = Path("/opt/ml/models") / f"hostile{os.getpid()}"
    try:
        (root / "model").mkdir(parents=True)
    except OSError:
        pytest.skip("/opt/ml/models cannot be written here")
    yield root
    shutil.rmtree(root)


def call(server: Any, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.sagemaker, timeout=PATIENCE_S)
    connection.request(method, path, body if body is None else json.dumps(body).encode(), headers or {})
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    check_text(text, "/opt/ml/models")
    return answer.status, text


def places(server: Any) -> set[str]:
    """What the server keeps in its own folder for temporary files."""
    return {name for name in os.listdir(server.temporary) if name.startswith("doorstep-sagemaker-")}


def test_a_model_that_is_loading_is_not_unloaded_and_no_model_twice(endpoint: Any, archive: Path, gate: Path) -> None:
    save_python(archive / "model", "slow", SLOW, TEXTS)
    before = places(endpoint)
    with attacked(endpoint):
        answers: list[tuple[int, bytes]] = []
        load = {"model_name": "h", "url": f"{archive}/model"}
        loader = threading.Thread(target=lambda: answers.append(call(endpoint, "POST", "/models", load)))
        loader.start()
        with open(gate, "w"):  # it is in its `initialize` now
            assert call(endpoint, "POST", "/models", load)[0] == 409
            unloads = [
                threading.Thread(target=lambda: answers.append(call(endpoint, "DELETE", "/models/h"))) for _ in range(4)
            ]
            for thread in unloads:
                thread.start()
            assert call(endpoint, "GET", "/models/h")[0] == 200
        for thread in (loader, *unloads):
            thread.join(PATIENCE_S)
        assert sorted(status for status, _ in answers)[0] == 200, answers
        assert all(status in (200, 404, 409, 400) for status, _ in answers), answers
        call(endpoint, "DELETE", "/models/h")
        assert call(endpoint, "GET", "/models") == (200, b'{"models":[]}')
        endpoint.wait_for(lambda: not endpoint.workers, "its process has ended")
    assert places(endpoint) == before


def test_an_error_says_nothing_of_where_the_model_is(endpoint: Any, archive: Path) -> None:
    save_python(archive / "model", "bare", "class TritonPythonModel:\n    pass\n", TEXTS)
    with attacked(endpoint):
        status, text = call(endpoint, "POST", "/models", {"model_name": "h", "url": f"{archive}/model"})
        assert (status, b"does not implement `execute` method" in text, b"/opt" in text) == (400, True, False)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a\0b", None),
        ("x" * 300, None),
        ("..", None),
        ("a/b", None),
        ("\ud800", None),
        ("a\nb", None),
        ("", None),
        ("h", ".."),
        ("h", "a/../b"),
        ("h", "x" * 300),
        ("h", "\xff"),
    ],
)
def test_names_no_folder_can_have(endpoint: Any, archive: Path, name: str, target: str | None) -> None:
    save_adder(archive / "model" / "inner" / "1" / "model.onnx", 5.0)
    before = places(endpoint)
    with attacked(endpoint):
        headers = {} if target is None else {"X-Amzn-SageMaker-Target-Model": target}
        status, text = call(endpoint, "POST", "/models", {"model_name": name, "url": f"{archive}/model"}, headers)
        if status == 200:
            path = f"/models/{quote(name)}"
            assert call(endpoint, "DELETE", path, headers=headers)[0] == 200
        else:
            assert status == 400, text
        assert call(endpoint, "GET", "/models") == (200, b'{"models":[]}')
    assert places(endpoint) == before


def test_a_config_that_is_no_text_and_one_that_never_ends(endpoint: Any, archive: Path) -> None:
    before = places(endpoint)
    load = {"model_name": "h", "url": f"{archive}/model"}
    inner = archive / "model" / "inner"
    save_adder(inner / "1" / "model.onnx", 5.0)
    with attacked(endpoint):
        (inner / "config.pbtxt").write_bytes(b"\xff\xfe\0")
        assert call(endpoint, "POST", "/models", load)[0] == 400
        (inner / "config.pbtxt").unlink()
        for make, remove in (
            (os.mkfifo, os.unlink),
            (os.mkdir, os.rmdir),
            (lambda path: os.symlink("/dev/zero", path), os.unlink),
        ):
            make(inner / "config.pbtxt")
            assert call(endpoint, "POST", "/models", load)[0] == 400
            remove(inner / "config.pbtxt")
        os.symlink(inner / "config.pbtxt", inner / "config.pbtxt")
        assert call(endpoint, "POST", "/models", load)[0] == 400
        assert call(endpoint, "GET", "/models") == (200, b'{"models":[]}')
    assert places(endpoint) == before


def test_nobody_unloads_the_models_of_others(endpoint: Any, archive: Path) -> None:
    """By a target that the model was not loaded for."""
    save_adder(archive / "model" / "inner" / "1" / "model.onnx", 5.0)
    with attacked(endpoint):
        assert call(endpoint, "POST", "/models", {"model_name": "h", "url": f"{archive}/model"})[0] == 200
        target = {"X-Amzn-SageMaker-Target-Model": "add"}
        assert call(endpoint, "DELETE", "/models/h", headers=target)[0] == 400
        assert call(endpoint, "POST", "/models/h/invoke", {"inputs": [row()]}, target)[0] == 400
        assert call(endpoint, "DELETE", "/models/h")[0] == 200
