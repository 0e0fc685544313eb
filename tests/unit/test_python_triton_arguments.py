"""What pb_utils takes as text and as integers: whatever pybind11 takes for a std::string and an integer."""

from __future__ import annotations

import numpy as np
import pytest

from doorstep.backends.python import triton_compat as pb_utils


def request(**changes) -> pb_utils.InferenceRequest:
    given = {"model_name": "m", "requested_output_names": ["Y"], "inputs": [], **changes}
    return pb_utils.InferenceRequest(**given)


@pytest.mark.parametrize("as_given", [str.encode, lambda text: bytearray(text, "utf-8"), np.str_])
def test_bytes_are_text_wherever_text_is_wanted(as_given):
    made = request(
        model_name=as_given("añ"), request_id=as_given("r"), requested_output_names=[as_given("Z"), as_given("Y")]
    )
    assert (made.model_name(), made.request_id(), made.requested_output_names()) == ("añ", "r", ["Y", "Z"])
    texts = [made.model_name(), made.request_id(), *made.requested_output_names()]
    texts.append(pb_utils.Tensor(as_given("T"), np.zeros(1)).name())
    texts.append(pb_utils.TritonError(as_given("wrong")).message())
    assert texts[-2:] == ["T", "wrong"]
    assert {type(text) for text in texts} == {str}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_name": 3}, "model_name must be a str, not int"),
        ({"model_name": b"\xff"}, "model_name is no UTF-8"),
        ({"request_id": None}, "request_id must be a str, not NoneType"),
        ({"requested_output_names": [4]}, "a requested output's name must be a str, not int"),
        ({"requested_output_names": "Y"}, "requested_output_names must be a list of names"),
        ({"model_version": "1"}, "model_version must be an int, not str"),
        ({"model_version": 2**63}, "model_version is 9223372036854775808; it must be from"),
        ({"flags": -1}, "flags is -1; it must be from 0 to 4294967295"),
        ({"timeout": 1.5}, "timeout must be an int, not float"),
        ({"timeout": -1}, "timeout is -1"),
        ({"correlation_id": None}, "correlation_id must be an int or a str, not None"),
        ({"correlation_id": -1}, "correlation_id is -1"),
        ({"correlation_id": 2**64}, "correlation_id is 18446744073709551616"),
    ],
)
def test_what_is_neither_is_named(changes, text):
    with pytest.raises(TypeError, match=text):
        request(**changes)


def test_integers_of_numpy_are_integers():
    made = request(model_version=np.int64(2), flags=np.uint8(1), timeout=np.int32(5))
    assert (made._model_version, made.flags(), made.timeout()) == (2, 1, 5)
    assert {type(made._model_version), type(made.flags()), type(made.timeout())} == {int}


@pytest.mark.parametrize(
    "call",
    [
        lambda: pb_utils.Logger.log("text", 1),
        lambda: pb_utils.Logger.log("text", None),
        lambda: pb_utils.Logger.log_warn(None),
        lambda: pb_utils.MetricFamily("name", "what", 0),
        lambda: pb_utils.MetricFamily(None, "what", pb_utils.MetricFamily.GAUGE),
        lambda: pb_utils.is_model_ready(None),
        lambda: pb_utils.load_model("m", config=None),
    ],
)
def test_a_level_and_a_kind_are_those_of_the_api_and_a_text_is_no_none(call):
    with pytest.raises(TypeError):
        call()


@pytest.mark.parametrize("made", [lambda p: request(parameters=p), lambda p: pb_utils.InferenceResponse([], None, p)])
def test_parameters_are_a_dict(made):
    assert made(None).parameters() == made({}).parameters() == "{}"
    for wrong in ([], (), "a", [("a", 1)]):
        with pytest.raises(pb_utils.TritonModelException, match=f", got <class '{type(wrong).__name__}'>"):
            made(wrong)
