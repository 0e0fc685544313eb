"""Requests and responses of a million elements are dealt with beside the event loop, and come out the same."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient

from doorstep.testing.server import ServerProcess

CONFIG = """backend: "identity"
input {{ name: "x" data_type: {type} dims: -1 }}
output {{ name: "y" data_type: {type} dims: -1 }}
"""
COUNT = 400_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    for name, kind in (("words", "TYPE_STRING"), ("numbers", "TYPE_FP32")):
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(CONFIG.format(type=kind))
    with ServerProcess(models) as running:
        yield running
        assert "Traceback" not in running.logs()


WORDS = np.array([b"%d" % i for i in range(COUNT)], dtype=np.object_)
NUMBERS = np.arange(COUNT, dtype=np.float32) / 3


def infer(client: Any, kind: Any, model: str, array: Any, **options: Any) -> Any:
    datatype = "BYTES" if array.dtype == np.object_ else "FP32"
    x = kind.InferInput("x", list(array.shape), datatype)
    x.set_data_from_numpy(array, **options)
    outputs = [kind.InferRequestedOutput("y", **options)] if options else None
    return client.infer(model, [x], outputs=outputs).as_numpy("y")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("model", "array"), [("words", WORDS), ("numbers", NUMBERS)], ids=["words", "numbers"])
def test_over_http(server: ServerProcess, model: str, array: Any, binary: bool) -> None:
    with httpclient.InferenceServerClient(server.http, network_timeout=60) as client:
        got = infer(client, httpclient, model, array, binary_data=binary)
    # (tritonclient gives JSON strings as str)
    assert [v.encode() if isinstance(v, str) else v for v in got.tolist()] == array.tolist()


@pytest.mark.parametrize(("model", "array"), [("words", WORDS), ("numbers", NUMBERS)], ids=["words", "numbers"])
def test_over_grpc(server: ServerProcess, model: str, array: Any) -> None:
    with grpcclient.InferenceServerClient(server.grpc) as client:
        np.testing.assert_array_equal(infer(client, grpcclient, model, array), array)


def test_an_error_in_a_long_request_is_answered_as_in_a_short_one(server: ServerProcess) -> None:
    def error(count: int) -> str:
        body = {"inputs": [{"name": "x", "shape": [count + 1], "datatype": "FP32", "data": [0.5] * count}]}
        request = urllib.request.Request(server.url("/v2/models/numbers/infer"), json.dumps(body).encode())
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=60)
        return str(json.loads(caught.value.read())["error"])

    assert error(COUNT).replace(str(COUNT), "10") == error(10)


def test_a_client_that_leaves_while_its_request_is_read_leaves_nothing_behind(server: ServerProcess) -> None:
    body = json.dumps(
        {"inputs": [{"name": "x", "shape": [COUNT], "datatype": "BYTES", "data": [w.decode() for w in WORDS]}]}
    ).encode()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.http_port)) as client:
            client.sendall(b"POST /v2/models/words/infer HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with httpclient.InferenceServerClient(server.http) as client:
        small = np.array([b"a"], dtype=np.object_)
        assert infer(client, httpclient, "words", small).tolist() == [b"a"]
    with urllib.request.urlopen(server.metrics_url, timeout=30) as answer:
        assert b'doorstep_inflight_requests{model="words",version="1"} 0.0' in answer.read()
