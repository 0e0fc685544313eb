"""The request a benchmark makes up, read back by others: JSON, the protocol's messages, numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from tritonclient.grpc import service_pb2

from doorstep.cli.bench import Server, _parser, find_server
from doorstep.cli.bench.payload import grpc_message, http_request, made_up, make_tensors, parse_shapes
from doorstep.cli.bench.plan import Tls
from doorstep.client.connect import Target
from doorstep.errors import InvalidArgument
from doorstep.types import ALL_DATATYPES, Tensor

METADATA: dict[str, Any] = {
    "name": "m",
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [-1, 16]},
        {"name": "ids", "datatype": "INT64", "shape": ["-1", "-1"]},
        {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
    ],
}
TARGET = Target.parse("http://host:8000")


def tensors(**kwargs: Any) -> list[Tensor]:
    return make_tensors(
        METADATA, kwargs.get("given", {}), kwargs.get("shapes", {}), kwargs.get("batch", 1), batches=True
    )


def test_free_dimensions_are_one_unless_told() -> None:
    assert [tensor.shape for tensor in tensors()] == [(1, 16), (1, 1), (1, 1)]
    assert [tensor.shape for tensor in tensors(batch=4)] == [(4, 16), (4, 1), (4, 1)]
    shapes = parse_shapes(["ids=2,32", "x:2x16"], METADATA)
    assert shapes == {"ids": (2, 32), "x": (2, 16)}
    assert [tensor.shape for tensor in tensors(shapes=shapes)][1] == (2, 32)


@pytest.mark.parametrize("shape", ["ids", "ids=a,b", "ids=-1,2", "nobody=1,2"])
def test_a_shape_that_makes_no_sense_is_refused(shape: str) -> None:
    with pytest.raises(InvalidArgument, match="--shape"):
        parse_shapes([shape], METADATA)


def test_given_values_are_used_as_they_are() -> None:
    made = tensors(given={"text": "hello", "x": np.ones(16)})
    assert made[2].array.tolist() == [[b"hello"]]
    assert made[0].array.dtype == np.float32


@pytest.mark.parametrize("datatype", ALL_DATATYPES, ids=str)
def test_every_datatype_can_be_made_up(datatype: Any) -> None:
    array = made_up(datatype, (2, 3), np.random.default_rng(0))
    assert (array.dtype, array.shape) == (datatype.numpy, (2, 3))


def split(request: bytes) -> tuple[bytes, bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    return head, body


def test_a_json_request_holds_the_tensors() -> None:
    head, body = split(http_request(TARGET, "m", "2", tensors(), binary=False))
    assert head.startswith(b"POST /v2/models/m/versions/2/infer HTTP/1.1\r\n")
    assert b"\r\nHost: host:8000" in head
    assert b"\r\nContent-Length: %d" % len(body) in head
    inputs = orjson.loads(body)["inputs"]
    assert [(i["name"], i["datatype"], i["shape"]) for i in inputs] == [
        ("x", "FP32", [1, 16]), ("ids", "INT64", [1, 1]), ("text", "BYTES", [1, 1]),
    ]  # fmt: skip
    assert np.array(inputs[0]["data"], np.float32).tolist() == tensors()[0].array.ravel().tolist()


def test_a_binary_request_holds_the_bytes_after_the_json() -> None:
    head, body = split(http_request(TARGET, "m", "", tensors(), binary=True))
    fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    size = int(fields["Inference-Header-Content-Length"])
    document = orjson.loads(body[:size])
    assert [i["parameters"]["binary_data_size"] for i in document["inputs"]] == [64, 8, 48]
    assert np.frombuffer(body[size : size + 64], "<f4").tolist() == tensors()[0].array.ravel().tolist()
    assert len(body) == size + 64 + 8 + 48


def test_a_grpc_message_is_one_that_triton_reads() -> None:
    message = service_pb2.ModelInferRequest.FromString(grpc_message("m", "2", tensors()))
    assert (message.model_name, message.model_version) == ("m", "2")
    assert [list(tensor.shape) for tensor in message.inputs] == [[1, 16], [1, 1], [1, 1]]
    assert message.raw_input_contents[2][4:].startswith(b"The quick brown fox")


def test_json_says_what_it_cannot_carry() -> None:
    half = {"name": "m", "inputs": [{"name": "h", "datatype": "FP16", "shape": [1]}]}
    with pytest.raises(InvalidArgument, match="JSON cannot carry FP16"):
        http_request(TARGET, "m", "", make_tensors(half, {}, {}, 1, batches=False), binary=False)
    with pytest.raises(InvalidArgument, match="which is no text"):
        http_request(TARGET, "m", "", tensors(given={"text": b"\xff"}), binary=False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], Server("http", "127.0.0.1", 8000, None)),
        (["--protocol", "grpc"], Server("grpc", "127.0.0.1", 8001, None)),
        (["--url", "grpc://host:9"], Server("grpc", "host", 9, None)),
        (["--url", "host:9"], Server("http", "host", 9, None)),
        (["--url", "host:9", "--protocol", "grpc"], Server("grpc", "host", 9, None)),
        (["--url", "http://host:9", "--protocol", "grpc"], Server("grpc", "host", 9, None)),
        (["--url", "https://host", "--tls-ca", "ca.pem"], Server("http", "host", 8000, Tls("ca.pem"))),
        (["--url", "grpcs://[::1]", "--insecure"], Server("grpc", "::1", 8001, Tls(verify=False, http2=True))),
    ],
)
def test_url_and_protocol_say_together_where_to(
    options: list[str], expected: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOORSTEP_URL", raising=False)
    assert find_server(_parser("bench").parse_args(["m", *options])) == expected


def test_an_address_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"write http://127\.0\.0\.1:8000"):
        find_server(_parser("bench").parse_args(["m", "--url", "ftp://host"]))
