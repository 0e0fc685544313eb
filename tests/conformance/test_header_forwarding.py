"""--http-header-forward-pattern and --grpc-header-forward-pattern: what a Python model sees of its clients' headers.

Over HTTP (infer and generate) and gRPC (infer and a stream) with Triton's own clients. Which names are reserved, and
the text that refuses them, are those of Triton's common.h and its two servers.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("header-forwarding")

SECONDS = 30
CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_STRING dims: 1 }
"""
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.say(request.parameters()) for request in requests]

    def say(self, text):
        return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([text.encode()], np.object_))])
"""
PATTERN = "My-.*|PRIORITY|^triton_|timeout"
OF_GRPC = "|grpc-|^te$|content-type|:path"  # which no server sees, whatever the pattern

Headers = dict[str, Any]
Ask = Callable[[Headers], dict[str, Any]]  # headers → the request's parameters; raises Refused


class Refused(Exception):
    pass


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("forwarding")
    (models / "m" / "1").mkdir(parents=True)
    (models / "m" / "config.pbtxt").write_text(CONFIG)
    (models / "m" / "1" / "model.py").write_text(MODEL)
    patterns = (f"--http-header-forward-pattern={PATTERN}", f"--grpc-header-forward-pattern={PATTERN}{OF_GRPC}")
    with ServerProcess(models, *patterns) as found:
        yield found


def _input(module: Any) -> list[Any]:
    tensor = module.InferInput("x", [1], "FP32")
    tensor.set_data_from_numpy(np.ones(1, np.float32))
    return [tensor]


def _said(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.as_numpy("y")[0])
    return found


def _infer(module: Any, client: Any) -> Ask:
    def ask(headers: Headers) -> dict[str, Any]:
        try:
            return _said(client.infer("m", _input(module), headers=headers))
        except InferenceServerException as error:
            raise Refused(error.message()) from None

    return ask


def _streams(client: Any) -> Ask:
    def ask(headers: Headers) -> dict[str, Any]:
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)), headers=headers)
        try:
            for _ in range(2):  # a stream's headers are those of each of its requests
                client.async_stream_infer("m", _input(triton_grpc))
            (first, refused), (second, _) = answers.get(timeout=SECONDS), answers.get(timeout=SECONDS)
        finally:
            client.stop_stream()
        if refused is not None:
            raise Refused(refused.message())
        assert _said(first) == _said(second)
        return _said(first)

    return ask


def _generates(server: ServerProcess) -> Ask:
    def ask(headers: Headers) -> dict[str, Any]:
        answer = requests.post(server.url("/v2/models/m/generate"), json={"x": 1}, headers=headers, timeout=SECONDS)
        if answer.status_code != 200:
            raise Refused(answer.json()["error"])
        found: dict[str, Any] = json.loads(answer.json()["y"])
        return found

    return ask


@pytest.fixture(params=["http", "generate", "grpc", "stream"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ask(server: ServerProcess, way: str) -> Iterator[Ask]:
    if way == "http":
        with triton_http.InferenceServerClient(server.http.removeprefix("http://")) as client:
            yield _infer(triton_http, client)
    elif way == "generate":
        yield _generates(server)
    else:
        with triton_grpc.InferenceServerClient(server.grpc) as client:
            yield _infer(triton_grpc, client) if way == "grpc" else _streams(client)


def test_headers_whose_name_matches_are_parameters_and_no_others(ask: Ask) -> None:
    for value in "1234":  # the same request again and again is known by its shape; its headers are not
        assert ask({"my-one": value, "not-my-own": "found", "other": "2"}) == {"my-one": value, "not-my-own": "found"}
    assert ask({}) == {}


def test_what_a_request_says_itself_stays_beside_its_headers(server: ServerProcess, way: str) -> None:
    """With the client's own parameters, where the client has them."""
    headers, parameters = {"my-one": "1"}, {"part": "own"}
    expected = {"my-one": "1", "part": "own"}
    if way == "generate":
        url = server.url("/v2/models/m/generate")
        answer = requests.post(url, json={"x": 1, **parameters}, headers=headers, timeout=SECONDS)
        assert json.loads(answer.json()["y"]) == expected
        return
    module: Any = triton_http if way == "http" else triton_grpc
    with module.InferenceServerClient(server.grpc if way != "http" else server.http.removeprefix("http://")) as client:
        if way != "stream":
            assert _said(client.infer("m", _input(module), headers=headers, parameters=parameters)) == expected
            return
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result), headers=headers)
        client.async_stream_infer("m", _input(module), parameters=parameters)
        assert _said(answers.get(timeout=SECONDS)) == expected
        client.stop_stream()


@pytest.mark.parametrize("name", ["priority", "timeout", "triton_final_response"])
def test_a_reserved_name_that_matches_is_refused_and_the_next_request_is_not(ask: Ask, name: str) -> None:
    with pytest.raises(Refused) as caught:
        ask({name: "1"})
    assert str(caught.value).endswith(f"Header '{name}' is reserved for Triton usage and cannot be forwarded.")
    assert ask({"my-one": "1"}) == {"my-one": "1"}


@pytest.mark.parametrize("way", ["grpc", "stream"])
def test_binary_metadata_comes_as_its_bytes_and_grpcs_own_does_not(ask: Ask, way: str) -> None:
    assert ask({"my-text-bin": "é".encode(), "my-one": "1"}) == {"my-text-bin": "é", "my-one": "1"}


@pytest.mark.parametrize("way", ["http", "generate"])
def test_a_name_that_ends_in_bin_is_nothing_special_over_http(ask: Ask, way: str) -> None:
    assert ask({"my-text-bin": "w6k="}) == {"my-text-bin": "w6k="}


def test_models_see_names_as_clients_spell_them(ask: Ask, way: str) -> None:
    """As in a real Triton 2.51; HTTP/2 has no capitals."""
    if way in ("grpc", "stream"):
        assert ask({"my-one": "1"}) == {"my-one": "1"}
        return
    assert ask({"My-One": "1", "MY_TWO": "x", "mY-three": "3"}) == {"My-One": "1", "mY-three": "3"}
    assert ask({"my-one": "1"}) == {"my-one": "1"}, "the next request of the same connection"
    with pytest.raises(Refused, match="reserved for Triton usage"):
        ask({"Timeout": "1"})
