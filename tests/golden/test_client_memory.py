"""Tensors in clients' shared memory, with tritonclient over HTTP (blocking and asyncio) and gRPC (calls and streams).

Rules and texts: server, shared_memory_manager.cc, common.cc, http_server.cc; extension_shared_memory.md.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpaio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, serialize_byte_tensor

from doorstep.testing.onnx_models import save_adder, save_identity
from doorstep.testing.server import ServerProcess

SECONDS = 30
DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."
Array = np.ndarray[Any, np.dtype[Any]]

# Waits for a line in the pipe `gate` beside it, once per request.
GATED = """
import os
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        with open(os.path.join(os.path.dirname(__file__), "gate")) as gate:
            gate.read()
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())])
                for r in requests]
"""
GATED_CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from onnx import TensorProto

    models = tmp_path_factory.mktemp("memory") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_identity(models / "same" / "1" / "model.onnx", shape=["N", "M"])
    save_identity(models / "texts" / "1" / "model.onnx", TensorProto.STRING, ["N", "M"])
    (models / "gated" / "1").mkdir(parents=True)
    (models / "gated" / "1" / "model.py").write_text(GATED)
    (models / "gated" / "config.pbtxt").write_text(GATED_CONFIG)
    os.mkfifo(models / "gated" / "1" / "gate")
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[ServerProcess]:
    with ServerProcess(models, "--allow-client-shm=true") as server:
        yield server
        assert "Traceback" not in server.logs(), server.logs()


class Client:
    """One of tritonclient's four, behind one blocking face."""

    name = "http"
    module: Any = httpclient

    def __init__(self, server: ServerProcess) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = self._made(server)

    def _made(self, server: ServerProcess) -> Any:
        return httpclient.InferenceServerClient(server.http, network_timeout=SECONDS)

    def call(self, method: str, *arguments: Any, **more: Any) -> Any:
        return getattr(self._client, method)(*arguments, **more)

    def infer(self, model: str, inputs: list[Any], outputs: list[Any] | None = None) -> Any:
        return self.call("infer", model, inputs, outputs=outputs)

    def status(self, name: str = "") -> dict[str, tuple[str, int, int]]:
        """Name → (key, offset, byte size)."""
        found = self.call("get_system_shared_memory_status", name)
        regions = found if isinstance(found, list) else [dict(r) for r in as_dicts(found)]
        return {r["name"]: (r["key"], int(r.get("offset", 0)), int(r["byte_size"])) for r in regions}

    def close(self) -> None:
        self._client.close()
        self._loop.close()


def as_dicts(message: Any) -> list[dict[str, Any]]:
    return [
        {"name": r.name, "key": r.key, "offset": r.offset, "byte_size": r.byte_size} for r in message.regions.values()
    ]


class AioClient(Client):
    name = "http-aio"
    module = httpaio

    def _made(self, server: ServerProcess) -> Any:
        async def make() -> Any:
            return httpaio.InferenceServerClient(server.http)

        return self._loop.run_until_complete(make())

    def call(self, method: str, *arguments: Any, **more: Any) -> Any:
        async def run() -> Any:
            return await getattr(self._client, method)(*arguments, **more)

        return self._loop.run_until_complete(run())

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class GrpcClient(Client):
    name = "grpc"
    module = grpcclient

    def _made(self, server: ServerProcess) -> Any:
        return grpcclient.InferenceServerClient(server.grpc)


class GrpcAioClient(AioClient):
    name = "grpc-aio"
    module = grpcclient

    def _made(self, server: ServerProcess) -> Any:
        async def make() -> Any:
            return grpcaio.InferenceServerClient(server.grpc)

        return self._loop.run_until_complete(make())


class StreamClient(GrpcClient):
    name = "grpc-stream"

    def infer(self, model: str, inputs: list[Any], outputs: list[Any] | None = None) -> Any:
        answers: queue.Queue[Any] = queue.Queue()
        self._client.start_stream(lambda result, error: answers.put(error or result))
        try:
            self._client.async_stream_infer(model, inputs, outputs=outputs)
            answer = answers.get(timeout=SECONDS)
        finally:
            self._client.stop_stream()
        if isinstance(answer, Exception):
            raise answer
        return answer


CLIENTS = (Client, AioClient, GrpcClient, GrpcAioClient, StreamClient)


@pytest.fixture(params=CLIENTS, ids=lambda made: str(made.name))
def client(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Client]:
    client = request.param(server)
    try:
        yield client
        assert client.status() == {}, "a test left regions registered"
    finally:
        client.call("unregister_system_shared_memory")
        client.close()


@contextmanager
def memory(size: int) -> Iterator[tuple[str, Any]]:
    """(its key, the client's handle on it)."""
    key = f"/test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region(key, key, size)
    try:
        yield key, handle
    finally:
        shm.destroy_shared_memory_region(handle)


@contextmanager
def registered(client: Client, size: int, name: str = "region") -> Iterator[Any]:
    with memory(size) as (key, handle):
        client.call("register_system_shared_memory", name, key, size)
        try:
            yield handle
        finally:
            client.call("unregister_system_shared_memory", name)


def lent(client: Client, name: str, shape: list[int], datatype: str, size: int, offset: int = 0) -> Any:
    given = client.module.InferInput(name, shape, datatype)
    given.set_shared_memory("region", size, offset=offset)
    return given


def wanted(client: Client, name: str, size: int, offset: int = 0) -> Any:
    output = client.module.InferRequestedOutput(name)
    output.set_shared_memory("region", size, offset=offset)
    return output


def refusal(call: Callable[[], Any]) -> tuple[str, str]:
    with pytest.raises(InferenceServerException) as raised:
        call()
    return str(raised.value.status() or "").removeprefix("StatusCode."), raised.value.message()


STATUS = {"400": "INVALID_ARGUMENT", "404": "NOT_FOUND", "500": "INTERNAL", "501": "UNIMPLEMENTED"}


def check(client: Client, found: tuple[str, str], status: str, text: str) -> None:
    """`status` is HTTP's; ALREADY_EXISTS is 400 there, and errors inside a stream have none."""
    assert found[1] == text
    name = STATUS[status]
    if "already in manager" in text:
        name = "ALREADY_EXISTS"
    assert found[0] in (status, name, "")


# What works


def test_input_and_output_in_one_region(client: Client) -> None:
    values = np.arange(4, dtype=np.float32).reshape(4, 1)
    with registered(client, 4096) as handle:
        shm.set_shared_memory_region(handle, [values], offset=64)
        result = client.infer(
            "add", [lent(client, "x", [4, 1], "FP32", 16, 64)], [wanted(client, "y", 100, offset=1000)]
        )
        said = result.get_output("y")
        if isinstance(said, dict):  # HTTP: no data, no parameters
            assert said == {"name": "y", "datatype": "FP32", "shape": [4, 1]}
        else:
            assert (said.name, said.datatype, list(said.shape)) == ("y", "FP32", [4, 1])
            assert list(result.get_response().raw_output_contents) == [b""]
        assert (shm.get_contents_as_numpy(handle, np.float32, [4, 1], offset=1000) == values + 1).all()
        assert (shm.get_contents_as_numpy(handle, np.float32, [17], offset=1016) == 0).all(), "beyond the output"


def test_only_the_input_in_shared_memory(client: Client) -> None:
    with registered(client, 4096) as handle:
        shm.set_shared_memory_region(handle, [np.array([[5]], np.float32)])
        result = client.infer("add", [lent(client, "x", [1, 1], "FP32", 4)])
        assert result.as_numpy("y").tolist() == [[6.0]]


def test_only_the_output_in_shared_memory(client: Client) -> None:
    given = client.module.InferInput("x", [1, 1], "FP32")
    given.set_data_from_numpy(np.array([[5]], np.float32))
    with registered(client, 4096) as handle:
        for value in (5, 6):  # the second is decoded as the first was, but must not write where the first did
            given.set_data_from_numpy(np.array([[value]], np.float32))
            client.infer("add", [given], [wanted(client, "y", 4, offset=4 * value)])
        found = shm.get_contents_as_numpy(handle, np.float32, [8])
        assert found.tolist() == [0, 0, 0, 0, 0, 6, 7, 0]


def test_texts_are_serialised(client: Client) -> None:
    texts = np.array([[b"one", b"", "zwölf".encode()]], np.object_)
    data = serialize_byte_tensor(texts).item()
    with registered(client, 4096) as handle:
        shm.set_shared_memory_region(handle, [np.frombuffer(data, np.uint8)])
        client.infer("texts", [lent(client, "x", [1, 3], "BYTES", len(data))], [wanted(client, "y", 2048, offset=2048)])
        found = shm.get_contents_as_numpy(handle, np.object_, [1, 3], offset=2048)
        assert found.tolist() == texts.tolist()


def test_megabytes(client: Client) -> None:
    values = np.random.default_rng(1).random((1, 1 << 20), np.float32)
    size = values.nbytes
    with registered(client, 2 * size) as handle:
        shm.set_shared_memory_region(handle, [values])
        client.infer("same", [lent(client, "x", [1, 1 << 20], "FP32", size)], [wanted(client, "y", size, offset=size)])
        assert (shm.get_contents_as_numpy(handle, np.float32, values.shape, offset=size) == values).all()


def test_status_names_what_is_registered(client: Client) -> None:
    with memory(8192) as (key, _), memory(100) as (other, _):
        client.call("register_system_shared_memory", "b c", key, 4000, offset=4096)
        client.call("register_system_shared_memory", "all", key, 8192)
        client.call("register_system_shared_memory", "c", other.lstrip("/"), 100)
        assert client.status() == {
            "b c": (key, 4096, 4000),
            "all": (key, 0, 8192),
            "c": (other.lstrip("/"), 0, 100),
        }
        assert client.status("all") == {"all": (key, 0, 8192)}
        assert client.call("get_cuda_shared_memory_status") in (
            [],
            grpcclient.service_pb2.CudaSharedMemoryStatusResponse(),
        )
        client.call("unregister_system_shared_memory", "all")
        client.call("unregister_system_shared_memory", "all")  # it need not be there
        client.call("unregister_cuda_shared_memory")
        assert sorted(client.status()) == ["b c", "c"]
        client.call("register_system_shared_memory", "all", key, 8192)
        client.call("unregister_system_shared_memory")
        assert client.status() == {}


def test_the_offset_of_a_region_counts(client: Client) -> None:
    with memory(8192) as (key, handle):
        shm.set_shared_memory_region(handle, [np.array([[5]], np.float32)], offset=4100)
        client.call("register_system_shared_memory", "region", key, 100, offset=4096)
        result = client.infer("add", [lent(client, "x", [1, 1], "FP32", 4, offset=4)])
        assert result.as_numpy("y").tolist() == [[6.0]]
        client.call("unregister_system_shared_memory", "region")


@pytest.mark.parametrize("made", [Client, GrpcClient])
def test_a_region_in_use_goes_with_its_last_request(made: type[Client], server: ServerProcess, models: Path) -> None:
    client = made(server)
    with registered(client, 4096) as handle:
        shm.set_shared_memory_region(handle, [np.array([7, 8], np.float32)])
        other = made(server)
        worker = threading.Thread(
            target=lambda: other.infer(
                "gated", [lent(client, "x", [2], "FP32", 8)], [wanted(client, "y", 8, offset=64)]
            )
        )
        worker.start()
        with (models / "gated" / "1" / "gate").open("w"):  # opens when the model has it open: it runs
            shm.set_shared_memory_region(handle, [np.array([1, 1], np.float32)])  # too late for the model
            client.call("unregister_system_shared_memory", "region")
            assert list(client.status()) == ["region"]
            assert (
                refusal(lambda: client.call("register_system_shared_memory", "region", "/x", 10))[1]
                == "shared memory region 'region' already in manager"
            )
        worker.join(SECONDS)
        assert client.status() == {}
        assert shm.get_contents_as_numpy(handle, np.float32, [2], offset=64).tolist() == [7, 8]
        other.close()
    client.close()


# What is refused


def test_what_cannot_be_registered(client: Client, tmp_path: Path) -> None:
    def register(name: str, key: str, size: int, offset: int = 0) -> tuple[str, str]:
        return refusal(lambda: client.call("register_system_shared_memory", name, key, size, offset=offset))

    check(client, register("r", "/nope", 10), "500", "Unable to open shared memory region: '/nope'")
    check(client, register("r", "", 10), "400", "cannot register shared memory region 'r' - invalid shm key ''")
    check(client, register("r", "///", 10), "400", "cannot register shared memory region 'r' - invalid shm key '///'")
    prefix = "triton_python_backend_shm_region_"
    for key in (prefix, f"/{prefix}1", f"///{prefix}x"):
        check(
            client,
            register("r", key, 10),
            "400",
            f"cannot register shared memory region 'r' with key '{key}' as the key contains the reserved prefix "
            f"'{prefix}'",
        )
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    link = Path("/dev/shm") / f"test-{uuid.uuid4().hex}"
    link.symlink_to(outside)
    pipe = link.with_suffix(".pipe")
    os.mkfifo(pipe)
    try:
        climbing = f"/../../{outside}"
        for key in (f"/{link.name}", f"/{pipe.name}", climbing, "/..", "/.", "a" * 300, str(outside), "nul\0"):
            check(client, register("r", key, 6), "500", f"Unable to open shared memory region: '{key}'")
    finally:
        link.unlink()
        pipe.unlink()
    with memory(4096) as (key, _):
        invalid = "failed to register shared memory region 'r': invalid args"
        for size, offset in ((4097, 0), (1, 4096), (2**63, 0), (1, 2**64 - 1), (2**64 - 1, 2**64 - 1)):
            check(client, register("r", key, size, offset), "400", invalid)
        unable = "failed to register shared memory region 'r': unable to process address spaceInvalid argument"
        check(client, register("r", key, 0), "400", unable)
        check(client, register("r", key, 1, 1), "400", unable)
        client.call("register_system_shared_memory", "r", key, 4096)
        check(client, register("r", key, 4096), "400", "shared memory region 'r' already in manager")
        check(
            client,
            refusal(lambda: client.call("get_cuda_shared_memory_status", "r")),
            "404",
            "The region named 'r' is registered as system shared memory, not CUDA shared memory",
        )
        client.call("unregister_system_shared_memory", "r")


def test_cuda_has_no_device_here(client: Client) -> None:
    check(
        client,
        refusal(lambda: client.call("register_cuda_shared_memory", "r", b"AAAA", 0, 64)),
        "400",
        "failed to register CUDA shared memory region: 'r', GPUs not supported: there is no CUDA device",
    )
    check(
        client,
        refusal(lambda: client.call("get_cuda_shared_memory_status", "r")),
        "404",
        "Unable to find cuda shared memory region: 'r'",
    )
    check(
        client,
        refusal(lambda: client.call("get_system_shared_memory_status", "r")),
        "404",
        "Unable to find system shared memory region: 'r'",
    )


BEYOND = "Invalid offset + byte size for shared memory region: 'region'"
OFFSET = "Invalid offset for shared memory region: 'region'"


@pytest.mark.parametrize(
    ("size", "offset", "text"),
    [
        (4, 4096, OFFSET),
        (4, 2**62, OFFSET),
        (4097, 0, BEYOND),
        (4, 4093, BEYOND),
        (2**62, 4, BEYOND),
        (2, 0, "byte size mismatch"),
        (8, 0, "byte size mismatch"),
    ],
)
def test_inputs_beyond_their_region(client: Client, size: int, offset: int, text: str) -> None:
    with registered(client, 4096):
        found = refusal(lambda: client.infer("add", [lent(client, "x", [1, 1], "FP32", size, offset)]))
        if text == "byte size mismatch":
            text = (
                "[request id: <id_unknown>] input byte size mismatch for input 'x' for model 'add'. "
                f"Expected 4, got {size}"
            )
        check(client, found, "400", text)
        given = client.module.InferInput("x", [1, 1], "FP32")
        given.set_data_from_numpy(np.array([[5]], np.float32))
        if text in (OFFSET, BEYOND):
            found = refusal(lambda: client.infer("add", [given], [wanted(client, "y", size, offset)]))
            check(client, found, "400", text)


def test_a_region_nobody_registered(client: Client) -> None:
    unknown = "Unable to find shared memory region: 'region'"
    given = client.module.InferInput("x", [1, 1], "FP32")
    given.set_data_from_numpy(np.array([[5]], np.float32))
    check(client, refusal(lambda: client.infer("add", [lent(client, "x", [1, 1], "FP32", 4)])), "404", unknown)
    check(client, refusal(lambda: client.infer("add", [given], [wanted(client, "y", 4)])), "404", unknown)


def test_an_output_that_does_not_fit(client: Client) -> None:
    with registered(client, 4096) as handle:
        shm.set_shared_memory_region(handle, [np.array([[5], [6]], np.float32)])
        found = refusal(
            lambda: client.infer("add", [lent(client, "x", [2, 1], "FP32", 8)], [wanted(client, "y", 7, 64)])
        )
        text = (
            "shared memory size specified with the request for output 'y' (7 bytes) should be at least 8 bytes to "
            "hold the results"
        )
        check(client, found, "500", text)
        assert (shm.get_contents_as_numpy(handle, np.uint8, [100], offset=64) == 0).all()


def test_without_the_option_there_is_none(models: Path) -> None:
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=add") as server:
        for made in CLIENTS:
            client = made(server)
            with memory(64) as (key, _):
                for call in (
                    ("register_system_shared_memory", "region", key, 64),
                    ("unregister_system_shared_memory", "region"),
                    ("unregister_system_shared_memory",),
                    ("register_cuda_shared_memory", "region", b"AAAA", 0, 64),
                    ("unregister_cuda_shared_memory",),
                ):
                    check(client, refusal(partial(client.call, *call)), "501", DISABLED)
            assert client.status() == {}
            found = refusal(partial(client.infer, "add", [lent(client, "x", [1, 1], "FP32", 4)]))
            check(client, found, "404", "Unable to find shared memory region: 'region'")
            client.close()
