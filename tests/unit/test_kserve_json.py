"""JSON inference requests and responses against Triton's facts and its own client's encoders and decoders."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http as triton

from doorstep.errors import DoorstepError, ErrorCode
from doorstep.protocols.kserve.http_decode import decode_infer, header_length
from doorstep.protocols.kserve.http_encode import encode_infer
from doorstep.protocols.kserve.json_text import depth, loads
from doorstep.protocols.kserve.wanted import ALL_BINARY, ALL_JSON, OutputForm, Wanted
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.testing.fakes import model_config
from doorstep.types import BF16, BYTES, DTYPES, FP16, FP32, FP64, Tensor, datatype_of
from doorstep.validation import UnfitTensor

CONFIG = model_config("m", {"IN": ("FP32", [-1])}, {"OUT": ("FP32", [-1])})
LIMIT = 1 << 26
SAMPLES: dict[str, Any] = {
    "BOOL": np.array([True, False, True]),
    "UINT8": np.array([0, 255], np.uint8),
    "UINT16": np.array([0, 65535], np.uint16),
    "UINT32": np.array([0, 2**32 - 1], np.uint32),
    "UINT64": np.array([0, 2**64 - 1], np.uint64),
    "INT8": np.array([-128, 127], np.int8),
    "INT16": np.array([-32768, 32767], np.int16),
    "INT32": np.array([-(2**31), 2**31 - 1], np.int32),
    "INT64": np.array([-(2**63), 2**63 - 1], np.int64),
    "FP16": np.array([1.5, -2], np.float16),
    "FP32": np.array([[1.5, 1e-20], [3.4e38, -0.0]], np.float32),
    "FP64": np.array([[1.5, 1e-300]], np.float64),
    "BYTES": np.array([["é☃".encode(), b""], [b"a\x00b", b"x" * 300]], np.object_),
}


class NoSender:
    def send(self, response: object, final: bool) -> None:
        raise AssertionError("decoding answers nobody")


def decode(body: bytes | dict[str, Any], size: int | None = None) -> tuple[InferenceRequest, Wanted]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = InferenceRequest("m", {}, NoSender(), received_ns=1)
    return request, decode_infer(request, raw, len(raw) if size is None else size, CONFIG, LIMIT)


def refusal(body: bytes | dict[str, Any], size: int | None = None) -> tuple[ErrorCode, str]:
    with pytest.raises(DoorstepError) as raised:
        decode(body, size)
    return raised.value.code, raised.value.message


def one(**fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [2], "data": [1, 2], **fields}]}


# Requests


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("binary", [True, False])
def test_what_tritonclient_sends_arrives_as_it_was(name: str, binary: bool) -> None:
    sample = SAMPLES[name]
    if name == "FP16" and not binary:
        pytest.skip("FP16 does not travel in JSON")
    if name == "BYTES" and not binary:
        sample = np.array([["é☃".encode(), b""]], np.object_)
    tensor = triton.InferInput("IN", sample.shape, name)
    tensor.set_data_from_numpy(sample, binary_data=binary)
    body, size = triton.InferenceServerClient.generate_request_body([tensor], request_id="1")
    request, wanted = decode(body, size)
    assert request.id == "1"
    assert wanted is ALL_BINARY  # tritonclient asks for binary outputs unless told otherwise
    found = request.inputs["IN"]
    assert found.datatype is DTYPES[name]
    assert found.array.dtype == DTYPES[name].numpy
    np.testing.assert_array_equal(found.array, sample)


def test_bf16_arrives_in_binary() -> None:
    head = json.dumps(
        {"inputs": [{"name": "IN", "datatype": "BF16", "shape": [2], "parameters": {"binary_data_size": 4}}]}
    ).encode()
    request, _ = decode(head + b"\xc0\x3f\x00\xc0", len(head))  # the upper halves of 1.5 and -2 as FP32
    assert request.inputs["IN"].array.astype(np.float32).tolist() == [1.5, -2.0]


def test_binary_tensors_are_views_on_the_body() -> None:
    tensor = triton.InferInput("IN", [1000], "FP32")
    tensor.set_data_from_numpy(np.zeros(1000, np.float32))
    body, size = triton.InferenceServerClient.generate_request_body([tensor])
    landed = bytearray(body)
    request = InferenceRequest("m", {}, NoSender(), received_ns=1)
    decode_infer(request, landed, size, CONFIG, LIMIT)
    assert np.shares_memory(request.inputs["IN"].array, np.frombuffer(landed, np.uint8))


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]], [[[1], [2]], [[3], [4]]], [[1, [2]], 3, [[[4]]]]])
def test_data_may_be_nested_in_any_way(data: Any) -> None:
    request, _ = decode(one(shape=[2, 2], data=data))
    np.testing.assert_array_equal(request.inputs["IN"].array, np.array([[1, 2], [3, 4]], np.float32))


@pytest.mark.parametrize(("text", "value"), [("NaN", np.nan), ("Infinity", np.inf), ("-Infinity", -np.inf)])
def test_nan_and_infinity_are_numbers(text: str, value: float) -> None:
    request, _ = decode(json.dumps(one()).replace("[1, 2]", f"[1, {text}]").encode())
    np.testing.assert_array_equal(request.inputs["IN"].array, np.array([1, value], np.float32))


def test_a_tensor_without_elements_needs_no_data() -> None:
    request, _ = decode(one(shape=[0, 3], data=[]))
    assert request.inputs["IN"].array.shape == (0, 3)


def test_parameters_of_the_protocol_are_set_and_the_rest_is_for_the_backend() -> None:
    custom = {"s": "x", "i": -3, "b": True, "d": 1.5, "large": 2**63}
    known = {"sequence_id": 7, "sequence_start": True, "sequence_end": True, "priority": 2, "timeout": 1000}
    request, wanted = decode({**one(), "parameters": {**known, **custom, "binary_data_output": True}})
    assert (request.correlation_id, request.sequence_start, request.sequence_end) == (7, True, True)
    assert (request.priority, request.timeout_us) == (2, 1000)
    assert request.parameters == {**custom, "large": float(2**63)}
    assert wanted is ALL_BINARY


def test_outputs_are_asked_for_by_name_and_form() -> None:
    outputs = [
        {"name": "A"},
        {"name": "B", "parameters": {"binary_data": True}},
        {"name": "C", "parameters": {"classification": 3}},
    ]
    request, wanted = decode({**one(), "outputs": outputs})
    assert request.requested_outputs == ("A", "B", "C")
    assert wanted.forms == {"A": OutputForm(), "B": OutputForm(binary=True), "C": OutputForm(classes=3)}


def test_binary_data_output_does_not_reach_outputs_that_are_listed() -> None:
    _, wanted = decode({**one(), "outputs": [{"name": "A"}], "parameters": {"binary_data_output": True}})
    assert wanted is ALL_JSON


def test_a_raw_body_is_the_one_input() -> None:
    request, wanted = decode(np.array([1, 2, 3], np.float32).tobytes(), 0)
    np.testing.assert_array_equal(request.inputs["IN"].array, np.array([1, 2, 3], np.float32))
    assert wanted is ALL_BINARY


def test_a_raw_body_for_a_batching_model_is_one_row_of_bytes() -> None:
    config = model_config("m", {"IN": ("BYTES", [1])}, {"OUT": ("BYTES", [1])}, max_batch_size=4)
    request = InferenceRequest("m", {}, NoSender(), received_ns=1)
    decode_infer(request, b"some text", 0, config, LIMIT)
    np.testing.assert_array_equal(request.inputs["IN"].array, np.array([[b"some text"]], np.object_))


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_a_name_given_twice_is_refused(field: str) -> None:
    body = {**one(), "id": "9", "outputs": [{"name": "OUT"}]}
    body[field] = body[field] * 2
    name = "IN" if field == "inputs" else "OUT"
    text = f"[request id: 9] {field[:-1]} '{name}' already exists in request"
    assert refusal(body) == (ErrorCode.INVALID_ARG, text)


INTERNAL, INVALID, NOT_FOUND = ErrorCode.INTERNAL, ErrorCode.INVALID_ARG, ErrorCode.NOT_FOUND
SOURCES = (
    "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
    "'shared_memory_region' in 'parameters'. But "
)
_no_data = {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [2]}]}
REFUSED: dict[str, tuple[Any, ErrorCode, str]] = {
    "no object": ([], INTERNAL, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
    "no inputs": ({}, INTERNAL, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
    "inputs no array": ({"inputs": 1}, INTERNAL, "Unable to parse 'inputs': attempt to access JSON non-array as array"),
    "id no string": (
        {**one(), "id": 1},
        INTERNAL,
        "Unable to parse 'id': attempt to access JSON non-string as string",
    ),
    "no data": (_no_data, INVALID, SOURCES + "no field is set"),
    "two sources": (
        one(parameters={"binary_data_size": 8}),
        INVALID,
        SOURCES + "set 'data' 'binary_data_size'",
    ),
    "no name": (
        {"inputs": [{"datatype": "FP32", "shape": [2], "data": [1, 2]}]},
        INTERNAL,
        "Unable to parse 'name': attempt to access non-existing object member 'name'",
    ),
    "negative dimension": (
        one(shape=[-1]),
        INTERNAL,
        "Unable to parse 'shape': attempt to access JSON non-unsigned-integer as unsigned-integer",
    ),
    "too few elements": (
        one(shape=[3]),
        INTERNAL,
        "Failed to parse 'data' field: shape does not match true shape",
    ),
    "too many elements": (
        one(shape=[1]),
        INTERNAL,
        "Unable to parse 'data': Shape does not match true shape of 'data' field",
    ),
    "too many elements to count": (
        one(shape=[2**40, 2**40]),
        INVALID,
        "invalid shape for input 'IN': shape [1099511627776,1099511627776] causes total element count to exceed "
        "maximum size of 9223372036854775807",
    ),
    "more bytes than can be": (
        one(shape=[2**62]),
        INVALID,
        "byte size overflow for input 'IN': element count (4611686018427387904) * data type size (4) exceeds maximum "
        "allowed size (9223372036854775807)",
    ),
    "more bytes than may be": (
        one(shape=[2**30]),
        INVALID,
        "JSON input 'IN' has a byte_size (4294967296 bytes) that exceeds the maximum allowed value of 67108864 bytes. "
        "Use --http-max-input-size to increase the limit.",
    ),
    "text for a number": (
        one(data=[1, "2"]),
        INTERNAL,
        "Unable to parse 'data': attempt to access JSON non-number as double",
    ),
    "true for a number": (
        one(data=[1, True]),
        INTERNAL,
        "Unable to parse 'data': attempt to access JSON non-number as double",
    ),
    "a fraction for an integer": (
        one(datatype="INT32", data=[1, 2.5]),
        INTERNAL,
        "Unable to parse 'data': attempt to access JSON non-signed-integer as signed-integer",
    ),
    "a negative number for an unsigned one": (
        one(datatype="UINT8", data=[1, -1]),
        INTERNAL,
        "Unable to parse 'data': attempt to access JSON non-unsigned-integer as unsigned-integer",
    ),
    "a number for a truth": (
        one(datatype="BOOL", data=[True, 1]),
        INTERNAL,
        "Unable to parse 'data': attempt to access JSON non-boolean as boolean",
    ),
    "a number out of range": (
        one(datatype="UINT8", data=[1, 256]),
        INVALID,
        "Unable to parse 'data': 256 is out of the range of UINT8",
    ),
    "a number for a text": (
        one(datatype="BYTES", data=["a", 1]),
        INTERNAL,
        "Unable to parse JSON bytes array: attempt to access JSON non-string as string",
    ),
    "FP16": (
        one(datatype="FP16"),
        INVALID,
        "receiving FP16 data via JSON is not supported. Please use the binary data format for input IN",
    ),
    "BF16": (
        one(datatype="BF16"),
        INVALID,
        "receiving BF16 data via JSON is not supported. Please use the binary data format for input IN",
    ),
    "no datatype": (one(datatype="FP8"), INVALID, "invalid datatype for input IN"),
    "reserved parameter": (
        {**one(), "parameters": {"triton_x": 1}},
        INVALID,
        "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified.",
    ),
    "a list as a parameter": (
        {**one(), "parameters": {"x": []}},
        INVALID,
        "parameter 'x' has invalid type. It should be either 'int', 'bool', or 'string'.",
    ),
    "a negative priority": (
        {**one(), "parameters": {"priority": -1}},
        INTERNAL,
        "Unable to parse 'priority': attempt to access JSON non-unsigned-integer as unsigned-integer",
    ),
    "shared memory": (
        {
            "inputs": [
                {"name": "IN", "datatype": "FP32", "shape": [2], "parameters": {"shared_memory_region": "r"}},
            ]
        },
        NOT_FOUND,
        "Unable to find shared memory region: 'r'",
    ),
    "classification in shared memory": (
        {**one(), "outputs": [{"name": "A", "parameters": {"shared_memory_region": "r", "classification": 1}}]},
        INVALID,
        "Output can't set both 'shared_memory_region' and 'classification'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_request_is_refused_in_tritons_words(name: str) -> None:
    body, code, text = REFUSED[name]
    assert refusal(json.dumps(body).encode()) == (code, text)


@pytest.mark.parametrize("levels", [100, 101, 1000, 5000])
def test_data_nested_too_deeply_is_refused(levels: int) -> None:
    body = json.dumps(one()).replace("[1, 2]", "[" * levels + "1" + "]" * levels).encode()
    code, text = refusal(body)
    assert code is ErrorCode.INVALID_ARG
    assert "JSON nesting depth exceeds maximum allowed limit (100)" in text


def test_data_nested_ninety_nine_deep_is_not_too_deep() -> None:
    body = json.dumps(one(shape=[1])).replace("[1, 2]", "[" * 99 + "1" + "]" * 99).encode()
    assert decode(body)[0].inputs["IN"].array.tolist() == [1.0]


def test_brackets_in_strings_have_no_depth() -> None:
    assert depth(rb'{"a": "[[[[\"[[[", "b": [1, {"c": 2}]}') == 3


@pytest.mark.parametrize(
    ("text", "explanation"),
    [
        (b" ", "The document is empty. at 1"),
        (b"nope", "Invalid value. at 1"),
        (b"{} {}", "The document root must not be followed by other values. at 3"),
        (b"{1:2}", "Missing a name for object member. at 1"),
        (b'{"a" 2}', "Missing a colon after a name of object member. at 5"),
        (b'{"a":2 "b"}', "Missing a comma or '}' after an object member. at 7"),
        (b"[1 2]", "Missing a comma or ']' after an array element. at 3"),
        (b'{"a":"b', "Missing a closing quotation mark in string. at 5"),
        (b'{"a":"\\x"}', "Invalid escape character in string. at 6"),
        (b'{"a":1e400}', "Number too big to be stored in double. at 5"),
    ],
)
def test_what_is_wrong_with_json_is_said_as_rapidjson_says_it(text: bytes, explanation: str) -> None:
    with pytest.raises(DoorstepError) as raised:
        loads(text)
    assert raised.value.code is ErrorCode.INTERNAL
    assert raised.value.message == f"failed to parse the request JSON buffer: {explanation}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"abc", "Unable to parse Inference-Header-Content-Length, got: abc"),
        (b"-1", "inference header size should be in range (0, 100), got: -1"),
        (b"101", "inference header size should be in range (0, 100), got: 101"),
        (
            b"99999999999",
            "Unable to parse Inference-Header-Content-Length, value is out of range [ -2147483648, 2147483647 ], "
            "got: 99999999999",
        ),
    ],
)
def test_a_header_length_that_cannot_be_is_refused(value: bytes, text: str) -> None:
    with pytest.raises(DoorstepError) as raised:
        header_length(value, 100)
    assert (raised.value.code, raised.value.message) == (ErrorCode.INVALID_ARG, text)


def binary_body(size: int, data: bytes) -> tuple[bytes, int]:
    head = json.dumps(
        {"inputs": [{"name": "IN", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": size}}]}
    ).encode()
    return head + data, len(head)


def test_missing_binary_data_is_counted() -> None:
    assert refusal(*binary_body(8, b"\0" * 5)) == (
        ErrorCode.INVALID_ARG,
        "unexpected size for input 'IN', expecting 3 additional bytes for model 'm'",
    )


def test_binary_data_left_over_is_refused() -> None:
    assert refusal(*binary_body(8, b"\0" * 9)) == (
        ErrorCode.INVALID_ARG,
        "unexpected additional input data for model 'm'",
    )


def test_binary_data_of_another_size_than_the_shape_is_left_to_validation() -> None:
    request, _ = decode(*binary_body(4, b"\0" * 4))
    found = request.inputs["IN"]
    assert isinstance(found, UnfitTensor)
    assert (found.declared, found.shape, found.byte_size) == (FP32, (2,), 4)


# Responses


def response(*outputs: Tensor, id: str = "", parameters: dict[str, Any] | None = None) -> InferenceResponse:
    return InferenceResponse("m", "3", id, outputs, parameters=parameters)


def encode(answer: InferenceResponse, wanted: Wanted = ALL_JSON) -> tuple[bytes, bytes]:
    head, buffers = encode_infer(answer, wanted, CONFIG)
    return head, b"".join(buffers)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("binary", [True, False])
def test_tritonclient_reads_what_is_sent(name: str, binary: bool) -> None:
    sample = SAMPLES[name]
    if name == "FP16" and not binary:
        pytest.skip("FP16 does not travel in JSON")
    answer = response(Tensor("OUT", datatype_of(sample), sample), id="x")
    head, rest = encode(answer, ALL_BINARY if binary else ALL_JSON)
    result = triton.InferenceServerClient.parse_response_body(head + rest, header_length=len(head) if rest else None)
    assert result.get_response()["id"] == "x"
    assert result.get_response()["model_version"] == "3"
    found = result.as_numpy("OUT")
    if name == "BYTES" and not binary:
        found = np.array([text.encode() for text in found.ravel()], np.object_).reshape(found.shape)
    np.testing.assert_array_equal(found, sample)


def test_json_data_are_flat_and_the_keys_in_tritons_order() -> None:
    head, _ = encode(response(Tensor("OUT", FP32, np.array([[1, 2.5]], np.float32)), id="a", parameters={"p": 1}))
    assert head == (
        b'{"id":"a","model_name":"m","model_version":"3","parameters":{"p":1},'
        b'"outputs":[{"name":"OUT","datatype":"FP32","shape":[1,2],"data":[1.0,2.5]}]}'
    )


def test_nan_and_infinity_are_written_as_triton_writes_them() -> None:
    values = np.array([np.nan, 1, np.inf, -np.inf], np.float32)
    head, _ = encode(response(Tensor("OUT", FP32, values)))
    assert b'"data":[NaN,1.0,Infinity,-Infinity]' in head


@pytest.mark.parametrize("datatype", [FP32, FP64])
def test_numbers_read_back_as_the_same_numbers(datatype: Any) -> None:
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, datatype.itemsize * 2000, np.uint8).view(datatype.numpy)
    values = values[np.isfinite(values)]
    head, _ = encode(response(Tensor("OUT", datatype, values)))
    found = np.array(orjson.loads(head)["outputs"][0]["data"], np.float64).astype(datatype.numpy)
    np.testing.assert_array_equal(found, values)


def test_large_outputs_are_not_copied() -> None:
    values = np.zeros((100, 100), np.float64)
    _, buffers = encode_infer(response(Tensor("OUT", FP64, values)), ALL_BINARY, CONFIG)
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), values)


def test_an_output_that_is_not_contiguous_is_sent_row_by_row() -> None:
    values = np.arange(10_000, dtype=np.float32).reshape(100, 100).T
    _, sent = encode(response(Tensor("OUT", FP32, values)), ALL_BINARY)
    np.testing.assert_array_equal(np.frombuffer(sent, np.float32).reshape(100, 100), values)


def test_an_empty_output_has_no_binary_part() -> None:
    head, rest = encode(response(Tensor("OUT", FP32, np.zeros((0, 3), np.float32))), ALL_BINARY)
    assert orjson.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": 0}
    assert rest == b""


@pytest.mark.parametrize("datatype", [FP16, BF16])
def test_half_precision_cannot_be_sent_as_json(datatype: Any) -> None:
    with pytest.raises(DoorstepError) as raised:
        encode(response(Tensor("OUT", datatype, np.zeros(2, datatype.numpy))))
    assert raised.value.message == (
        f"sending {datatype} data via JSON is not supported. Please use the binary data format for output"
    )


def test_bytes_that_are_no_text_cannot_be_sent_as_json() -> None:
    with pytest.raises(DoorstepError, match="not UTF-8"):
        encode(response(Tensor("OUT", BYTES, np.array([b"\xff"], np.object_))))


# Shapes no array can have


@pytest.mark.parametrize("datatype", ["FP32", "BYTES", "BOOL"])
@pytest.mark.parametrize("count", [0, 1])
def test_more_dimensions_than_an_array_can_have_are_left_to_validation(datatype: str, count: int) -> None:
    value = {"FP32": 1, "BYTES": "a", "BOOL": True}[datatype]
    shape = [1] * 70 + [count]
    request, _ = decode(one(datatype=datatype, shape=shape, data=[value] * count))
    assert isinstance(request.inputs["IN"], UnfitTensor)
    assert request.inputs["IN"].shape == tuple(shape)
