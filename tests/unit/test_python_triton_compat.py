"""triton_python_backend_utils: the helpers, against Triton's documentation of them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from doorstep.backends.python import triton_compat as pb_utils

CONFIG = {
    "name": "m",
    "max_batch_size": 4,
    "input": [{"name": "A", "data_type": "TYPE_FP32", "dims": [2], "optional": False}],
    "output": [{"name": "B", "data_type": "TYPE_INVALID", "dims": []}],
}


def config(**changes) -> pb_utils.ModelConfig:
    return pb_utils.ModelConfig(json.dumps(CONFIG | changes))


def test_strings_are_serialised_as_the_protocol_says():
    array = np.array([b"a", "ü", b""], object)
    data = pb_utils.serialize_byte_tensor(array)
    assert data == b"\x01\0\0\0a" + b"\x02\0\0\0" + "ü".encode() + b"\0\0\0\0"
    assert pb_utils.deserialize_bytes_tensor(data).tolist() == [b"a", "ü".encode(), b""]
    assert pb_utils.serialize_byte_tensor(np.empty(0, object)) == ()
    assert pb_utils.serialize_byte_tensor(np.zeros(1)) is None


@pytest.mark.parametrize(
    ("name", "number", "numpy"),
    [("BOOL", 1, np.bool_), ("UINT8", 2, np.uint8), ("INT64", 9, np.int64), ("FP16", 10, np.float16),
     ("FP64", 12, np.float64), ("STRING", 13, np.object_)],
)  # fmt: skip
def test_datatypes_translate(name, number, numpy):
    assert pb_utils.triton_to_numpy_type(number) is numpy
    assert pb_utils.numpy_to_triton_type(numpy) == number
    assert np.dtype(pb_utils.triton_string_to_numpy(f"TYPE_{name}")) == np.dtype(numpy)


def test_configs_are_searched_by_name():
    assert pb_utils.get_input_config_by_name(CONFIG, "A")["dims"] == [2]
    assert pb_utils.get_output_config_by_name(CONFIG, "A") is None
    assert pb_utils.using_decoupled_model_transaction_policy(CONFIG) is False
    assert pb_utils.using_decoupled_model_transaction_policy({"model_transaction_policy": {"decoupled": True}})


def test_tensors_and_responses_refuse_what_triton_refuses():
    with pytest.raises(pb_utils.TritonModelException, match="Tensor name cannot be an empty string"):
        pb_utils.Tensor("", np.zeros(1))
    with pytest.raises(pb_utils.TritonModelException, match="NumPy dtype is not supported"):
        pb_utils.Tensor("x", np.zeros(1, np.complex64))
    with pytest.raises(TypeError):
        pb_utils.Tensor("x", [1, 2])
    with pytest.raises(pb_utils.TritonModelException, match="DLPack does not have support for string tensors"):
        pb_utils.Tensor("x", np.array([b"a"], object)).to_dlpack()
    with pytest.raises(pb_utils.TritonModelException, match="should not be empty"):
        pb_utils.InferenceResponse([None])
    with pytest.raises(TypeError):
        pb_utils.InferenceResponse(error="text")
    tensor = pb_utils.Tensor("y", np.zeros((2, 1), np.float32))
    assert (tensor.name(), tensor.shape(), tensor.triton_dtype(), tensor.is_cpu()) == ("y", [2, 1], 11, True)
    response = pb_utils.InferenceResponse([tensor])
    assert pb_utils.get_output_tensor_by_name(response, "y") is tensor
    assert not response.has_error()
    assert pb_utils.InferenceResponse(error=pb_utils.TritonError("no")).error().code() == pb_utils.TritonError.INTERNAL


def test_auto_complete_config_adds_what_is_missing():
    made = config(max_batch_size=0)
    made.set_max_batch_size(8)
    made.add_input({"name": "A", "data_type": "TYPE_FP32", "dims": [2]})
    made.add_input({"name": "C", "data_type": "TYPE_INT8", "dims": [-1], "optional": True})
    made.add_output({"name": "B", "data_type": "TYPE_INT8", "dims": [1]})
    made.set_dynamic_batching()
    made.set_model_transaction_policy({"decoupled": True})
    got = made.as_dict()
    assert got["max_batch_size"] == 8
    assert [t["name"] for t in got["input"]] == ["A", "C"]
    assert got["output"] == [{"name": "B", "data_type": "TYPE_INT8", "dims": [1]}]
    assert got["dynamic_batching"] == {}
    assert got["model_transaction_policy"] == {"decoupled": True}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.set_max_batch_size(2), "configuration specified max_batch_size 4, but in auto-complete-config"),
        (lambda c: c.add_input({"name": "A", "data_type": "TYPE_INT8", "dims": [2]}),
         "unable to load model 'm', configuration expects datatype TYPE_FP32 for input 'A', model provides TYPE_INT8"),
        (lambda c: c.add_input({"name": "A", "data_type": "TYPE_FP32", "dims": [3]}),
         "model 'm', tensor 'A': the model expects dims [3] but the model configuration specifies dims [2]"),
        (lambda c: c.add_input({"name": "A", "data_type": "TYPE_FP32", "dims": [2], "optional": True}),
         "model 'm', tensor 'A': the model expects optional True but the model configuration specifies optional False"),
        (lambda c: c.add_input({"name": "A", "data_type": "TYPE_FP32", "dims": [2], "label": "x"}),
         "input 'A' in auto-complete-config function for model 'm' contains property other than 'name', 'data_type', "
         "'dims' and 'optional'."),
        (lambda c: c.add_output({"data_type": "TYPE_FP32", "dims": [2]}),
         "output in auto-complete-config function for model 'm' is missing 'name' property."),
        (lambda c: c.add_output({"name": "B", "data_type": "TYPE_FP32"}),
         "output 'B' in auto-complete-config function for model 'm' is missing 'dims' property."),
        (lambda c: c.set_model_transaction_policy({"x": 1}), "contains property other than 'decoupled'."),
        (lambda c: (c.set_model_transaction_policy({"decoupled": True}),
                    c.set_model_transaction_policy({"decoupled": False})),
         "trying to change decoupled property in auto-complete-config for model 'm', which is already set to 'True'."),
    ],
)  # fmt: skip
def test_auto_complete_config_contradicting_the_config_is_refused_in_tritons_words(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(config())


def test_dynamic_batching_beside_another_scheduler_is_refused():
    with pytest.raises(ValueError, match="scheduling_choice as 'sequence_batching'"):
        config(sequence_batching={}).set_dynamic_batching()
