"""A config as JSON: Triton prints it by protobuf's own rules, with 64-bit integers turned into numbers."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from config_samples import CONFIGS
from google.protobuf import json_format

from doorstep.config.load import parse_json_config, parse_text_config
from doorstep.config.render import config_json


def protobufs(message: Any) -> Any:
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def numbers(value: Any) -> Any:
    """64-bit integers as numbers; nothing else in these configs is all digits."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return int(value) if isinstance(value, str) and value.lstrip("-").isdigit() else value


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_json_is_what_protobuf_prints_with_integers_as_numbers(text: str) -> None:
    message = parse_text_config(text, name="x")
    for state in message.sequence_batching.state if message.HasField("sequence_batching") else ():
        del state.initial_state[:]  # the fields that stay strings have their own test
    assert config_json(message) == numbers(protobufs(message))


def test_fields_that_triton_leaves_as_strings_are_strings() -> None:
    message = parse_text_config(
        "instance_group { secondary_devices { device_id: 3 } }"
        " optimization { cuda { graph_spec { input { key: 'x' value { dim: [ 4, 5 ] } } } } }"
        " sequence_batching { state { dims: 1 initial_state { dims: 2 } } }",
        name="x",
    )
    rendered = config_json(message)
    assert rendered["instance_group"][0]["secondary_devices"][0]["device_id"] == "3"
    assert rendered["optimization"]["cuda"]["graph_spec"][0]["input"]["x"]["dim"] == ["4", "5"]
    state = rendered["sequence_batching"]["state"][0]
    assert (state["dims"], state["initial_state"][0]["dims"]) == ([1], ["2"])


def test_an_empty_config_prints_every_plain_field_and_no_message() -> None:
    rendered = config_json(parse_text_config("", name="x"))
    assert rendered == {
        "name": "",
        "platform": "",
        "backend": "",
        "runtime": "",
        "max_batch_size": 0,
        "input": [],
        "output": [],
        "batch_input": [],
        "batch_output": [],
        "instance_group": [],
        "default_model_filename": "",
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }
    assert list(rendered)[:5] == ["name", "platform", "backend", "runtime", "max_batch_size"]


@pytest.mark.parametrize(
    ("written", "printed"),
    [("0.1", "0.1"), ("1", "1"), ("0.5", "0.5"), ("16777216", "16777216"), ("1e-7", "1e-7"), ("0.30000001192", "0.3")],
)
def test_a_float_prints_as_the_shortest_number_that_reads_back(written: str, printed: str) -> None:
    message = parse_text_config(f"sequence_batching {{ direct {{ minimum_slot_utilization: {written} }} }}", name="x")
    json = orjson.dumps(config_json(message)["sequence_batching"]["direct"])
    assert b'"minimum_slot_utilization":' + printed.encode() in json


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_is_printed_can_be_given_back_as_an_override(text: str) -> None:
    message = parse_text_config(text, name="x")
    assert parse_json_config(orjson.dumps(config_json(message))) == message
