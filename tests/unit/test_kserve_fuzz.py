"""Whatever comes, a codec fills the request or raises DoorstepError, and what then passes validation can be stacked."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from doorstep import proto
from doorstep.errors import DoorstepError
from doorstep.protocols.kserve import grpc_decode, http_decode
from doorstep.request import InferenceRequest
from doorstep.testing.fakes import model_config
from doorstep.validation import Validator

CONFIG = model_config(
    "m",
    {"IN": ("FP32", [2]), "TEXT": ("BYTES", [-1])},
    {"OUT": ("FP32", [2])},
    max_batch_size=4,
    optional=["TEXT", "IN"],
)
VALIDATOR = Validator(CONFIG)


class NoSender:
    def send(self, response: object, final: bool) -> None:
        raise AssertionError("decoding answers nobody")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.integers(0, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.sampled_from(["IN", "TEXT", "FP32", "BYTES", "BOOL", "FP16", "INT8", "UINT64"]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=8)
shapes = st.one_of(values, st.lists(st.integers(0, 3), max_size=4), st.just([1, 2]))
parameters = st.one_of(
    values,
    st.dictionaries(
        st.sampled_from(
            ["binary_data_size", "binary_data", "classification", "shared_memory_region", "sequence_id", "x"]
        ),
        st.one_of(scalars, st.integers(0, 16)),
        max_size=2,
    ),
)
inputs = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["IN", "TEXT", "X"]) | values,
        "datatype": st.sampled_from(["FP32", "BYTES"]) | values,
        "shape": shapes,
    },
    optional={"data": st.one_of(values, st.just([1.5, 2])), "parameters": parameters},
)
outputs = st.fixed_dictionaries({}, optional={"name": scalars, "parameters": parameters})
documents = st.one_of(
    values,
    st.fixed_dictionaries(
        {"inputs": st.one_of(values, st.lists(inputs, max_size=2))},
        optional={
            "id": scalars,
            "parameters": parameters,
            "outputs": st.one_of(values, st.lists(outputs, max_size=2)),
        },
    ),
)


def check(request: InferenceRequest) -> None:
    """What passed validation is what a batch is made of."""
    try:
        VALIDATOR.validate(request)
    except DoorstepError:
        return
    for name, tensor in request.inputs.items():
        spec = CONFIG.inputs[name]
        assert tensor.array.dtype == spec.datatype.numpy
        assert tensor.array.ndim == len(spec.shape)
        assert tensor.array.shape[0] == request.rows
        np.concatenate([tensor.array, tensor.array])


@given(documents, st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_any_json_with_any_bytes_after_it_is_decoded_or_refused(document: Any, rest: bytes) -> None:
    text = json.dumps(document).encode()
    request = InferenceRequest("m", {}, NoSender(), received_ns=1)
    try:
        http_decode.decode_infer(request, text + rest, len(text), CONFIG, 1 << 20)
    except DoorstepError:
        return
    check(request)


@given(st.binary(max_size=80), st.integers(0, 80))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_decoded_or_refused(body: bytes, size: int) -> None:
    request = InferenceRequest("m", {}, NoSender(), received_ns=1)
    try:
        http_decode.decode_infer(request, body, min(size, len(body)), CONFIG, 1 << 20)
    except DoorstepError:
        return
    check(request)


tensors = st.builds(
    lambda name, datatype, shape, floats, texts: proto.ModelInferRequest.InferInputTensor(
        name=name,
        datatype=datatype,
        shape=shape,
        contents=proto.InferTensorContents(fp32_contents=floats, bytes_contents=texts) if floats or texts else None,
    ),
    st.sampled_from(["IN", "TEXT", "X", ""]),
    st.sampled_from(["FP32", "BYTES", "BOOL", "BF16", ""]),
    st.lists(st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**63 - 1)), max_size=4),
    st.lists(st.floats(width=32), max_size=3),
    st.lists(st.binary(max_size=3), max_size=2),
)


@given(st.lists(tensors, max_size=2), st.lists(st.binary(max_size=24), max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_message_is_decoded_or_refused(inputs: list[Any], raw: list[bytes], large: bool) -> None:
    message = proto.ModelInferRequest(model_name="m", inputs=inputs, raw_input_contents=raw)
    if large:
        message.raw_input_contents.append(bytes(grpc_decode.SPLIT_BYTES))
    parsed, views = grpc_decode.parse_request(message.SerializeToString())
    request = InferenceRequest("m", {}, NoSender(), received_ns=1)
    try:
        grpc_decode.decode_infer(request, parsed, views)
    except DoorstepError:
        return
    check(request)
