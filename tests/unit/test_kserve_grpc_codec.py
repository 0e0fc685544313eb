"""gRPC inference messages: our encoder and decoder against protobuf's own, on random messages and on Triton's facts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from doorstep import proto
from doorstep.errors import DoorstepError, ErrorCode
from doorstep.protocols.kserve import grpc_decode
from doorstep.protocols.kserve.grpc_encode import (
    encode_infer,
    encode_stream,
    encode_stream_error,
    final_flag,
    named,
)
from doorstep.protocols.kserve.protobuf_wire import split_field, varint
from doorstep.protocols.kserve.wanted import ALL_BINARY, OutputForm, Wanted
from doorstep.request import InferenceRequest, InferenceResponse
from doorstep.testing.fakes import model_config
from doorstep.types import DTYPES, FP32, Tensor, datatype_of
from doorstep.validation import UnfitTensor

CONFIG = model_config("m", {"IN": ("FP32", [-1])}, {"OUT": ("FP32", [3])}, labels={"OUT": ("ant", "bee")})


class NoSender:
    def send(self, response: object, final: bool) -> None:
        raise AssertionError("decoding answers nobody")


def decode(data: bytes) -> tuple[InferenceRequest, Wanted, bool]:
    message, raw = grpc_decode.parse_request(data)
    request = InferenceRequest(message.model_name, {}, NoSender(), received_ns=1)
    return request, *grpc_decode.decode_infer(request, message, raw)


def refusal(message: Any) -> tuple[ErrorCode, str]:
    with pytest.raises(DoorstepError) as raised:
        decode(message.SerializeToString())
    return raised.value.code, raised.value.message


def request_message(datatype: str = "FP32", shape: list[int] | None = None, **fields: Any) -> Any:
    message = service_pb2.ModelInferRequest(model_name="m", **fields)
    message.inputs.add(name="IN", datatype=datatype, shape=shape or [2])
    return message


# The wire format

tensors = st.builds(
    lambda name, shape: service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype="FP32", shape=shape),
    st.text(max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
)
messages = st.builds(
    lambda name, id, inputs, raw: service_pb2.ModelInferRequest(
        model_name=name, id=id, inputs=inputs, raw_input_contents=raw
    ),
    st.text(max_size=5),
    st.text(max_size=5),
    st.lists(tensors, max_size=3),
    st.lists(st.binary(max_size=300), max_size=3),
)


@given(messages, st.binary(max_size=12))
def test_cutting_out_the_tensors_finds_what_parsing_the_whole_finds(message: Any, unknown: bytes) -> None:
    data = message.SerializeToString() + b"\xa2\x06" + varint(len(unknown)) + unknown  # a field nobody knows
    parts = split_field(data, 7)
    assert parts is not None
    rest, raw = parts
    assert [bytes(view) for view in raw] == list(message.raw_input_contents)
    found = service_pb2.ModelInferRequest.FromString(rest)
    found.raw_input_contents.extend(message.raw_input_contents)
    assert found == service_pb2.ModelInferRequest.FromString(data)


@given(st.binary(max_size=60))
@settings(max_examples=500)
def test_on_any_bytes_cutting_agrees_with_parsing_or_declines(data: bytes) -> None:
    parts = split_field(data, 7)
    if parts is None:
        return
    rest, raw = parts
    try:
        whole = proto.ModelInferRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            proto.ModelInferRequest.FromString(rest)
        return
    assert [bytes(view) for view in raw] == list(whole.raw_input_contents)
    found = proto.ModelInferRequest.FromString(rest)
    whole.ClearField("raw_input_contents")
    assert found.SerializeToString(deterministic=True) == whole.SerializeToString(deterministic=True)


@given(st.integers(0, 2**64 - 1))
def test_varints_are_protobufs(value: int) -> None:
    message = service_pb2.InferStatistics(success=service_pb2.StatisticDuration(count=value))
    assert message.success.SerializeToString() == (b"\x08" + varint(value) if value else b"")


def test_a_message_of_a_million_small_pieces_is_left_to_the_parser() -> None:
    assert split_field(b"\x3a\x00" * 100_000, 7) is None


@pytest.mark.parametrize("size", [10, 100_000])
def test_bytes_that_are_no_message_are_an_internal_error_as_grpc_says_it(size: int) -> None:
    with pytest.raises(DoorstepError) as raised:
        decode(b"\xff" * size)
    assert (raised.value.code, raised.value.message) == (ErrorCode.INTERNAL, "Unable to parse request")


@pytest.mark.parametrize("elements", [10, 100_000])
def test_raw_tensors_arrive_whether_the_message_is_small_or_large(elements: int) -> None:
    values = np.arange(elements, dtype=np.float32)
    tensor = triton.InferInput("IN", [elements], "FP32")
    tensor.set_data_from_numpy(values)
    message = request_message(shape=[elements], id="1")
    message.raw_input_contents.append(tensor._get_content())
    data = message.SerializeToString()
    request, _, _ = decode(data)
    found = request.inputs["IN"].array
    np.testing.assert_array_equal(found, values)
    assert np.shares_memory(found, np.frombuffer(data, np.uint8)) == (len(data) >= grpc_decode.SPLIT_BYTES)


# Requests

TYPED: dict[str, tuple[str, list[Any]]] = {
    "BOOL": ("bool_contents", [True, False]),
    "INT8": ("int_contents", [-128, 127]),
    "INT16": ("int_contents", [-32768, 32767]),
    "INT32": ("int_contents", [-(2**31), 2**31 - 1]),
    "INT64": ("int64_contents", [-(2**63), 2**63 - 1]),
    "UINT8": ("uint_contents", [0, 255]),
    "UINT16": ("uint_contents", [0, 65535]),
    "UINT32": ("uint_contents", [0, 2**32 - 1]),
    "UINT64": ("uint64_contents", [0, 2**64 - 1]),
    "FP32": ("fp32_contents", [1.5, -0.25]),
    "FP64": ("fp64_contents", [1e300, 0.1]),
    "BYTES": ("bytes_contents", [b"", "é".encode()]),
}


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_arrive(datatype: str) -> None:
    field, values = TYPED[datatype]
    message = request_message(datatype)
    getattr(message.inputs[0].contents, field).extend(values)
    found = decode(message.SerializeToString())[0].inputs["IN"]
    assert found.datatype is DTYPES[datatype]
    assert found.array.dtype == DTYPES[datatype].numpy
    assert found.array.tolist() == values


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_contents_of_another_type_are_refused(datatype: str) -> None:
    declared = "FP64" if datatype != "FP64" else "FP32"
    message = request_message(declared)
    field, values = TYPED[datatype]
    getattr(message.inputs[0].contents, field).extend(values)
    said = {"int_contents": "INT32", "uint_contents": "UINT32"}.get(field, datatype)
    assert refusal(message) == (
        ErrorCode.INVALID_ARG,
        f"unexpected explicit tensor data for input tensor 'IN' for model 'm' of type '{said}', "
        f"expected datatype '{declared}'",
    )


def test_typed_contents_of_two_types_are_refused() -> None:
    message = request_message()
    message.inputs[0].contents.fp32_contents.extend([1, 2])
    message.inputs[0].contents.fp64_contents.extend([1, 2])
    assert refusal(message) == (
        ErrorCode.INVALID_ARG,
        "unexpected explicit tensor data for input tensor 'IN' for model 'm', binary data was already supplied.",
    )


def test_typed_integers_out_of_range_are_refused_rather_than_cut() -> None:
    message = request_message("UINT8")
    message.inputs[0].contents.uint_contents.extend([1, 256])
    assert refusal(message)[1] == "256 in input tensor 'IN' for model 'm' is out of the range of UINT8"


def test_typed_contents_of_another_number_than_the_shape_are_left_to_validation() -> None:
    message = request_message()
    message.inputs[0].contents.fp32_contents.extend([1, 2, 3])
    found = decode(message.SerializeToString())[0].inputs["IN"]
    assert isinstance(found, UnfitTensor)
    assert found.byte_size == 12


def test_raw_and_typed_together_are_refused() -> None:
    message = request_message()
    message.inputs[0].contents.fp32_contents.extend([1, 2])
    message.raw_input_contents.append(b"12345678")
    assert refusal(message)[1] == (
        "contents field must not be specified when using raw_input_contents for 'IN' for model 'm'"
    )


def test_an_input_without_data_is_refused() -> None:
    assert refusal(request_message())[1] == "unable to find data for input tensor 'IN' for model 'm' in request."


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_a_name_given_twice_is_refused(field: str) -> None:
    message = request_message(id="5")
    message.raw_input_contents.append(b"12345678")
    for _ in range(2):
        getattr(message, field).add(name="IN")
    assert refusal(message)[1] == f"[request id: 5] {field[:-1]} 'IN' already exists in request"


def test_parameters_of_the_protocol_are_set_and_the_rest_is_for_the_backend() -> None:
    message = request_message()
    message.raw_input_contents.append(b"12345678")
    p = message.parameters
    p["sequence_id"].string_param = "s"
    p["sequence_start"].bool_param = True
    p["priority"].uint64_param = 3
    p["timeout"].int64_param = 7
    p["triton_enable_empty_final_response"].bool_param = True
    p["i"].int64_param = -1
    p["d"].double_param = 0.5
    request, _, wants_empty_final = decode(message.SerializeToString())
    assert (request.correlation_id, request.sequence_start, request.sequence_end) == ("s", True, False)
    assert (request.priority, request.timeout_us) == (3, 7)
    assert request.parameters == {"i": -1, "d": 0.5}
    assert wants_empty_final


RESERVED = (
    "parameter keys starting with 'triton_' are reserved for Triton usage. Only the following keys starting with "
    "'triton_' are allowed: triton_enable_empty_final_response"
)
WRONG_PARAMETERS: list[tuple[str, str, Any, str]] = [
    ("sequence_id", "bool_param", True, "{key}, expected int64_param or string_param."),
    ("sequence_start", "int64_param", 1, "{key}, expected bool_param."),
    ("sequence_end", "int64_param", 1, "{key}, expected bool_param."),
    ("priority", "bool_param", True, "{key}, expected int64_param or uint64_param."),
    ("priority", "int64_param", -1, "invalid value for 'priority', expected value >= 0."),
    ("timeout", "uint64_param", 1, "{key}, expected int64_param."),
    ("x", "uint64_param", 1, "{key}, expected int64_param, bool_param, or string_param."),
    ("triton_x", "bool_param", True, RESERVED),
]


@pytest.mark.parametrize(("key", "kind", "value", "text"), WRONG_PARAMETERS)
def test_a_parameter_of_the_wrong_kind_is_refused(key: str, kind: str, value: Any, text: str) -> None:
    message = request_message()
    setattr(message.parameters[key], kind, value)
    text = text.replace("{key}", f"invalid value type for '{key}' parameter")
    assert refusal(message) == (ErrorCode.INVALID_ARG, text)


def test_shared_memory_has_no_regions() -> None:
    message = request_message()
    message.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert refusal(message)[1] == (
        "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter for tensor 'IN'"
    )
    message.inputs[0].parameters["shared_memory_byte_size"].int64_param = 8
    assert refusal(message) == (ErrorCode.NOT_FOUND, "Unable to find shared memory region: 'r'")


def test_a_classification_must_be_a_positive_number() -> None:
    message = request_message()
    message.raw_input_contents.append(b"12345678")
    output = message.outputs.add(name="OUT")
    output.parameters["classification"].int64_param = 2
    assert decode(message.SerializeToString())[1].forms == {"OUT": OutputForm(binary=True, classes=2)}
    output.parameters["classification"].int64_param = 0
    assert refusal(message)[1] == "invalid value for 'classification' parameter, expected >= 0"
    output.parameters["classification"].string_param = "2"
    assert refusal(message)[1] == "invalid value type for 'classification' parameter, expected int64_param"


# Responses

arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 2, shape).astype(dtype),
    st.sampled_from(["?", "u1", "<i8", "<f4", "<f2"]),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 100),
)
parameter_values = st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=4), st.floats(width=64))


@given(
    st.text(max_size=4),
    st.lists(st.tuples(st.text(max_size=4), arrays), max_size=3),
    st.dictionaries(st.text(max_size=4), parameter_values, max_size=2),
)
def test_a_response_is_the_message_that_protobuf_would_make(
    id: str, outputs: list[tuple[str, Any]], parameters: dict[str, Any]
) -> None:
    expected = service_pb2.ModelInferResponse(model_name="m", model_version="3", id=id)
    for key, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(expected.parameters[key], kind, value)
    for name, array in outputs:
        expected.outputs.add(name=name, datatype=datatype_of(array).name, shape=array.shape)
        expected.raw_output_contents.append(array.tobytes())
    tensors = [Tensor(name, datatype_of(array), array) for name, array in outputs]
    response = InferenceResponse("m", "3", id, tensors, parameters=parameters)
    made = b"".join(encode_infer(response, ALL_BINARY, CONFIG))
    found = service_pb2.ModelInferResponse.FromString(made)
    assert found.SerializeToString(deterministic=True) == expected.SerializeToString(deterministic=True)


def test_large_outputs_are_not_copied() -> None:
    values = np.zeros(100_000, np.float32)
    response = InferenceResponse("m", "3", "", [Tensor("A", FP32, values), Tensor("B", FP32, values)])
    buffers = encode_infer(response, ALL_BINARY, CONFIG)
    assert len(buffers) == 4
    assert all(np.shares_memory(np.frombuffer(buffers[i], np.uint8), values) for i in (1, 3))
    found = service_pb2.ModelInferResponse.FromString(b"".join(buffers))
    assert list(found.raw_output_contents) == [values.tobytes()] * 2


def test_a_classification_is_sent_as_bytes() -> None:
    response = InferenceResponse("m", "3", "", [Tensor("OUT", FP32, np.array([1, 3, 2], np.float32))])
    buffers = encode_infer(response, Wanted(ALL_BINARY.default, {"OUT": OutputForm(True, 2)}), CONFIG)
    found = triton.InferResult(service_pb2.ModelInferResponse.FromString(b"".join(buffers)))
    assert found.as_numpy("OUT").tolist() == [b"3.000000:1:bee", b"2.000000:2"]


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("elements", [3, 100_000])
def test_a_stream_response_wraps_the_response_and_says_if_it_is_the_last(final: bool, elements: int) -> None:
    response = InferenceResponse("m", "3", "7", [Tensor("OUT", FP32, np.zeros(elements, np.float32))])
    buffers = encode_stream(encode_infer(response, ALL_BINARY, CONFIG, final_flag(final)))
    found = service_pb2.ModelStreamInferResponse.FromString(b"".join(buffers))
    assert found.error_message == ""
    assert found.infer_response.id == "7"
    assert found.infer_response.parameters["triton_final_response"].bool_param is final
    assert len(found.infer_response.raw_output_contents[0]) == elements * 4


def test_a_stream_error_says_which_request_failed() -> None:
    data = encode_stream_error("no luck", named("7", "m", "") + final_flag(True))
    found = service_pb2.ModelStreamInferResponse.FromString(data)
    assert found.error_message == "no luck"
    assert (found.infer_response.id, found.infer_response.model_name) == ("7", "m")
    assert found.infer_response.parameters["triton_final_response"].bool_param


def test_more_dimensions_than_an_array_can_have_are_left_to_validation() -> None:
    for datatype, (field, values) in TYPED.items():
        message = request_message(datatype, [1] * 70 + [len(values)])
        getattr(message.inputs[0].contents, field).extend(values)
        assert isinstance(decode(message.SerializeToString())[0].inputs["IN"], UnfitTensor)
    message = request_message("FP32", [1] * 70)
    message.raw_input_contents.append(bytes(4))
    assert isinstance(decode(message.SerializeToString())[0].inputs["IN"], UnfitTensor)
