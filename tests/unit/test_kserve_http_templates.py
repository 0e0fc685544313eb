"""HTTP requests recognised by their JSON mean what parsing says they mean, and nothing else is recognised."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from doorstep.protocols.kserve.http_decode import decode_infer
from doorstep.protocols.kserve.http_templates import HttpTemplates
from doorstep.protocols.kserve.templates import Template
from doorstep.request import InferenceRequest
from doorstep.testing.fakes import model_config
from doorstep.workers.sample import NOBODY


def body(values: Any, *, tail: bytes = b"", **fields: Any) -> tuple[bytes, int]:
    array = np.asarray(values, np.float32)
    tensor = {
        "name": "x",
        "shape": list(array.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": array.nbytes},
    }
    text = json.dumps({"inputs": [tensor], **fields}).encode()
    return text + array.tobytes() + tail, len(text)


def decoded(data: bytes, size: int) -> tuple[InferenceRequest, Any]:
    request = InferenceRequest("m", {}, NOBODY)
    config = model_config("m", inputs={"x": ("FP32", [-1])}, outputs={"y": ("FP32", [-1])})
    return request, decode_infer(request, data, size, config, 1 << 20)


def learn(templates: HttpTemplates, data: bytes, size: int) -> Template | None:
    templates.learn(data, size, *decoded(data, size))
    return templates.find(data, size)


def test_the_same_json_with_other_values_is_recognised() -> None:
    templates = HttpTemplates()
    assert learn(templates, *body([1, 2, 3])) is not None
    data, size = body([4, 5, 6])
    template = templates.find(memoryview(data), size)
    assert template is not None
    request, wanted = decoded(data, size)
    tensor = template.tensor(data, size)
    np.testing.assert_array_equal(tensor.array, [4, 5, 6])
    assert tensor.datatype is request.inputs["x"].datatype
    assert template.wanted is wanted


def test_the_outputs_that_were_asked_for_come_back() -> None:
    outputs = [{"name": "y", "parameters": {"binary_data": True}}]
    data, size = body([1, 2], outputs=outputs)
    template = learn(HttpTemplates(), data, size)
    assert template is not None
    assert template.requested_outputs == ("y",)
    assert template.wanted == decoded(data, size)[1]


def test_another_length_of_the_binary_part_is_not_recognised() -> None:
    templates = HttpTemplates()
    data, size = body([1, 2, 3])
    learn(templates, data, size)
    assert templates.find(data + b"\0", size) is None
    assert templates.find(data[:-1], size) is None


@pytest.mark.parametrize(
    "fields",
    [{"id": "a"}, {"parameters": {"priority": 1}}, {"parameters": {"x": 1}}, {"parameters": {"sequence_id": 3}}],
)
def test_what_is_not_simple_is_never_learned(fields: dict[str, Any]) -> None:
    assert learn(HttpTemplates(), *body([1, 2], **fields)) is None


def test_the_memory_is_bounded() -> None:
    templates = HttpTemplates()
    for i in range(1000):
        learn(templates, *body([1, 2], unknown=i))
    assert len(templates._by_json) <= 256
