"""doorstep.client, blocking and asyncio, against a server on a real socket and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import inspect
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from doorstep.client import AsyncClient, Client, TimedOut
from doorstep.errors import DoorstepError, InvalidArgument, NotFound, Unavailable
from doorstep.types import DTYPES

sys.path.insert(0, str(Path(__file__).parent))

from kserve_models import DATATYPES, Served, serving


class Awaited:
    """An AsyncClient that is called like a Client, so that one suite tests both."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not inspect.iscoroutinefunction(method):
            return method
        return lambda *args, **kwargs: self._loop.run_until_complete(method(*args, **kwargs))

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()


Make = Callable[..., Any]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as found:
        yield found


@pytest.fixture(params=[Client, Awaited], ids=["blocking", "asyncio"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def client(make: Make, served: Served) -> Iterator[Any]:
    with make(served.url) as found:
        yield found


def sample(name: str) -> np.ndarray[Any, Any]:
    """A two by three array of a datatype, with its extremes where it has any."""
    dtype = DTYPES[name].numpy
    if name == "BYTES":
        values = np.empty(6, object)
        values[:] = [b"", b"\x00\xff", "ünïcödé".encode(), b"a" * 70_000, b"x", b"\n"]
        return values.reshape(2, 3)
    if name == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.array([[info.min, 0, 1], [2, 3, info.max]], dtype)
    return np.array([[-1.5, 0.0, np.inf], [-np.inf, np.nan, 2.25]]).astype(dtype)


@pytest.mark.parametrize("name", DATATYPES)
def test_every_datatype_comes_back_as_it_went(client: Any, name: str) -> None:
    sent = sample(name)
    got = client.infer(f"same_{name}", sent)
    assert got.dtype == sent.dtype
    assert got.shape == sent.shape
    assert got.tobytes() == sent.tobytes() if name != "BYTES" else got.tolist() == sent.tolist()


def test_one_output_is_an_array_and_several_are_a_dict(client: Any) -> None:
    assert client.infer("mlp", input=np.ones((2, 16), np.float32)).tolist() == [[2.0, 2.0, 2.0]] * 2
    both = client.infer("sums", A=[1, 2, 3, 4], B=[10, 20, 30, 40])
    assert {name: array.tolist() for name, array in both.items()} == {
        "SUM": [[11, 22, 33, 44]],
        "DIFFERENCE": [[-9, -18, -27, -36]],
    }
    assert client.infer_all("mlp", input=np.ones(16, np.float32)).keys() == {"output"}


def test_only_the_requested_outputs_are_sent(client: Any) -> None:
    only = client.infer("sums", {"A": [1, 2, 3, 4], "B": [1, 1, 1, 1]}, requested=["DIFFERENCE"])
    assert only.tolist() == [[0, 1, 2, 3]]


def test_lists_numbers_and_text_become_what_the_model_takes(client: Any) -> None:
    assert client.infer("mlp", input=list(range(16))).tolist() == [[0.0, 2.0, 4.0]]
    assert client.infer("mlp", input=np.arange(16, dtype=np.float64)).dtype == np.float32
    assert client.infer("same_BYTES", [["grün", b"\xff"]]).tolist() == [["grün".encode(), b"\xff"]]
    assert client.infer("same_BYTES", "hello").tolist() == [[b"hello"]]
    assert client.infer("same_BF16", [[1.5]]).dtype == ml_dtypes.bfloat16
    assert client.infer("same_UINT8", 7).tolist() == [[7]]


@pytest.mark.parametrize(
    ("model", "value", "text"),
    [
        ("same_UINT8", [[256]], "UINT8"),
        ("same_UINT8", np.array([[256]]), "does not fit into UINT8"),
        ("same_INT32", [[1.5]], "takes INT32, but the value given is float64"),
        ("same_FP32", "text", "takes FP32"),
        ("same_BYTES", [[1]], "takes text or bytes, but was given int 1"),
        ("same_FP32", [[1, 2], [3]], "cannot be made FP32"),
        ("same_BYTES", [["a", "b"], ["c"]], "different lengths"),
        ("mlp", [1.0, 2.0], "has shape [-1, 16]"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_before_it_is_sent(client: Any, model: str, value: Any, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        client.infer(model, value)
    assert text in str(caught.value)


def test_a_wrong_input_name_is_answered_with_the_right_ones(client: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"has no input 'x'; its input is: input FP32 \[-1, 16\]"):
        client.infer("mlp", x=[1])
    with pytest.raises(InvalidArgument, match="has inputs A, B; give each by name"):
        client.infer("sums", [1])


def test_errors_are_the_servers_own_texts(client: Any) -> None:
    with pytest.raises(NotFound, match=r"^Request for unknown model: 'nobody' is not found$"):
        client.infer("nobody", input=[1])
    with pytest.raises(InvalidArgument, match="inference request batch-size must be <= 8 for 'mlp'"):
        client.infer("mlp", input=np.ones((9, 16), np.float32))
    for code in ("NOT_FOUND", "UNAVAILABLE", "INTERNAL", "UNSUPPORTED"):
        with pytest.raises(DoorstepError, match="no luck today") as caught:
            client.infer("raises", CODE=code)
        assert caught.value.code.value == code


def test_versions_are_asked_for_by_number(client: Any) -> None:
    assert client.infer("versions", IN=[1.0], model_version="1").tolist() == [1]
    assert client.infer("versions", IN=[1.0]).tolist() == [3]


def test_metadata_health_statistics_and_index(client: Any) -> None:
    assert client.live()
    assert client.ready()
    assert client.ready("mlp")
    assert not client.ready("nobody")
    assert client.metadata("mlp")["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 16]}]
    assert client.config("mlp")["max_batch_size"] == 8
    assert "binary_tensor_data" in client.server()["extensions"]
    client.infer("mlp", input=[0] * 16)
    (statistics,) = client.statistics("mlp")
    assert statistics["inference_stats"]["success"]["count"] >= 1
    assert {entry["name"] for entry in client.models()} >= {"mlp", "versions"}


def test_loading_and_unloading_reach_the_repository(client: Any, served: Served) -> None:
    client.load("mlp", config={"name": "mlp"}, files={"1/model.onnx": b"\x00\x01"})
    name, request = served.repository.loaded[-1]
    assert name == "mlp"
    assert request.config == '{"name":"mlp"}'
    assert dict(request.files) == {"1/model.onnx": b"\x00\x01"}
    client.unload("mlp", unload_dependents=True)
    assert served.repository.unloaded[-1] == ("mlp", True)


def test_an_answer_that_does_not_come_in_time_is_timed_out(client: Any, served: Served) -> None:
    client.metadata("held")
    with pytest.raises(TimedOut, match=r"no answer from http://127\.0\.0\.1:\d+ within 0\.2 s"):
        client.infer("held", X=[1.0], timeout=0.2)
    served.wire.call(served.held.finish)
    assert client.infer("mlp", input=[0] * 16).tolist() == [[0, 0, 0]]


def test_no_server_says_where_nobody_listens(make: Make) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with make(f"127.0.0.1:{port}") as client, pytest.raises(Unavailable) as caught:
            client.live()
    assert f"cannot reach http://127.0.0.1:{port}" in str(caught.value)
    assert "is the server running there?" in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://host", "http://", "http://host/path", "http://host:port"])
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidArgument, match="no address of a server"):
        Client(url)


def test_one_client_serves_many_threads(served: Served) -> None:
    def ask(number: int) -> bool:
        row = np.full(16, number, np.float32)
        return bool((client.infer("mlp", input=row) == 2 * number).all())

    with Client(served.url) as client, ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(400)))


def test_one_async_client_serves_many_tasks(served: Served) -> None:
    async def main() -> None:
        async def ask(number: int) -> None:
            row = np.full(16, number, np.float32)
            assert (await client.infer("mlp", input=row) == 2 * number).all()

        async with AsyncClient(served.url) as client:
            await asyncio.gather(*(ask(number) for number in range(100)))

    asyncio.run(main())


def test_connections_are_kept_for_the_next_call(client: Any, served: Served) -> None:
    client.live()
    before = len(served.wire.context.connections)
    for _ in range(5):
        client.infer("mlp", input=[0] * 16)
    assert len(served.wire.context.connections) == before


# Servers that misbehave


@contextmanager
def scripted(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers each connection's first request with the next of `answers`, then closes it."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    heard.append(connection.recv(65_536))
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", heard
        thread.join(timeout=10)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


def test_a_connection_closed_while_idle_is_replaced(make: Make) -> None:
    with scripted(OK, OK) as (url, heard), make(url) as client:
        assert client.models() == []
        assert client.models() == []
    assert len(heard) == 2


def test_an_answer_cut_off_is_an_error_and_not_repeated(make: Make) -> None:
    with scripted(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n[]") as (url, heard), make(url) as client:
        with pytest.raises(Unavailable, match="connection closed"):
            client.models()
        assert len(heard) == 1


def test_what_is_not_http_is_an_error(make: Make) -> None:
    with (
        scripted(b"SSH-2.0-OpenSSH_9.6\r\n") as (url, _),
        make(url) as client,
        pytest.raises(Unavailable, match="does not answer in HTTP"),
    ):
        client.models()


def test_a_chunked_answer_and_an_answer_without_length_are_read_whole(make: Make) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n[\r\n1\r\n]\r\n0\r\n\r\n"
    endless = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[]"
    informed = b"HTTP/1.1 100 Continue\r\n\r\n" + OK
    with scripted(chunked, endless, informed) as (url, _), make(url) as client:
        assert [client.models() for _ in range(3)] == [[], [], []]


def test_an_error_without_json_is_shown_as_it_came(make: Make) -> None:
    page = b"<h1>Bad Gateway</h1>"
    head = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n" % len(page)
    with (
        scripted(head + page) as (url, _),
        make(url) as client,
        pytest.raises(Unavailable, match="<h1>Bad Gateway</h1>"),
    ):
        client.models()


def test_headers_go_along_and_cannot_smuggle_a_request(make: Make) -> None:
    with scripted(OK) as (url, heard), make(url, headers={"Authorization": "Bearer secret"}) as client:
        client.models()
    assert b"\r\nAuthorization: Bearer secret\r\n" in heard[0]
    with pytest.raises(InvalidArgument, match="line break"):
        Client("http://host", headers={"X": "a\r\nY: b"})


def test_answers_in_json_are_read_too(make: Make) -> None:
    """A server without the binary extension answers in JSON, whatever was asked for."""
    metadata = b'{"name":"m","inputs":[{"name":"x","datatype":"FP32","shape":[2]}],"outputs":[]}'
    answer = (
        b'{"model_name":"m","model_version":"1","outputs":['
        b'{"name":"y","datatype":"FP32","shape":[2,1],"data":[1.5,2]},'
        b'{"name":"s","datatype":"BYTES","shape":[1],"data":["gr\xc3\xbcn"]}]}'
    )
    pages = [b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body) for body in (metadata, answer)]
    with scripted(*pages) as (url, _), make(url) as client:
        got = client.infer("m", x=[1, 2])
    assert got["y"].tolist() == [[1.5], [2.0]]
    assert got["s"].tolist() == ["grün".encode()]
