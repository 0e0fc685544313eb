"""Options of `doorstep serve` seen from outside: what each is for happens in a real server, for real clients."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.grpc import service_pb2, service_pb2_grpc

from doorstep.testing.certificates import Authority
from doorstep.testing.onnx_models import save_adder
from doorstep.testing.server import ServerProcess

SECONDS = 60
SERVING = 1  # grpc.health.v1
EVERYWHERE = {
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    save_adder(tmp_path / "models" / "add" / "1" / "model.onnx", 1)
    return tmp_path / "models"


def add(url: str, value: float = 1, **settings: Any) -> tuple[int, Any]:
    """(status, y or what the error says) of one inference."""
    body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [value]}]}
    answer = requests.post(f"{url}/v2/models/add/infer", json=body, timeout=SECONDS, **settings)
    document = answer.json()
    return answer.status_code, document["outputs"][0]["data"][0] if answer.ok else document["error"]


def until(condition: Callable[[], bool], server: ServerProcess) -> None:
    """Waits for what the server does in its own time; the test's own time limit ends it where that never comes."""
    while not condition():
        assert server.running, server.logs()
        threading.Event().wait(0.05)


def curl(*arguments: str) -> str:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("there is no curl here")
    return subprocess.run(
        [program, "-s", *arguments], check=False, capture_output=True, text=True, timeout=SECONDS
    ).stdout


# What listens, and what it speaks


def test_every_listener_speaks_http_1_and_http_2_and_says_over_grpc_what_it_has(models: Path) -> None:
    with ServerProcess(models) as server:
        for port, path in ((server.http_port, "/v2"), (server.grpc_port, "/v2"), (server.metrics_port, "/metrics")):
            for option, version in (("--http1.1", "1.1"), ("--http2-prior-knowledge", "2")):
                shown = curl(option, "-o", "/dev/null", "-w", "%{http_code} %{http_version}",
                             f"http://127.0.0.1:{port}{path}")  # fmt: skip
                assert shown == f"200 {version}", path
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
                assert health.status == SERVING
                services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
                assert services - {"inference.GRPCInferenceService"} == EVERYWHERE
                assert ("inference.GRPCInferenceService" in services) == (port != server.metrics_port)


def test_what_is_not_allowed_does_not_listen(models: Path) -> None:
    with ServerProcess(models, "--allow-metrics=false", "--allow-grpc=false") as server:
        assert add(server.url("")) == (200, 2)
        for port in (server.grpc_port, server.metrics_port):
            with pytest.raises(ConnectionRefusedError):
                http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS).connect()
        with grpc.insecure_channel(server.http) as channel, pytest.raises(grpc.RpcError) as failure:
            service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(service_pb2.ServerLiveRequest(), timeout=9)
        assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_servers_that_say_so_share_a_port_and_others_do_not(models: Path) -> None:
    """Metrics on the same port share it as well."""
    with ServerProcess(models, "--reuse-http-port=true", "--id=first") as first:
        ports = (f"--http-port={first.http_port}", "--id=second")
        refused = ServerProcess(models, *ports)
        refused.launch()
        assert refused.wait() == 1
        assert f"{first.http_port}" in refused.logs()
        second = ServerProcess(models, *ports, "--reuse-http-port=true", f"--metrics-port={first.http_port}")
        second.launch()
        try:
            names: set[str] = set()

            def both_have_answered() -> bool:
                names.add(requests.get(first.url("/v2"), timeout=SECONDS).json()["name"])  # a connection each
                return names == {"first", "second"}

            until(both_have_answered, second)
        finally:
            second.kill()


def test_tls_covers_every_listener_unless_grpc_has_its_own(models: Path, tmp_path: Path) -> None:
    authority, grpcs_own = Authority(tmp_path, "authority"), Authority(tmp_path, "other")
    cert, key = authority.issue("server")
    grpc_cert, grpc_key = grpcs_own.issue("grpc-server")
    client_cert, client_key = authority.issue("client")
    options = [
        f"--tls-cert={cert}", f"--tls-key={key}", f"--tls-client-ca={authority.file}",
        "--grpc-use-ssl=true", f"--grpc-server-cert={grpc_cert}", f"--grpc-server-key={grpc_key}",
    ]  # fmt: skip
    known: dict[str, Any] = {"verify": str(authority.file), "cert": (str(client_cert), str(client_key))}
    server = ServerProcess(models, *options, ready="live")
    server.launch()
    try:
        until(lambda: "metrics on https://" in server.logs(), server)
        assert add(f"https://{server.http}", **known) == (200, 2)
        assert requests.get(f"https://127.0.0.1:{server.metrics_port}/metrics", timeout=SECONDS, **known).ok
        with pytest.raises(requests.exceptions.ConnectionError):  # without a certificate of its own
            add(f"https://{server.http}", verify=str(authority.file))
        credentials = grpc.ssl_channel_credentials(grpcs_own.file.read_bytes())
        with grpc.secure_channel(server.grpc, credentials) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=SECONDS).ready
        assert server.stop() == 0
    finally:
        server.kill()


def test_two_ways_to_use_one_port_are_refused_with_a_way_out(models: Path, tmp_path: Path) -> None:
    cert, key = Authority(tmp_path, "authority").issue("server")
    own = ("--grpc-use-ssl=true", f"--grpc-server-cert={cert}", f"--grpc-server-key={key}")
    server = ServerProcess(models, *own, one_port=True)
    server.launch()
    assert server.wait() == 1
    assert "give them the same options or different ports" in server.logs()


# Which models


def test_poll_mode_follows_the_folder(models: Path) -> None:
    with ServerProcess(models, "--model-control-mode=poll", "--repository-poll-secs=1") as server:
        at = server.url("")
        refused = requests.post(f"{at}/v2/repository/models/add/unload", timeout=SECONDS)
        assert (refused.status_code, refused.json()) == (
            503, {"error": "explicit model load / unload is not allowed if polling is enabled"},
        )  # fmt: skip
        save_adder(models / "later" / "1" / "model.onnx", 1)  # a new model
        until(lambda: requests.get(f"{at}/v2/models/later/ready", timeout=SECONDS).ok, server)
        save_adder(models / "add" / "2" / "model.onnx", 2)  # a new version
        until(lambda: add(at) == (200, 3), server)
        save_adder(models / "add" / "2" / "model.onnx", 30)  # another file in its place
        until(lambda: add(at) == (200, 31), server)
        (models / "add" / "3").mkdir()
        (models / "add" / "3" / "model.onnx").write_bytes(b"broken")  # never replaces one that works
        until(lambda: "failed to load 'add'" in server.logs(), server)
        assert add(at) == (200, 31)
        shutil.rmtree(models / "later")
        until(lambda: requests.get(f"{at}/v2/models/later/ready", timeout=SECONDS).status_code == 400, server)
        assert add(at) == (200, 31)


def test_a_model_may_have_several_configs(models: Path) -> None:
    (models / "add" / "config.pbtxt").write_text("max_batch_size: 2")
    (models / "add" / "configs").mkdir()
    (models / "add" / "configs" / "large.pbtxt").write_text("max_batch_size: 200")
    for options, expected in (((), 2), (("--model-config-name=large",), 200)):
        with ServerProcess(models, *options) as server:
            config = requests.get(server.url("/v2/models/add/config"), timeout=SECONDS).json()
            assert config["max_batch_size"] == expected


def test_without_completion_a_model_needs_its_config(models: Path) -> None:
    strict = ServerProcess(models, "--disable-auto-complete-config")
    strict.launch()
    assert strict.wait() == 1
    assert "config.pbtxt" in strict.logs()


def test_a_backends_setting_reaches_it(models: Path) -> None:
    with ServerProcess(models, "--backend-config=default-max-batch-size=7") as server:
        config = requests.get(server.url("/v2/models/add/config"), timeout=SECONDS).json()
        assert config["max_batch_size"] == 7


# The log


def test_what_an_option_does_not_do_is_said(models: Path) -> None:
    with ServerProcess(models, "--http-thread-count=4", "--strict-model-config=false") as server:
        assert "--http-thread-count=4 has no effect: one event loop serves all connections" in server.logs()
        assert "--strict-model-config is deprecated; leave it out" in server.logs()


def test_the_log_is_as_talkative_as_it_is_told_to_be(models: Path, tmp_path: Path) -> None:
    lines = {}
    for options in ((), ("--log-verbose=1",), ("--log-info=false",), (f"--log-file={tmp_path / 'log'}",)):
        with ServerProcess(models, *options) as server:
            assert add(server.url(""))[0] == 200
            requests.get(server.url("/v2/models/none"), timeout=SECONDS)
            with grpc.insecure_channel(server.grpc) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                with pytest.raises(grpc.RpcError):
                    stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="neither"), timeout=SECONDS)
            assert server.stop() == 0
            lines[options] = server.logs().splitlines()
    usual, talkative, quiet, elsewhere = lines.values()
    assert any("successfully loaded 'add'" in line for line in usual)
    more = ("'none' is not found", "'neither' is not found", '"max_batch_size":4')  # why calls fail; the whole config
    for what in more:
        assert any(what in line for line in talkative)
        assert not any(what in line for line in usual)
    assert quiet == elsewhere == []
    assert "successfully loaded 'add'" in (tmp_path / "log").read_text()


def test_bad_options_end_with_2_and_a_port_that_is_taken_with_1(models: Path) -> None:
    bad = ServerProcess(models, "--http-port=many")
    bad.launch()
    assert bad.wait() == 2
    with ServerProcess(models) as server:
        taken = ServerProcess(models, f"--http-port={server.http_port}")
        taken.launch()
        assert taken.wait() == 1
        assert "--http-port" in taken.logs()


# Limits


def test_limits_given_are_those_that_apply(models: Path) -> None:
    limits = ("--max-header-count=9", "--http-max-input-size=2000", "--max-chunk-count=4")
    with ServerProcess(models, *limits) as server:
        at = server.url("/v2/models/add/infer")
        assert add(server.url("")) == (200, 2)
        many = requests.get(at, headers={f"x-{n}": "1" for n in range(9)}, timeout=SECONDS)
        assert many.status_code == 431
        large = requests.post(at, data=bytes(2001), timeout=SECONDS)
        assert (large.status_code, "2000" in large.json()["error"]) == (400, True)
        chunked = requests.post(at, data=iter([b" "] * 5), timeout=SECONDS)
        assert chunked.status_code == 400
        assert chunked.json()["error"].startswith("Chunked request body exceeds maximum of 4 non-empty chunks")


def test_a_client_without_patience_for_others_is_timed_out(models: Path) -> None:
    """Each limit in time, with a client that does nothing where it should do something."""
    limits = ("--header-timeout-secs=0.2", "--body-timeout-secs=0.2", "--idle-timeout-secs=0.2")
    head = b"POST /v2/models/add/infer HTTP/1.1\r\nhost: x\r\n"
    with ServerProcess(models, *limits) as server:
        for sent in (b"", b"GET /v2 HT", head, head + b"content-length: 9\r\n\r\n{"):
            connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)
            connection.connect()
            assert connection.sock is not None
            connection.sock.sendall(sent)
            answer = b"".join(iter(lambda: connection.sock.recv(4096), b""))  # noqa: B023 - ends when the server closes
            assert (answer.startswith(b"HTTP/1.1 408 ")) == (sent != b""), sent
            connection.close()
        assert add(server.url("")) == (200, 2)


@pytest.mark.parametrize(
    ("options", "frame"),
    [
        (("--grpc-max-connection-age=100", "--grpc-max-connection-age-grace=100"), "GOAWAY"),
        (
            (
                "--grpc-keepalive-time=100",
                "--grpc-keepalive-timeout=100",
                "--grpc-keepalive-permit-without-calls=true",
            ),
            "PING",
        ),
    ],
)
def test_old_and_silent_connections_are_ended(models: Path, options: tuple[str, ...], frame: str) -> None:
    """A client that sends its preface, and then nothing: it is told, and closed."""
    with ServerProcess(models, *options) as server:
        with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=SECONDS) as client:
            client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")  # and empty SETTINGS
            received = b"".join(iter(lambda: client.recv(4096), b""))
        kinds = []
        while received:  # RFC 9113, 4.1: three bytes of length, one of type, one of flags, four of stream
            kinds.append({6: "PING", 7: "GOAWAY"}.get(received[3]))
            received = received[9 + int.from_bytes(received[:3]) :]
        assert frame in kinds
