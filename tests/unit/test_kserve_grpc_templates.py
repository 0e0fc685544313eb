"""Messages recognised by their beginning mean what protobuf says they mean, and nothing else is recognised."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from doorstep import proto
from doorstep.protocols.kserve.grpc_decode import decode_infer, parse_request
from doorstep.protocols.kserve.grpc_templates import GrpcTemplates, MessageTemplate
from doorstep.request import InferenceRequest
from doorstep.workers.sample import NOBODY


def message(values: Any, *, name: str = "x", shape: Any = None, datatype: str = "FP32", **fields: Any) -> Any:
    array = np.asarray(values, np.float32)
    made = proto.ModelInferRequest(model_name="m", **fields)
    made.inputs.add(name=name, datatype=datatype, shape=array.shape if shape is None else shape)
    made.raw_input_contents.append(array.tobytes())
    return made


def decoded(data: bytes) -> tuple[Any, InferenceRequest, Any]:
    parsed, raw = parse_request(data)
    request = InferenceRequest(parsed.model_name, {}, NOBODY, model_version=parsed.model_version)
    wanted, _ = decode_infer(request, parsed, raw)
    return parsed, request, wanted


def learn(templates: GrpcTemplates, data: bytes) -> MessageTemplate | None:
    templates.learn(data, *decoded(data))
    return templates.find(data)


def test_the_same_request_with_other_values_is_recognised() -> None:
    templates = GrpcTemplates()
    assert learn(templates, message([[1, 2, 3]]).SerializeToString()) is not None
    data = message([[4, 5, 6]]).SerializeToString()
    template = templates.find(data)
    assert template is not None
    assert (template.model_name, template.model_version, template.input_name) == ("m", "", "x")
    np.testing.assert_array_equal(template.tensor(data, template.offset).array, [[4, 5, 6]])


def test_any_other_beginning_is_not() -> None:
    templates = GrpcTemplates()
    learn(templates, message([[1, 2, 3]]).SerializeToString())
    for other in (
        message([[1, 2, 3]], name="y"),
        message([[1, 2, 3]], datatype="INT32"),
        message([[1, 2, 3]], shape=[3, 1]),
        message([[1, 2, 3]], model_version="2"),
        message([[1, 2, 3, 4]]),
    ):
        assert templates.find(other.SerializeToString()) is None


def test_what_is_not_simple_is_never_learned() -> None:
    with_parameter = message([[1, 2]])
    with_parameter.parameters["priority"].int64_param = 1
    two = message([[1, 2]])
    two.inputs.add(name="z", datatype="FP32", shape=[1])
    two.raw_input_contents.append(bytes(4))
    strings = message([[1]], datatype="BYTES", shape=[1])
    strings.raw_input_contents[0] = b"\1\0\0\0a"
    for one in (message([[1, 2]], id="a"), with_parameter, two, strings):
        assert learn(GrpcTemplates(), one.SerializeToString()) is None


def test_a_tensor_that_is_not_at_the_end_is_not_learned() -> None:
    data = message([[1, 2]]).SerializeToString()
    raw = b"\x3a\x08" + np.array([1, 2], np.float32).tobytes()
    assert data.endswith(raw)
    turned = raw + data[: -len(raw)]  # fields may come in any order
    assert proto.ModelInferRequest.FromString(turned) == proto.ModelInferRequest.FromString(data)
    assert learn(GrpcTemplates(), turned) is None


def test_requested_outputs_come_back() -> None:
    asked = message([[1, 2]])
    asked.outputs.add(name="b")
    template = learn(GrpcTemplates(), asked.SerializeToString())
    assert template is not None
    assert template.requested_outputs == ("b",)


def test_the_memory_is_bounded() -> None:
    templates = GrpcTemplates()
    for i in range(2000):
        learn(templates, message([[1, 2]], name=f"input{i}").SerializeToString())
    assert len(templates._by_head) <= 256


@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "yy"]), st.lists(st.floats(width=32), min_size=1, max_size=4)), max_size=12
    )
)
def test_recognised_or_parsed_the_answer_is_the_same(requests: list[tuple[str, list[float]]]) -> None:
    templates = GrpcTemplates()
    for name, values in requests:
        data = message([values], name=name).SerializeToString()
        parsed, request, wanted = decoded(data)
        template = templates.find(data)
        if template is None:
            templates.learn(data, parsed, request, wanted)
            template = templates.find(data)
        assert template is not None
        (tensor,) = request.inputs.values()
        assert (template.input_name, template.tensor(data, template.offset).datatype) == (tensor.name, tensor.datatype)
        assert template.tensor(data, template.offset).array.tobytes() == tensor.array.tobytes()
        assert template.tensor(data, template.offset).array.shape == tensor.array.shape
