"""Clients that misuse shared memory: regions that shrink, that go, that fill up; many of them; answers nobody takes."""

from __future__ import annotations

import mmap
import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from harm import MIB, Victim, attacked, check_text, infer_stub, save_python

from doorstep import proto
from doorstep.testing.onnx_models import save_adder, save_identity

SHM = Path("/dev/shm")
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
    models = tmp_path_factory.mktemp("hostile_memory") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_identity(models / "same" / "1" / "model.onnx", shape=["N", "M"])
    folder = save_python(models, "gated", GATED, GATED_CONFIG)
    os.mkfifo(folder / "gate")
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Victim]:
    with Victim(models, "--allow-client-shm=true") as victim:
        yield victim
        victim.assert_sound()


@contextmanager
def memory(size: int) -> Iterator[Path]:
    path = SHM / f"test-{uuid.uuid4().hex}"
    path.write_bytes(b"\0" * size)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def register(server: Victim, path: Path, size: int, name: str = "r", offset: int = 0) -> tuple[int, Any]:
    body = {"key": f"/{path.name}", "byte_size": size, "offset": offset}
    return server.post(f"/v2/systemsharedmemory/region/{name}/register", body)


def unregister(server: Victim, name: str = "") -> None:
    region = f"/region/{name}" if name else ""
    assert server.post(f"/v2/systemsharedmemory{region}/unregister") == (200, None)


def regions(server: Victim) -> list[str]:
    import json

    return [region["name"] for region in json.loads(server.get("/v2/systemsharedmemory/status")[1])]


def lent(name: str, shape: list[int], size: int, offset: int = 0) -> dict[str, Any]:
    where = {"shared_memory_region": "r", "shared_memory_offset": offset, "shared_memory_byte_size": size}
    return {"name": name, "shape": shape, "datatype": "FP32", "parameters": where}


def over_http(server: Victim, model: str, columns: int, out: int) -> str:
    """Input at 0, output at `out`; the error's text."""
    size = 4 * columns
    status, answer = server.infer(
        model,
        lent("x", [1, columns], size),
        outputs=[{"name": "y", "parameters": lent("y", [], size, out)["parameters"]}],
    )
    return "" if status == 200 else str(answer["error"])


def over_grpc(server: Victim, model: str, columns: int, out: int) -> str:
    message = proto.ModelInferRequest(model_name=model)
    tensors = (message.inputs.add(name="x", datatype="FP32", shape=[1, columns]), message.outputs.add(name="y"))
    for tensor, offset in zip(tensors, (0, out), strict=True):
        tensor.parameters["shared_memory_region"].string_param = "r"
        tensor.parameters["shared_memory_offset"].int64_param = offset
        tensor.parameters["shared_memory_byte_size"].int64_param = 4 * columns
    with server.channel() as channel:
        try:
            infer_stub(channel)(message, timeout=30)
        except grpc.RpcError as error:
            check_text(error.details() or "")
            return str(error.details())
    return ""


Ask = Callable[[Victim, str, int, int], str]
BEYOND = "Invalid offset + byte size for shared memory region: 'r'"


@pytest.mark.parametrize("ask", [over_http, over_grpc])
@pytest.mark.parametrize("columns", [4, 500_000])
def test_a_region_that_shrinks_after_it_was_registered(server: Victim, ask: Ask, columns: int) -> None:
    size = 4 * columns
    with attacked(server, grown=96 * MIB), memory(2 * size) as path:
        assert register(server, path, 2 * size) == (200, None)
        assert ask(server, "same", columns, size) == ""
        os.truncate(path, size)  # the output's part is gone
        assert ask(server, "same", columns, size) == BEYOND
        assert path.stat().st_size == size, "and the server has not put it back"
        os.truncate(path, 0)
        assert ask(server, "same", columns, size) == BEYOND
        os.truncate(path, 2 * size)
        assert ask(server, "same", columns, size) == ""
        unregister(server)


def test_a_region_that_shrinks_and_grows_all_the_while(server: Victim) -> None:
    columns = 300_000
    size = 4 * columns
    stop = threading.Event()
    with attacked(server, grown=128 * MIB), memory(2 * size) as path:
        assert register(server, path, 2 * size) == (200, None)

        def shake() -> None:
            chance = random.Random(3)
            while not stop.is_set():
                os.truncate(path, chance.randrange(2 * size))
                os.truncate(path, 2 * size)

        shaking = threading.Thread(target=shake)
        shaking.start()
        try:
            found = {ask(server, "same", columns, size) for _ in range(60) for ask in (over_http, over_grpc)}
        finally:
            stop.set()
            shaking.join()
        assert found <= {"", BEYOND}
        unregister(server)


def test_a_region_that_is_removed_stays_until_it_is_unregistered(server: Victim) -> None:
    with attacked(server), memory(4096) as path:
        assert register(server, path, 4096) == (200, None)
        path.unlink()
        assert over_http(server, "same", 4, 100) == ""
        path.write_bytes(b"\0" * 100)  # another of that name
        assert register(server, path, 4096, "other") == (
            400,
            {"error": "failed to register shared memory region 'other': invalid args"},
        )
        unregister(server)


def test_a_model_does_not_see_what_the_client_writes_meanwhile(server: Victim, models: Path) -> None:
    with attacked(server), memory(4096) as path, path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
        mapped[:8] = np.array([7, 8], np.float32).tobytes()
        assert register(server, path, 4096) == (200, None)
        answer: list[Any] = []
        out = [{"name": "y", "parameters": {"binary_data": False}}]
        asking = threading.Thread(target=lambda: answer.append(server.infer("gated", lent("x", [2], 8), outputs=out)))
        asking.start()
        with (models / "gated" / "1" / "gate").open("w"):
            mapped[:8] = b"\xff" * 8
            os.truncate(path, 4)
        asking.join(30)
        assert answer[0][1]["outputs"][0]["data"] == [7.0, 8.0]
        unregister(server)


@pytest.mark.parametrize("again", range(2))
def test_a_client_that_leaves_gives_its_regions_back(server: Victim, models: Path, again: int) -> None:
    import json
    import socket

    with attacked(server), memory(4096) as path:
        assert register(server, path, 4096) == (200, None)
        body = json.dumps(
            {
                "inputs": [lent("x", [2], 8)],
                "outputs": [{"name": "y", "parameters": lent("y", [], 8, 64)["parameters"]}],
            }
        ).encode()
        client = socket.create_connection(("127.0.0.1", server.http_port))
        client.sendall(
            b"POST /v2/models/gated/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        with (models / "gated" / "1" / "gate").open("w"):
            unregister(server, "r")
            assert regions(server) == ["r"]
            client.close()
            server.wait_for(lambda: regions(server) == [], "the region given back")
        assert path.read_bytes() == b"\0" * 4096, "nobody wanted the answer"


def test_many_names_cost_one_descriptor_and_have_an_end(server: Victim) -> None:
    with attacked(server, grown=64 * MIB), memory(4096) as path, memory(4096) as other:
        before = server.snapshot().fds
        found: dict[tuple[int, str], int] = {}
        for number in range(4200):
            status, answer = register(server, other if number % 2 else path, 4096, f"r{number}")
            text = answer["error"].split(": ")[1] if answer else ""
            found[status, text] = found.get((status, text), 0) + 1
        assert found == {(200, ""): 4096, (400, "there are 4096 already; unregister some"): 104}
        assert server.snapshot().fds <= before + 4
        unregister(server)
        assert regions(server) == []
        assert server.snapshot().fds <= before + 2


def test_what_no_client_can_name(server: Victim) -> None:
    with attacked(server):
        assert server.workers, "whose memory is the server's own"
        own = [os.readlink(entry) for entry in Path(f"/proc/{server.pid}/fd").iterdir()]
        unnamed = [name for name in own if "memfd" in name]
        assert unnamed
        others = (f"/proc/{server.pid}/fd/5", "..", "/etc/passwd", "self/../x", "a/b", "\ud7ff" * 200)
        for key in (*unnamed, *(name.removesuffix(" (deleted)") for name in unnamed), *others):
            with server.channel() as channel:
                call = channel.unary_unary(
                    "/inference.GRPCInferenceService/SystemSharedMemoryRegister",
                    proto.SystemSharedMemoryRegisterRequest.SerializeToString,
                    proto.SystemSharedMemoryRegisterResponse.FromString,
                )
                with pytest.raises(grpc.RpcError) as raised:
                    call(proto.SystemSharedMemoryRegisterRequest(name="r", key=key, byte_size=4), timeout=30)
            assert raised.value.details() == f"Unable to open shared memory region: '{key}'"
        assert regions(server) == []


def test_a_region_that_cannot_be_filled(server: Victim) -> None:
    """A sparse object: writing through a mapping of a full /dev/shm would be SIGBUS too."""
    free = os.statvfs(SHM)
    room = free.f_bavail * free.f_frsize
    with attacked(server), memory(4096) as path:
        os.truncate(path, room * 2)
        assert register(server, path, room * 2) == (200, None)
        assert over_http(server, "same", 4, room) == ""
        assert register(server, path, room * 2 + 1, "more")[0] == 400
        unregister(server)


def test_nonsense_is_refused_by_field(server: Victim) -> None:
    path = "/v2/systemsharedmemory/region/r/register"
    for body, status, text in (
        ({}, 400, "Shared memory register request has no 'key' field"),
        (b"", 400, "Shared memory register request has no 'key' field"),
        ({"key": 1, "byte_size": 1}, 500, "attempt to access JSON non-string as string"),
        ({"key": "k"}, 400, "Shared memory register request has no 'byte_size' field"),
        ({"key": "k", "byte_size": -1}, 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ({"key": "k", "byte_size": "1"}, 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        ({"key": "k", "byte_size": 2**64}, 500, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
        (
            {"key": "k", "byte_size": 1, "offset": 1.5},
            500,
            "attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
    ):
        assert server.error(path, body) == (status, text)
    nameless = "'region name' is necessary to register {} shared memory region"
    assert server.error("/v2/systemsharedmemory/register", {}) == (400, nameless.format("system"))
    assert server.error("/v2/cudasharedmemory/register", {}) == (400, nameless.format("cuda"))
    shared = {"shared_memory_region": 1, "shared_memory_byte_size": 4}
    given = {"name": "x", "shape": [1, 1], "datatype": "FP32"}
    for parameters, status, text in (
        (shared, 500, "Unable to parse 'shared_memory_region': attempt to access JSON non-string as string"),
        (
            {**shared, "shared_memory_region": "r", "shared_memory_offset": -1},
            500,
            "Unable to parse 'shared_memory_offset': attempt to access JSON non-unsigned-integer as unsigned-integer",
        ),
        (
            {"shared_memory_region": "r", "shared_memory_byte_size": []},
            500,
            "Unable to parse 'shared_memory_byte_size': attempt to access JSON non-unsigned-integer as "
            "unsigned-integer",
        ),
    ):
        assert server.error("/v2/models/add/infer", {"inputs": [{**given, "parameters": parameters}]}) == (status, text)
