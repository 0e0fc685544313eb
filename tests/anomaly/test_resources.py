"""What runs out, what listens, what is restricted: descriptors, disks, connections, readers; and a soak of all."""

from __future__ import annotations

import ast
import http.client
import json
import random
import resource
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from harm import (
    MIB,
    Neighbour,
    Victim,
    add_message,
    attacked,
    check_text,
    grpc_error,
    infer_stub,
    raw_stub,
    row,
    save_python,
)

import doorstep
from doorstep import proto
from doorstep.testing.certificates import Authority
from doorstep.testing.onnx_models import save_adder, save_identity

ECHO = "import doorstep\nclass Model(doorstep.Model):\n    def predict(self, x: int) -> int:\n        return x\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("resources") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_identity(models / "any" / "1" / "model.onnx", shape=["N", "M"])
    save_python(models, "echo", ECHO)
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Victim]:
    with Victim(models, "--write-timeout-secs=2") as victim:
        yield victim
        victim.assert_sound()


# Clients that hold on to things


def test_a_thousand_idle_connections_disturb_nobody(server: Victim) -> None:
    with attacked(server, grown=96 * MIB):
        idle = [socket.create_connection(("127.0.0.1", port)) for port in (server.http_port, server.grpc_port) * 500]
        server.wait_for(lambda: server.metric("doorstep_connections") >= 1000)
        for client in idle:
            client.close()


@pytest.mark.parametrize("what", ["binary", "JSON"])
def test_a_client_that_never_reads_its_answers_is_closed_and_bounded(server: Victim, what: str) -> None:
    size = 256_000
    given = {"name": "x", "shape": [1, size], "datatype": "FP32", "parameters": {"binary_data_size": 4 * size}}
    wanted = [{"name": "y", "parameters": {"binary_data": what == "binary"}}]
    document = json.dumps({"inputs": [given], "outputs": wanted}).encode()
    head = (
        b"POST /v2/models/any/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n"
        b"Inference-Header-Content-Length: %d\r\n\r\n"
    )
    request = head % (len(document) + 4 * size, len(document)) + document + bytes(4 * size)
    with attacked(server, grown=192 * MIB):
        clients = [server.raw() for _ in range(10)]
        for client in clients:
            client.sock.settimeout(0.2)
            try:
                for _ in range(60):  # 60 MB each way, if it were let
                    client.sock.sendall(request)
            except (TimeoutError, BrokenPipeError, ConnectionResetError):
                pass
        assert server.snapshot().rss < 700 * MIB
        server.wait_for(lambda: server.metric("doorstep_connections", listener="http") <= 1, "they are closed")
        for client in clients:
            client.close()


def test_a_grpc_stream_that_is_never_read_is_bounded(server: Victim) -> None:
    message = proto.ModelInferRequest(model_name="any", raw_input_contents=[bytes(MIB)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, MIB // 4])
    data = message.SerializeToString()
    from doorstep.testing.http2_client import Http2Client, block, frame

    fields = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
    with attacked(server, grown=192 * MIB):
        raw = server.raw(server.grpc_port)
        client = Http2Client(raw)
        client.send(frame(1, 4, 1, block(b"POST", b"/inference.GRPCInferenceService/ModelStreamInfer", fields)))
        raw.sock.settimeout(0.3)
        framed = struct.pack(">BI", 0, len(data)) + data
        sent = 0
        try:
            for _ in range(200):
                for at in range(0, len(framed), 16_384):
                    client.send(frame(0, 0, 1, framed[at : at + 16_384]))
                    sent += 16_384
        except (TimeoutError, BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 100 * MIB
        assert server.snapshot().rss < 700 * MIB
        raw.close()


# What runs out


def test_a_server_out_of_descriptors_serves_those_it_has_and_recovers(models: Path) -> None:
    with Victim(models, "--model-control-mode=explicit", "--load-model=add", "--load-model=echo") as server:
        before = server.snapshot()
        with Neighbour(server) as neighbour:
            limit = before.fds + 30
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, limit))
            held = [server.raw() for _ in range(80)]
            server.wait_for(lambda: psutil.Process(server.pid).num_fds() >= limit - 2, "no descriptor left")
            neighbour.assert_served()
            for client in held:
                client.close()
            # Until it has seen that they left it is still full, and turns away who comes.
            server.wait_for(lambda: psutil.Process(server.pid).num_fds() < limit - 10, "descriptors again")
            assert server.infer("add", row(1))[0] == 200
        server.assert_unharmed(before)


def test_a_model_cannot_load_without_descriptors_and_can_with(models: Path) -> None:
    with Victim(models, "--model-control-mode=explicit", "--load-model=add") as server:
        before = server.snapshot()
        _, most = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
        limit = before.fds + 6
        with Neighbour(server):
            client = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
            client.connect()
            client.request("GET", "/v2/health/live")
            assert client.getresponse().read() == b""
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (limit, most))
            client.request("POST", "/v2/repository/models/echo/load")
            answer = client.getresponse()
            text = answer.read()
            assert answer.status in {400, 500, 503}
            check_text(text)
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (most, most))
            assert server.post("/v2/repository/models/echo/load")[0] == 200
            client.close()
            assert server.post("/v2/repository/models/echo/unload")[0] == 200
        server.assert_unharmed(before)


@pytest.mark.parametrize(
    "options", [["--log-file=/dev/full"], ["--log-file=/dev/full", "--access-log", "--log-format=json"]]
)
def test_a_log_on_a_full_disk_costs_the_log_only(models: Path, options: list[str]) -> None:
    with Victim(models, "--model-control-mode=explicit", "--load-model=add", *options) as server:
        with attacked(server):
            for _ in range(50):
                assert server.call("POST", "/v2/repository/models/nobody/load", b"")[0] >= 400
                assert server.infer("add", row(1))[0] == 200
        assert server.stop() == 0


def test_a_log_nobody_reads_does_not_stop_the_server(models: Path, tmp_path: Path) -> None:
    """stderr is a pipe whose reader stopped reading: a chatty model fills it, and the server goes on serving."""
    save_python(
        tmp_path,
        "chatty",
        "import doorstep\nclass Model(doorstep.Model):\n    def predict(self, x: int) -> int:\n"
        "        for i in range(2000): print('x' * 100)\n        return x\n",
    )
    shutil.copytree(models / "add", tmp_path / "add")
    server = Victim(tmp_path, "--access-log")
    read, write = socket.socketpair()
    server.process = subprocess.Popen(
        server.argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=write.fileno(), start_new_session=True
    )
    write.close()
    try:
        server.wait_ready()
        with Neighbour(server) as neighbour:
            for i in range(30):
                given = {"name": "x", "shape": [1], "datatype": "INT64", "data": [i]}
                assert server.infer("chatty", given)[0] == 200
            neighbour.assert_served()
    finally:
        read.close()
        server.kill()
        server.log_path.unlink(missing_ok=True)


# Who may do what

RESTRICTED = [
    "--http-restricted-api=model-repository,model-config,statistics,inference:admin-key=secret",
    "--grpc-restricted-protocol=model-repository,model-config,statistics,inference:admin-key=secret",
]


@pytest.mark.parametrize("which_port", ["http", "grpc"])
def test_no_alias_of_a_restricted_route_gets_round_its_key(models: Path, which_port: str) -> None:
    with Victim(models, *RESTRICTED, "--model-control-mode=explicit", "--load-model=*") as server:
        port = server.http_port if which_port == "http" else server.grpc_port
        body = json.dumps({"inputs": [row(1)]})
        routes = [
            ("POST", "/v2/models/add/infer", body),
            ("POST", "/v2/models/add/versions/1/infer", body),
            ("GET", "/v2/models/add/config", None),
            ("GET", "/v2/models/add/versions/1/config", None),
            ("GET", "/v2/models/stats", None),
            ("GET", "/v2/models/add/stats", None),
            ("POST", "/v2/repository/index", "{}"),
            ("POST", "/v2/repository/any/index", "{}"),
            ("POST", "/v2/repository/models/add/load", "{}"),
            ("POST", "/v2/repository/models/add/unload", "{}"),
            ("POST", "/v2/repository/any/models/add/unload", "{}"),
        ]
        changes = [
            lambda p: p, lambda p: p + "/", lambda p: "/" + p, lambda p: p.replace("/v2/", "/v2//"),
            lambda p: p + "?x=1",
            lambda p: p.replace("add", "%61dd"), lambda p: p.replace("config", "%63onfig"),
            lambda p: p.replace("/v2", "/%76%32"),
            lambda p: p.replace("/v2/", "/V2/"), lambda p: "/x/.." + p, lambda p: p + "/.",
            lambda p: p + "#", lambda p: p + ";a",
            lambda p: f"http://127.0.0.1{p}", lambda p: p.replace("/models", "/./models"),
            lambda p: p + "%20", lambda p: p + "\t",
        ]  # fmt: skip
        extras: list[dict[str, str]] = [
            {}, {"admin-key": "wrong"}, {"admin-key": ""}, {"admin_key": "secret"}, {"X-HTTP-Method-Override": "GET"},
            {"X-Original-URL": "/v2/health/live"}, {"triton-grpc-protocol-admin-key": "secret"},
            {"admin-key": "secret, x"},
        ]  # fmt: skip
        with_key = {"admin-key": "secret"}
        served = 0
        for method, path, data in routes:
            for change in changes:
                for extra in extras if change(path) == path else extras[:1]:
                    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                    connection._validate_path = lambda path: None  # type: ignore[attr-defined,method-assign]
                    try:
                        connection.request(method, change(path), data, extra)
                        answer = connection.getresponse()
                        text = answer.read()
                        assert answer.status in {400, 403, 404, 405, 501}, (change(path), extra, answer.status, text)
                        check_text(text)
                    finally:
                        connection.close()
        for method, path, data in routes[:3]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request(method, path, data, with_key)
            served += connection.getresponse().status == 200
            connection.close()
        assert served == 3
        assert server.call("GET", "/v2/health/ready")[0] == 200
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            unload = proto.RepositoryModelUnloadRequest(model_name="add").SerializeToString()
            calls: dict[str, bytes] = {
                "ModelInfer": add_message(1).SerializeToString(), "ModelConfig": b"\n\3add", "ModelStatistics": b"",
                "RepositoryIndex": b"", "RepositoryModelLoad": unload, "RepositoryModelUnload": unload,
            }  # fmt: skip
            for method, message in calls.items():
                for metadata in ([], [("admin-key", "secret")], [("triton-grpc-protocol-admin-key", "wrong")]):
                    code, text = grpc_error(lambda: raw_stub(channel, method)(message, metadata=metadata))  # noqa: B023
                    assert (code, "restricted" in text) == ("UNAVAILABLE", True), (method, text)
            stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer", bytes, bytes)
            assert grpc_error(lambda: list(stream(iter([calls["ModelInfer"]]))))[0] == "UNAVAILABLE"
            key = [("triton-grpc-protocol-admin-key", "secret")]
            assert infer_stub(channel)(add_message(1), metadata=key).model_name == "add"


def test_mutual_tls_on_grpc_serves_tritonclient_with_a_certificate_and_nobody_else(
    models: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path, "authority")
    (cert, key), (client_cert, client_key) = authority.issue("server"), authority.issue("client")
    options = [
        "--grpc-use-ssl=true", "--grpc-use-ssl-mutual=true", f"--grpc-server-cert={cert}",
        f"--grpc-server-key={key}", f"--grpc-root-cert={authority.file}",
    ]  # fmt: skip
    with Victim(models, "--model-control-mode=explicit", "--load-model=add", *options) as server:
        before = server.snapshot()
        x = grpcclient.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.ones((1, 1), np.float32))
        trusted = {
            "ssl": True, "root_certificates": str(authority.file), "private_key": str(client_key),
            "certificate_chain": str(client_cert),
        }  # fmt: skip
        with grpcclient.InferenceServerClient(server.grpc, **trusted) as client:
            assert client.infer("add", [x]).as_numpy("y").tolist() == [[2.0]]
        for bad in ({}, {"ssl": True, "root_certificates": str(authority.file)}, {"ssl": True}):
            with (
                grpcclient.InferenceServerClient(server.grpc, **bad) as client,
                pytest.raises(Exception, match="UNAVAILABLE"),
            ):
                client.infer("add", [x], client_timeout=5)
        assert server.infer("add", row(1))[0] == 200  # HTTP was not asked to use TLS
        for _ in range(20):
            with server.raw(server.grpc_port) as raw:
                raw.send_until_refused(b"\x16\x03\x01" + bytes(50))
        server.assert_unharmed(before)


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket these processes listen on."""
    return {
        (found.laddr.ip, found.laddr.port)
        for pid in pids
        for found in psutil.Process(pid).net_connections("inet")
        if found.status == psutil.CONN_LISTEN or found.type == socket.SOCK_DGRAM
    }


def test_only_the_configured_ports_listen_and_on_loopback_only(server: Victim) -> None:
    """N9, N13: nothing else, in the server or its workers; nothing at all on other interfaces unless told."""
    found = listening({p.pid for p in server.tree})
    assert found == {("127.0.0.1", p) for p in (server.http_port, server.grpc_port, server.metrics_port)}
    for process in server.tree:
        for unix in process.net_connections("unix"):
            assert not unix.laddr, f"a named socket others could reach: {unix}"


# What the code may never do

_ALLOWED_IMPORTS = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
_ALLOWED_HERE: dict[str, set[str]] = {
    "backends/python/source.py": {"exec_module"},  # a model's own code, in its worker process
    "workers/boot.py": {"exec_module"},  # doorstep itself, in another Python
}


def test_no_code_turns_bytes_into_objects_or_code() -> None:
    """N13: no pickle, eval, exec, yaml.load or torch.load anywhere, but for a model's own code in its own process."""
    root = Path(doorstep.__file__).parent
    found: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = str(path.relative_to(root))
        allowed = _ALLOWED_HERE.get(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            bad = ""
            if isinstance(node, ast.Import):
                bad = ",".join(sorted({a.name.split(".")[0] for a in node.names} & _ALLOWED_IMPORTS))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _ALLOWED_IMPORTS:
                bad = node.module or ""
            elif isinstance(node, ast.Call):
                function = node.func
                if isinstance(function, ast.Name) and function.id in {"eval", "exec", "compile", "__import__"}:
                    bad = function.id
                elif isinstance(function, ast.Attribute):
                    owner = function.value.id if isinstance(function.value, ast.Name) else ""
                    if (owner, function.attr) in {("yaml", "load"), ("torch", "load"), ("os", "system")}:
                        bad = f"{owner}.{function.attr}"
                    elif function.attr == "exec_module":
                        bad = function.attr
                if any(k.arg == "shell" and getattr(k.value, "value", False) for k in node.keywords):
                    bad = "shell=True"
                if any(k.arg == "allow_pickle" and getattr(k.value, "value", False) for k in node.keywords):
                    bad = "allow_pickle=True"
            if bad and bad not in allowed:
                found.append(f"{name}:{node.lineno}: {bad}")
    assert not found, found


# Anything at all

_SEEDS = 7
_FUZZ_SECONDS = 4.0


def http_samples() -> list[tuple[str, bytes, dict[str, str]]]:
    one = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1.5]}
    binary = {"name": "x", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": 4}}
    head = json.dumps(
        {"id": "a", "inputs": [binary], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    ).encode()
    integer = {"name": "x", "shape": [1], "datatype": "INT64", "data": [3]}
    top = [{"name": "y", "parameters": {"classification": 2}}]

    def whole(document: Any) -> bytes:
        return json.dumps(document).encode()

    return [
        ("/v2/models/add/infer", whole({"id": "i", "inputs": [one], "parameters": {"timeout": 5, "a": True}}), {}),
        ("/v2/models/add/infer", head + struct.pack("<f", 1.5), {"Inference-Header-Content-Length": str(len(head))}),
        ("/v2/models/any/infer", whole({"inputs": [{**one, "shape": [2, 1], "data": [[1], [2]]}], "outputs": top}), {}),
        ("/v2/models/echo/infer", whole({"inputs": [integer]}), {}),
    ]


def grpc_samples() -> list[bytes]:
    typed = proto.ModelInferRequest(model_name="any", id="x")
    tensor = typed.inputs.add(name="x", datatype="FP32", shape=[1, 3])
    tensor.contents.fp32_contents.extend([1, 2, 3])
    output = typed.outputs.add(name="y")
    output.parameters["classification"].int64_param = 2
    typed.parameters["p"].string_param = "v"
    integer = proto.ModelInferRequest(model_name="echo", model_version="1", raw_input_contents=[struct.pack("<q", 3)])
    integer.inputs.add(name="x", datatype="INT64", shape=[1])
    return [m.SerializeToString() for m in (add_message(1.5), typed, integer)]


_PIECES = [b"-1", b"9223372036854775807", b"18446744073709551616", b"1e400", b"NaN", b"null", b"[]", b"{}",
           b'""', b"true",           b"\0", b"\xff\xff\xff\xff", b"inputs", b"BYTES", b"FP64", b"BOOL", b"BF16", b"0",
           b",", b"[[[[", b'"data":[1]']  # fmt: skip


def mutated(dice: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(out) + 1)
        match dice.randrange(6):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << dice.randrange(8)
            case 1:
                del out[at : at + dice.randint(1, 8)]
            case 2:
                out[at:at] = dice.choice(_PIECES)
            case 3:
                end = min(at + dice.randint(1, 6), len(out))
                out[at:end] = dice.choice(_PIECES)
            case 4:
                out[at:at] = out[at : at + 20]
            case _:
                out[at:at] = dice.randbytes(dice.randint(1, 4))
    return bytes(out)


def test_mutated_requests_get_well_formed_answers(server: Victim) -> None:
    """Seeded; bounded by time. 500 is Triton's answer to what does not parse."""
    dice = random.Random(_SEEDS)
    deadline = time.monotonic() + _FUZZ_SECONDS
    seen: dict[int | str, int] = {}
    samples, messages = http_samples(), grpc_samples()
    with attacked(server, grown=128 * MIB), server.channel() as channel:
        call = raw_stub(channel)
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
        while time.monotonic() < deadline:
            path, body, headers = dice.choice(samples)
            connection.request("POST", path, mutated(dice, body), headers)
            answer = connection.getresponse()
            text = answer.read()
            seen[answer.status] = seen.get(answer.status, 0) + 1
            if answer.status == 200:
                size = int(answer.getheader("inference-header-content-length", len(text)))
                assert json.loads(text[:size])["outputs"]
            else:
                error = json.loads(text)["error"]
                check_text(error)
                assert answer.status in {400, 404, 500, 501}, error
                if answer.status == 500:
                    assert "arse" in error or "attempt to" in error, error
            code, text_ = grpc_error(lambda: call(mutated(dice, dice.choice(messages)), timeout=30))
            seen[code] = seen.get(code, 0) + 1
            assert code in {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "UNIMPLEMENTED"}, text_
            if code == "INTERNAL":
                assert "arse" in text_ or "attempt to" in text_, text_
        connection.close()
    assert {200, 400, "OK", "INVALID_ARGUMENT"} <= seen.keys(), seen


@pytest.mark.slow
def test_a_soak_of_everything_at_once_leaves_the_server_as_it_was(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models, tmp_path / "models")
    with Victim(tmp_path / "models", "--model-control-mode=explicit", "--load-model=*") as server:
        stop = threading.Event()
        failures: list[str] = []
        counts: dict[str, int] = {}

        def worker(name: str, work: Any) -> Any:
            def run() -> None:
                while not stop.is_set():
                    try:
                        work()
                        counts[name] = counts.get(name, 0) + 1
                    except Exception as error:
                        failures.append(f"{name}: {error!r}")
                        return

            return threading.Thread(target=run, daemon=True)

        def over_http() -> None:
            with httpclient.InferenceServerClient(server.http) as client:
                for n in (1, 1000, 100_000):
                    data = np.random.default_rng(n).random((1, n), np.float32)
                    x = httpclient.InferInput("x", [1, n], "FP32").set_data_from_numpy(data)
                    assert (client.infer("any", [x]).as_numpy("y") == data).all()

        def over_grpc() -> None:
            with grpcclient.InferenceServerClient(server.grpc) as client:
                for n in (1, 1000, 100_000):
                    data = np.random.default_rng(n).random((1, n), np.float32)
                    x = grpcclient.InferInput("x", [1, n], "FP32").set_data_from_numpy(data)
                    assert (client.infer("any", [x]).as_numpy("y") == data).all()

        def python() -> None:
            for i in range(20):
                status, answer = server.infer("echo", {"name": "x", "shape": [1], "datatype": "INT64", "data": [i]})
                assert (status, answer["outputs"][0]["data"]) == (200, [i])

        def bad() -> None:
            assert server.infer("add", row(), row())[0] == 400
            assert server.call("POST", "/v2/models/nobody/infer", b"{}")[0] == 404
            with server.raw() as client:
                client.send(b"POST /v2/models/any/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
            with server.raw(server.grpc_port) as client:
                client.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

        def reload() -> None:
            (tmp_path / "models" / "add" / "1" / "model.onnx").touch()
            assert server.post("/v2/repository/models/add/load")[0] == 200

        works = (over_http, over_grpc, python, bad, reload)

        def soak(seconds: float) -> None:
            stop.clear()
            threads = [worker(work.__name__, work) for work in works]
            for thread in threads:
                thread.start()
            stop.wait(seconds) or stop.set()
            for thread in threads:
                thread.join(30)
            assert not failures, failures[:3]

        soak(3)  # what is made once is made
        server.wait_for(lambda: server.metric("doorstep_connections", listener="http") == 0)
        before = server.snapshot()
        workers_before = sum(p.memory_info().rss for p in server.workers)
        soak(12)
        server.assert_unharmed(before, grown=32 * MIB, threads=4)
        assert sum(p.memory_info().rss for p in server.workers) < workers_before + 32 * MIB
        assert all(counts[work.__name__] > 20 for work in works), counts
        assert server.stop() == 0
