"""The clients people have, against `doorstep serve` as people start it. Knows nothing of the inside.

Every client gets the same model and the same answer; what each can do besides is done once.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcclient_aio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpclient_aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from doorstep.client import AsyncClient, Client
from doorstep.testing.onnx_models import save_adder
from doorstep.testing.server import ServerProcess, doorstep_command

pytestmark = pytest.mark.xdist_group("clients")

SECONDS = 60
X = np.array([[1.5], [2.5]], np.float32)
Y = X + 1
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 1], "data": [1.5, 2.5]}]}
OUTPUT = {"name": "y", "datatype": "FP32", "shape": [2, 1], "data": [2.5, 3.5]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("clients")
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_adder(models / "spare" / "1" / "model.onnx", 2)
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=add") as found:
        yield found


def http_input(module: Any = httpclient) -> Any:
    return module.InferInput("x", [2, 1], "FP32").set_data_from_numpy(X)


def grpc_message() -> Any:
    message = service_pb2.ModelInferRequest(model_name="add")
    message.inputs.add(name="x", datatype="FP32", shape=[2, 1])
    message.raw_input_contents.append(X.tobytes())
    return message


def run(*command: str, stdin: bytes = b"") -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def needs(program: str) -> Any:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


# One answer, every client


def by_tritonclient_http(server: ServerProcess) -> Any:
    with httpclient.InferenceServerClient(server.http) as client:
        return client.infer("add", [http_input()]).as_numpy("y")


def by_tritonclient_grpc(server: ServerProcess) -> Any:
    with grpcclient.InferenceServerClient(server.grpc) as client:
        return client.infer("add", [http_input(grpcclient)]).as_numpy("y")


def by_tritonclient_http_aio(server: ServerProcess) -> Any:
    async def infer() -> Any:
        async with httpclient_aio.InferenceServerClient(server.http) as client:
            return (await client.infer("add", [http_input()])).as_numpy("y")

    return asyncio.run(infer())


def by_tritonclient_grpc_aio(server: ServerProcess) -> Any:
    async def infer() -> Any:
        async with grpcclient_aio.InferenceServerClient(server.grpc) as client:
            return (await client.infer("add", [http_input(grpcclient_aio)])).as_numpy("y")

    return asyncio.run(infer())


def by_grpcio(server: ServerProcess) -> Any:
    with grpc.insecure_channel(server.grpc) as channel:
        answer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(grpc_message(), timeout=SECONDS)
    return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)


def by_requests(server: ServerProcess) -> Any:
    with requests.Session() as session:
        session.trust_env = False
        answer = session.post(server.url("/v2/models/add/infer"), json=BODY, timeout=SECONDS)
    assert answer.json()["outputs"] == [OUTPUT]
    return np.array(answer.json()["outputs"][0]["data"], np.float32).reshape(2, 1)


def by_curl(*options: str) -> Callable[[ServerProcess], Any]:
    def call(server: ServerProcess) -> Any:
        text = run(
            "curl", "-sS", "--noproxy", "*", *options, "-d", json.dumps(BODY), server.url("/v2/models/add/infer")
        )
        assert json.loads(text)["outputs"] == [OUTPUT]
        return np.array(json.loads(text)["outputs"][0]["data"], np.float32).reshape(2, 1)

    return call


def by_doorstep(server: ServerProcess) -> Any:
    with Client(server.url("")) as client:
        return client.infer("add", x=X)


def by_doorstep_async(server: ServerProcess) -> Any:
    async def infer() -> Any:
        async with AsyncClient(server.url("")) as client:
            return await client.infer("add", x=X)

    return asyncio.run(infer())


CLIENTS = {
    "tritonclient.http": by_tritonclient_http,
    "tritonclient.http.aio": by_tritonclient_http_aio,
    "tritonclient.grpc": by_tritonclient_grpc,
    "tritonclient.grpc.aio": by_tritonclient_grpc_aio,
    "grpcio": by_grpcio,
    "requests": by_requests,
    "curl": by_curl(),
    "curl, HTTP/2": by_curl("--http2-prior-knowledge"),
    "curl, HTTP/1.0": by_curl("--http1.0"),
    "curl, compressed": by_curl("--compressed"),
    "curl, chunked": by_curl("-H", "transfer-encoding: chunked"),
    "doorstep.client": by_doorstep,
    "doorstep.client, asyncio": by_doorstep_async,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_gets_the_answer(server: ServerProcess, client: str) -> None:
    found = CLIENTS[client](server)
    assert np.array_equal(found, Y)


def test_all_of_them_at_once_get_the_answer(server: ServerProcess) -> None:
    # The blocking tritonclient.http runs on gevent, whose patches of a thread end with that thread.
    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        for done in [pool.submit(call, server) for call in CLIENTS.values() for _ in range(3)]:
            assert np.array_equal(done.result(SECONDS), Y)


# What the protocol has besides inference, over tritonclient's four faces


class Face:
    """One of tritonclient's four modules as one kind of client; answers as dicts."""

    def __init__(self, name: str, server: ServerProcess) -> None:
        self.grpc = "grpc" in name
        address = server.grpc if self.grpc else server.http
        self._loop = asyncio.new_event_loop() if name.endswith("aio") else None
        modules = {"http": httpclient, "http.aio": httpclient_aio, "grpc": grpcclient, "grpc.aio": grpcclient_aio}
        self._client = self._wait(self._made(modules[name], address))

    async def _made_async(self, module: Any, address: str) -> Any:
        return module.InferenceServerClient(address)

    def _made(self, module: Any, address: str) -> Any:
        if self._loop is None:
            return module.InferenceServerClient(address)
        return self._made_async(module, address)

    def _wait(self, value: Any) -> Any:
        return value if self._loop is None else self._loop.run_until_complete(value)

    def __call__(self, method: str, *args: Any, **rest: Any) -> Any:
        found = self._wait(getattr(self._client, method)(*args, **rest))
        if not self.grpc or not hasattr(found, "DESCRIPTOR"):
            return found
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(found, preserving_proto_field_name=True)

    def close(self) -> None:
        self._wait(self._client.close())
        if self._loop is not None:
            self._loop.close()


@pytest.fixture(params=["http", "http.aio", "grpc", "grpc.aio"])
def face(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Face]:
    found = Face(request.param, server)
    yield found
    found.close()


def test_health_and_metadata(face: Face) -> None:
    assert face("is_server_live") is True
    assert face("is_server_ready") is True
    assert face("is_model_ready", "add") is True
    assert face("is_model_ready", "spare") is False
    assert "binary_tensor_data" in face("get_server_metadata")["extensions"]
    metadata = face("get_model_metadata", "add")
    assert (metadata["name"], metadata["versions"]) == ("add", ["1"])
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, 1]
    config = face("get_model_config", "add")
    config = config.get("config", config)
    assert (config["name"], config["backend"]) == ("add", "onnxruntime")


def test_the_repository_is_seen_and_controlled(face: Face) -> None:
    def states() -> dict[str, str]:
        found = face("get_model_repository_index")
        rows = found["models"] if face.grpc else found
        return {row["name"]: row.get("state", "") for row in rows}

    assert states()["add"] == "READY"
    face("load_model", "spare")
    assert states()["spare"] == "READY"
    assert face("is_model_ready", "spare") is True
    face("unload_model", "spare")
    assert face("is_model_ready", "spare") is False
    with pytest.raises(
        InferenceServerException, match="failed to load 'nowhere', failed to poll from model repository"
    ):
        face("load_model", "nowhere")


def test_statistics_count_what_was_inferred(face: Face) -> None:
    def count() -> int:
        (row,) = face("get_inference_statistics", "add")["model_stats"]
        return int(row["inference_stats"]["success"]["count"])

    before = count()
    module = grpcclient if face.grpc else httpclient
    face("infer", "add", [http_input(module)])
    assert count() == before + 1


def test_errors_come_as_the_clients_exception(face: Face) -> None:
    module = grpcclient if face.grpc else httpclient
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nowhere' is not found") as caught:
        face("infer", "nowhere", [http_input(module)])
    assert caught.value.status() in ("404", "StatusCode.NOT_FOUND")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(server: ServerProcess, algorithm: str) -> None:
    x = np.zeros((4, 1), np.float32)
    with httpclient.InferenceServerClient(server.http) as client:
        sent = httpclient.InferInput("x", [4, 1], "FP32").set_data_from_numpy(x)
        result = client.infer(
            "add", [sent], request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
        )
        assert np.array_equal(result.as_numpy("y"), x + 1)
    with grpcclient.InferenceServerClient(server.grpc) as client:
        sent = grpcclient.InferInput("x", [4, 1], "FP32").set_data_from_numpy(x)
        result = client.infer("add", [sent], compression_algorithm=algorithm)
        assert np.array_equal(result.as_numpy("y"), x + 1)


def test_async_infer_of_the_blocking_clients(server: ServerProcess) -> None:
    with httpclient.InferenceServerClient(server.http, concurrency=4) as client:
        pending = [client.async_infer("add", [http_input()]) for _ in range(20)]
        assert all(np.array_equal(p.get_result().as_numpy("y"), Y) for p in pending)
    with grpcclient.InferenceServerClient(server.grpc) as client:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        for _ in range(20):
            client.async_infer("add", [http_input(grpcclient)], lambda result, error: answers.put((result, error)))
        for _ in range(20):
            result, error = answers.get(timeout=SECONDS)
            assert error is None
            assert np.array_equal(result.as_numpy("y"), Y)


# grpc's own services, and other HTTP/2 clients


def test_health_checking_as_kubernetes_and_grpcurl_do_it(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_tells_the_services_and_their_messages(server: ServerProcess) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "inference.GRPCInferenceService" in database.get_services()
        file = database.FindFileContainingSymbol("inference.ModelInferRequest")
        (message,) = [m for m in file.message_type if m.name == "ModelInferRequest"]
        assert "raw_input_contents" in [field.name for field in message.field]


@needs("nghttp")
def test_nghttp_gets_the_answer(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "body").write_text(json.dumps(BODY))
    text = run("nghttp", "-d", str(tmp_path / "body"), server.url("/v2/models/add/infer"))
    assert json.loads(text)["outputs"] == [OUTPUT]


@needs("h2load")
@pytest.mark.parametrize("protocol", [[], ["--h1"]], ids=["HTTP/2", "HTTP/1.1"])
def test_h2load_counts_only_successes(server: ServerProcess, tmp_path: Path, protocol: list[str]) -> None:
    (tmp_path / "body").write_text(json.dumps(BODY))
    text = run(
        "h2load", *protocol, "-n", "400", "-c", "4", "-m", "8", "-d", str(tmp_path / "body"),
        server.url("/v2/models/add/infer"),
    )  # fmt: skip
    assert re.search(r"status codes: 400 2xx, 0 3xx, 0 4xx, 0 5xx", text), text


def test_the_command_line_asks_the_same_server(server: ServerProcess) -> None:
    text = run(*doorstep_command(), "models", f"--url={server.url('')}")
    assert re.search(r"add\b.*READY", text), text


# Restricted APIs


def test_restricted_apis_need_their_header_over_every_client(tmp_path: Path) -> None:
    save_adder(tmp_path / "add" / "1" / "model.onnx", 1)
    with ServerProcess(
        tmp_path,
        "--http-restricted-api=model-repository,statistics:admin-key=secret",
        "--grpc-restricted-protocol=model-repository,statistics:admin-key=secret",
    ) as server:
        key = {"admin-key": "secret"}
        with httpclient.InferenceServerClient(server.http) as client:
            assert client.infer("add", [http_input()]).as_numpy("y").tolist() == Y.tolist()
            with pytest.raises(InferenceServerException, match="This API is restricted, expecting header 'admin-key'"):
                client.get_model_repository_index()
            assert client.get_model_repository_index(headers=key)[0]["name"] == "add"
        key = {"triton-grpc-protocol-admin-key": "secret"}
        with grpcclient.InferenceServerClient(server.grpc) as client:
            with pytest.raises(InferenceServerException, match="This protocol is restricted, expecting header"):
                client.get_inference_statistics()
            assert client.get_inference_statistics(headers=key).model_stats[0].name == "add"
