"""Every text of validation, as Triton's core words it (infer_request.cc, model.cc); and what passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from doorstep.config.model import ModelConfig
from doorstep.errors import ErrorCode, InvalidArgument
from doorstep.request import InferenceRequest
from doorstep.testing.fakes import model_config
from doorstep.types import BYTES, DTYPES, FP32, INT32, Tensor
from doorstep.validation import INVALID, UnfitTensor, Validator

NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
BATCHED = model_config("m", {"a": ("FP32", [4])}, {"out": ("FP32", [4])}, max_batch_size=8)
PLAIN = model_config("m", {"a": ("FP32", [-1, 4])}, {"out": ("FP32", [4])})
PAIR = model_config("m", {"a": ("FP32", [4]), "b": ("FP32", [4])}, {"out": ("FP32", [4])}, max_batch_size=8)
OPTIONAL = model_config("m", {"a": ("FP32", [4]), "b": ("FP32", [4])}, {"out": ("FP32", [4])}, optional=["b"])
TEXT = model_config("m", {"a": ("BYTES", [-1])}, {"out": ("FP32", [4])})


class NoSender:
    def send(self, response: object, final: bool) -> None:
        raise AssertionError("validation answers nobody")


def request(*inputs: Tensor, outputs: Sequence[str] = (), id: str = "") -> InferenceRequest:
    return InferenceRequest("m", {t.name: t for t in inputs}, NoSender(), id=id, requested_outputs=tuple(outputs))


def tensor(name: str, shape: Sequence[int], datatype: str = "FP32") -> Tensor:
    return Tensor(name, DTYPES[datatype], np.zeros(shape, DTYPES[datatype].numpy))


def complaint(config: ModelConfig, asked: InferenceRequest) -> str:
    with pytest.raises(InvalidArgument) as raised:
        Validator(config).validate(asked)
    assert raised.value.code is ErrorCode.INVALID_ARG
    return raised.value.message


@pytest.mark.parametrize("shape", [(1, 4), (8, 4)])
def test_a_batch_within_bounds_passes_and_counts_its_rows(shape: tuple[int, ...]) -> None:
    validator = Validator(BATCHED)
    for _ in range(2):  # the second time from the shapes remembered
        asked = request(tensor("a", shape))
        validator.validate(asked)
        assert asked.rows == shape[0]


def test_a_request_to_a_model_that_does_not_batch_counts_one_row() -> None:
    asked = request(tensor("a", (5, 4)), outputs=["out"])
    Validator(PLAIN).validate(asked)
    assert asked.rows == 1


def test_an_optional_input_may_be_left_out() -> None:
    Validator(OPTIONAL).validate(request(tensor("a", (4,))))


def test_shapes_are_remembered_per_input_not_per_request() -> None:
    validator = Validator(PAIR)
    validator.validate(request(tensor("a", (1, 4)), tensor("b", (1, 4))))
    validator.validate(request(tensor("a", (2, 4)), tensor("b", (2, 4))))
    with pytest.raises(InvalidArgument, match="batch size does not match"):
        validator.validate(request(tensor("a", (1, 4)), tensor("b", (2, 4))))


def test_no_more_than_a_bounded_number_of_shapes_is_remembered() -> None:
    validator = Validator(PLAIN)
    for rows in range(1000):
        validator.validate(request(tensor("a", (rows, 4))))
    assert len(validator._accepted["a"][1]) <= 256


PREFIX = "[request id: <id_unknown>] "

CASES = {
    "unknown output": (
        BATCHED,
        request(tensor("a", (1, 4)), outputs=["nope"]),
        "unexpected inference output 'nope' for model 'm'",
    ),
    "unknown input": (BATCHED, request(tensor("nope", (1, 4))), "unexpected inference input 'nope' for model 'm'"),
    "no input": (
        PAIR,
        request(),
        PREFIX + "expected 2 inputs but got 0 inputs for model 'm'. Got input(s) [], but missing required input(s) "
        "['a','b']. Please provide all required input(s).",
    ),
    "one of two inputs": (
        PAIR,
        request(tensor("b", (1, 4)), id="7"),
        "[request id: 7] expected 2 inputs but got 1 inputs for model 'm'. Got input(s) ['b'], but missing required "
        "input(s) ['a']. Please provide all required input(s).",
    ),
    "too many inputs": (
        OPTIONAL,
        request(tensor("a", (4,)), tensor("b", (4,)), tensor("c", (4,))),
        PREFIX + "expected number of inputs between 1 and 2 but got 3 inputs for model 'm'. Got input(s) "
        "['a','b','c'], but missing required input(s) ]. Please provide all required input(s).",
    ),
    "other datatype": (
        BATCHED,
        request(tensor("a", (1, 4), "INT32")),
        PREFIX + "inference input 'a' data-type is 'INT32', but model 'm' expects 'FP32'",
    ),
    "no datatype": (
        BATCHED,
        request(UnfitTensor("a", INVALID, (1, 4), 16)),
        PREFIX + "inference input 'a' data-type is '<invalid>', but model 'm' expects 'FP32'",
    ),
    "other shape": (
        BATCHED,
        request(tensor("a", (1, 5))),
        PREFIX + f"unexpected shape for input 'a' for model 'm'. Expected [-1,4], got [1,5]. {NOTE}",
    ),
    "no batch dimension": (
        BATCHED,
        request(tensor("a", (4,))),
        PREFIX + f"unexpected shape for input 'a' for model 'm'. Expected [-1,4], got [4]. {NOTE}",
    ),
    "other shape without batching": (
        PLAIN,
        request(tensor("a", (2, 5))),
        PREFIX + "unexpected shape for input 'a' for model 'm'. Expected [-1,4], got [2,5]. ",
    ),
    "no shape at all": (
        BATCHED,
        request(tensor("a", ())),
        PREFIX + "input 'a' has no shape but model requires batch dimension for 'm'",
    ),
    "too large a batch": (
        BATCHED,
        request(tensor("a", (9, 4))),
        PREFIX + "inference request batch-size must be <= 8 for 'm'",
    ),
    "a negative batch": (
        BATCHED,
        request(UnfitTensor("a", FP32, (-1, 4), 16)),
        PREFIX + "inference request batch-size must be <= 8 for 'm'",
    ),
    "batches that differ": (
        PAIR,
        request(tensor("a", (1, 4)), tensor("b", (2, 4))),
        PREFIX + "input 'b' batch size does not match other inputs for 'm'",
    ),
    "an empty batch": (
        BATCHED,
        request(tensor("a", (0, 4))),
        PREFIX + "input byte size mismatch for input 'a' for model 'm'. Expected 16, got 0",
    ),
    "too few bytes": (
        BATCHED,
        request(UnfitTensor("a", FP32, (1, 4), 12)),
        PREFIX + "input byte size mismatch for input 'a' for model 'm'. Expected 16, got 12",
    ),
    "a dimension left open": (
        PLAIN,
        request(UnfitTensor("a", FP32, (-1, 4), 16)),
        PREFIX + "All input dimensions should be specified for input 'a' for model 'm', got [-1,4]",
    ),
    "a negative dimension": (
        PLAIN,
        request(UnfitTensor("a", FP32, (-2, 4), 16)),
        "tensor 'a' contains an invalid dimension [-2,4]",
    ),
    "a negative dimension of BYTES": (
        TEXT,
        request(UnfitTensor("a", BYTES, (-2,), 16)),
        "tensor 'a' contains an invalid dimension in shape [-2]",
    ),
    "more bytes than can be": (
        PLAIN,
        request(UnfitTensor("a", FP32, (2**61, 4), 16)),
        f"byte size for tensor 'a' exceeds maximum size of {2**63 - 1}",
    ),
    "a problem a codec found": (
        TEXT,
        request(UnfitTensor("a", BYTES, (2,), 16, "{prefix}about '{name}' of '{model}'")),
        PREFIX + "about 'a' of 'm'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_does_not_fit_is_refused_in_tritons_words(name: str) -> None:
    config, asked, text = CASES[name]
    assert complaint(config, asked) == text


def test_the_datatype_is_judged_before_the_size_of_the_data() -> None:
    unfit = UnfitTensor("a", INT32, (1, 4), 3)
    assert "data-type is 'INT32'" in complaint(BATCHED, request(unfit))


def test_a_shape_tensor_has_no_batch_dimension() -> None:
    message = model_config("m", {"a": ("FP32", [4]), "s": ("INT32", [2])}, {"out": ("FP32", [4])}).proto
    message.max_batch_size = 8
    message.input[1].is_shape_tensor = True
    asked = request(tensor("a", (3, 4)), tensor("s", (2,), "INT32"))
    Validator(ModelConfig.from_proto(message)).validate(asked)
    assert asked.rows == 3
