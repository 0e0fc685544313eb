"""The identity backend can take its time, by the parameters of Triton's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.backends import identity
from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.config.model import ModelConfig
from doorstep.errors import ConfigError
from doorstep.request import Batch, InferenceRequest
from doorstep.testing.responses import NOBODY
from doorstep.types import BYTES, FP32, Tensor

TEXT = 'name: "m" backend: "identity" input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1 ] }'


def completed(**parameters: str) -> Any:
    message = text_format.Parse(TEXT, proto.ModelConfig())
    for name, value in parameters.items():
        message.parameters[name].string_value = value
    identity.IdentityBackend().complete_config(message, Path(), Path(), CompletionContext())
    return message


def slept(monkeypatch: pytest.MonkeyPatch, message: Any, instance: str) -> tuple[list[float], list[float]]:
    """What loading an instance sleeps, and what running it does."""
    naps: list[float] = []
    monkeypatch.setattr(identity.time, "sleep", naps.append)
    context = InstanceContext(ModelConfig.from_proto(message), "1", Path(), Path(), instance_name=instance)
    loaded = identity.IdentityBackend().load_instance(context)
    loading = [nap for nap in naps if nap]
    naps.clear()
    assert isinstance(loaded, identity.IdentityInstance)
    x = np.ones((1,), np.float32)
    assert loaded.run({"INPUT0": x}, ("OUTPUT0",))["OUTPUT0"] is x
    return loading, list(naps)


def test_without_parameters_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    message = completed()
    assert not message.parameters
    assert slept(monkeypatch, message, "m_0_0") == ([], [])


def test_an_execution_takes_its_delay_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    message = completed(execute_delay_ms="250")
    assert message.parameters["execution"].string_value == "thread"
    assert slept(monkeypatch, message, "m_0_3") == ([], [0.25])
    assert completed(execute_delay_ms="250", execution="process").parameters["execution"].string_value == "process"


@pytest.mark.parametrize(("instance", "seconds"), [("m_0_0", 0.1), ("m_0_1", 0.4), ("m_0_2", 0.8)])
def test_the_delay_is_times_the_instances_number(
    monkeypatch: pytest.MonkeyPatch, instance: str, seconds: float
) -> None:
    message = completed(execute_delay_ms="100", instance_wise_delay_multiplier="4")
    assert slept(monkeypatch, message, instance) == ([], [pytest.approx(seconds)])


def test_a_model_takes_its_time_to_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    message = completed(creation_delay_sec="5")
    assert slept(monkeypatch, message, "m_0_0") == ([5], [])
    assert slept(monkeypatch, message, "m_0_1") == ([], [])


@pytest.mark.parametrize("name", ["execute_delay_ms", "instance_wise_delay_multiplier", "creation_delay_sec"])
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        completed(**{name: "-1s"})
    assert f'parameters["{name}"]' in str(error.value)
    assert "'-1s'" in str(error.value)


OPTIONAL = """
    name: "m" backend: "identity" max_batch_size: 4
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 2 ] optional: true }
    input { name: "INPUT1" data_type: TYPE_STRING dims: [ -1 ] optional: true }
"""
RAGGED = """
    name: "m" backend: "identity" max_batch_size: 4
    input { name: "INPUT0" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
"""


def run(text: str, *requests: InferenceRequest) -> list[dict[str, Any]]:
    message = text_format.Parse(text, proto.ModelConfig())
    backend = identity.IdentityBackend()
    backend.complete_config(message, Path(), Path(), CompletionContext())
    instance = backend.load_instance(InstanceContext(ModelConfig.from_proto(message), "1", Path(), Path()))
    batch = Batch(list(requests), sum(request.rows for request in requests))
    instance.execute(batch)
    results: list[Any] = batch.results
    return [{tensor.name: tensor.array.tolist() for tensor in result} for result in results]


def asked(*tensors: Tensor, outputs: tuple[str, ...] = ()) -> InferenceRequest:
    request = InferenceRequest("m", {tensor.name: tensor for tensor in tensors}, NOBODY)
    request.rows = tensors[0].array.shape[0]
    request.requested_outputs = outputs
    return request


def test_an_optional_input_left_out_comes_back_as_nothing() -> None:
    numbers = Tensor("INPUT0", FP32, np.ones((3, 2), np.float32))
    texts = Tensor("INPUT1", BYTES, np.array([[b"a"]], np.object_))
    (only_numbers,) = run(OPTIONAL, asked(numbers))
    assert only_numbers == {"OUTPUT0": [[1, 1]] * 3, "OUTPUT1": [[b""]] * 3}
    (only_texts,) = run(OPTIONAL, asked(texts))
    assert only_texts == {"OUTPUT0": [[0, 0]], "OUTPUT1": [[b"a"]]}


def test_ragged_requests_of_a_batch_get_back_their_own() -> None:
    long, short = (Tensor("INPUT0", FP32, np.full((1, size), size, np.float32)) for size in (3, 1))
    assert run(RAGGED, asked(long), asked(short, outputs=("OUTPUT0",))) == [
        {"OUTPUT0": [[3, 3, 3]]},
        {"OUTPUT0": [[1]]},
    ]
