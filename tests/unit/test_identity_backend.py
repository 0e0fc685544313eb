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
