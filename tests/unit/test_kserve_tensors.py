"""BYTES tensors and classification: against tritonclient's encoders, and the facts of Triton's classification.cc."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from doorstep.config.model import ModelConfig
from doorstep.errors import InvalidArgument
from doorstep.protocols.kserve.bytes_tensors import decode_bytes, encode_bytes, tensor_of_elements
from doorstep.protocols.kserve.classification import classify
from doorstep.request import InferenceRequest
from doorstep.testing.fakes import model_config
from doorstep.types import BOOL, BYTES, DTYPES, FP16, FP32, Array, Tensor
from doorstep.validation import UnfitTensor, Validator

CONFIG: ModelConfig = model_config("m", {"IN": ("BYTES", [-1])}, {"OUT": ("BYTES", [-1])})


class NoSender:
    def send(self, response: object, final: bool) -> None:
        raise AssertionError


def array_of(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


@given(st.lists(st.binary(max_size=40), min_size=1))
def test_bytes_are_encoded_and_decoded_as_tritonclient_does(elements: list[bytes]) -> None:
    encoded = serialize_byte_tensor(array_of(elements)).item()
    assert encode_bytes(array_of(elements)) == encoded
    found = decode_bytes("IN", [len(elements)], encoded)
    assert found.array.tolist() == elements
    assert deserialize_bytes_tensor(encode_bytes(found.array)).tolist() == elements


def test_text_and_other_objects_of_a_backend_become_bytes() -> None:
    array = np.array(["é", b"x", 3], np.object_)
    assert deserialize_bytes_tensor(encode_bytes(array)).tolist() == ["é".encode(), b"x", b"3"]


PREFIX = "[request id: <id_unknown>] "
MODEL = "for inference input 'IN' for model 'm'"


@pytest.mark.parametrize(
    ("count", "data", "text"),
    [
        (2, b"\x01\0\0\0a", PREFIX + f"expected 2 string elements {MODEL}, got 1"),
        (1, b"\0\0\0\0" * 2, PREFIX + f"unexpected number of string elements 2 {MODEL}, expecting 1"),
        (0, b"\0\0\0\0", PREFIX + f"unexpected number of string elements 1 {MODEL}, expecting 0"),
        (
            2,
            b"\0\0\0\0\0\0",
            PREFIX + f"incomplete string length indicator {MODEL}, expecting 4 bytes but only 2 bytes available. "
            "Please make sure the string length indicator is in one buffer.",
        ),
        (
            1,
            b"\x64\0\0\0abcd",
            "incomplete string data for inference input 'IN', expecting string of length 100 but only 4 bytes "
            "available",
        ),
    ],
)
def test_bytes_that_do_not_fit_their_shape_are_refused_in_tritons_words(count: int, data: bytes, text: str) -> None:
    found = decode_bytes("IN", [count], data)
    assert isinstance(found, UnfitTensor)
    with pytest.raises(InvalidArgument) as raised:
        Validator(CONFIG).validate(InferenceRequest("m", {"IN": found}, NoSender()))
    assert raised.value.message == text


@pytest.mark.parametrize("count", [0, 1, 3])
def test_elements_that_came_one_by_one_are_counted_too(count: int) -> None:
    found = tensor_of_elements("IN", [count], [b"a", b"b"])
    with pytest.raises(InvalidArgument, match="string elements"):
        Validator(CONFIG).validate(InferenceRequest("m", {"IN": found}, NoSender()))


# Classification


def classes(values: object, count: int, *, datatype: str = "FP32", batched: bool = True) -> list[object]:
    tensor = Tensor("OUT", DTYPES[datatype], np.array(values, DTYPES[datatype].numpy))
    found = classify(tensor, count, ("ant", "", "cat"), batched=batched)
    assert found.datatype is BYTES
    return found.array.tolist()


def test_the_largest_values_come_first_with_index_and_label() -> None:
    assert classes([[0.1, 0.5, 0.25, -1]], 2) == [[b"0.500000:1", b"0.250000:2:cat"]]


def test_every_row_is_classified_by_itself() -> None:
    assert classes([[1, 2], [4, 3]], 1) == [[b"2.000000:1"], [b"4.000000:0:ant"]]


def test_a_model_that_does_not_batch_is_classified_as_a_whole() -> None:
    assert classes([[1, 2], [4, 3]], 2, batched=False) == [b"4.000000:2:cat", b"3.000000:3"]


def test_no_more_classes_than_elements_are_returned() -> None:
    assert classes([[1, 2]], 5) == [[b"2.000000:1", b"1.000000:0:ant"]]


@pytest.mark.parametrize(
    ("datatype", "values", "first"),
    [
        ("UINT8", [0, 255, 1], b"255:1"),
        ("UINT64", [2**64 - 1, 0, 1], f"{2**64 - 1}:0:ant".encode()),
        ("INT8", [-128, -1, -127], b"-1:1"),
        ("INT64", [-(2**63), 0, 2**63 - 1], f"{2**63 - 1}:2:cat".encode()),
        ("FP64", [1e-9, 0.5, float("nan")], b"0.500000:1"),
    ],
)
def test_integers_are_written_whole_and_compared_without_overflow(
    datatype: str, values: list[float], first: bytes
) -> None:
    assert classes([values], 1, datatype=datatype) == [[first]]


def test_nan_comes_last() -> None:
    assert classes([[float("nan"), 1.0]], 2) == [[b"1.000000:1", b"nan:0:ant"]]


@pytest.mark.parametrize("datatype", [BOOL, BYTES, FP16])
def test_types_without_an_order_of_classes_are_refused(datatype: object) -> None:
    tensor = Tensor("OUT", datatype, np.zeros((1, 2), np.object_))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument) as raised:
        classify(tensor, 1, (), batched=True)
    assert raised.value.message == f"class result not available for output due to unsupported type '{datatype}'"


def test_a_row_too_large_to_sort_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="classification output tensor too large"):
        classify(Tensor("OUT", FP32, np.zeros((1, 1_000_001), np.float32)), 1, (), batched=True)
