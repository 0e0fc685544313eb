"""Reading config.pbtxt and the JSON of a load call; what is said about those that cannot be read."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from config_samples import CONFIGS
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from doorstep import proto
from doorstep.config.load import load_config, locate, parse_json_config, parse_text_config
from doorstep.config.survey import survey
from doorstep.errors import ConfigError, InvalidArgument, Problem


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_means_what_the_clients_own_parser_says(text: str) -> None:
    theirs = text_format.Parse(text, model_config_pb2.ModelConfig())
    ours = parse_text_config(text, name="x")
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_survey_finds_no_fault_in_a_good_config(text: str) -> None:
    assert survey(text, proto.ModelConfig.DESCRIPTOR).faults == []


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_survives_being_printed_and_read(text: str) -> None:
    message = parse_text_config(text, name="x")
    assert parse_text_config(text_format.MessageToString(message), name="x") == message


# text, then for each problem: line, column, words of what, words of the fix
BROKEN: list[tuple[str, list[tuple[int, int, str, str]]]] = [
    ('inputs { name: "a" }', [(1, 1, "no field 'inputs'", "did you mean input?")]),
    ("max_batchsize: 3", [(1, 1, "no field 'max_batchsize'", "did you mean max_batch_size?")]),
    (
        "input {\n  data_type: TYPE_FLOAT\n  shape: [ 1 ]\n}",
        [(2, 14, "TYPE_FLOAT", "did you mean TYPE_FP32?"), (3, 3, "no field 'shape'", "did you mean dims?")],
    ),
    ("input { data_type: TYPE_BYTES }", [(1, 20, "TYPE_BYTES", "did you mean TYPE_STRING?")]),
    ("input { data_type: TYPE_F32 }", [(1, 20, "TYPE_F32", "did you mean TYPE_FP32?")]),
    ('input { data_type: "TYPE_FP32" }', [(1, 20, '"TYPE_FP32"', "write TYPE_FP32 without quotes")]),
    ("max_queue_delay_microseconds: 9", [(1, 1, "no field 'max_queue_delay_", "belongs inside dynamic_batching")]),
    ("name: resnet", [(1, 7, "'name' is resnet", "text in double quotes")]),
    ('max_batch_size: "8"', [(1, 17, "'max_batch_size' is \"8\"", "a whole number")]),
    ("response_cache { enable: yes }", [(1, 26, "'enable' is yes", "true or false")]),
    ("dynamic_batching { max_queue_delay_microseconds: -1 }", [(1, 50, "is -1", "not negative")]),
    ('name: "a"\nname: "b"', [(2, 1, "'name' is given twice", "keep one")]),
    ("dynamic_batching: 3", [(1, 19, "needs fields in braces", "dynamic_batching { … }")]),
    ("input [ { } { } ]", [(1, 13, "expected ',' or ']' here", "commas")]),
    ('input {\n name: "a"', [(1, 7, "never closed", "add a '}'")]),
    ("max_batch_size: 99999999999", [(1, 17, "out of range", "does not fit")]),
    ("dynamic_batching {} sequence_batching {}", [(1, 21, "along with", "keep one")]),
    ("}", [(1, 1, "Expected identifier", "one bracket too many")]),
    ("platform: \n", [(2, 1, "Expected string", "double quotes")]),
]


@pytest.mark.parametrize(("text", "expected"), BROKEN, ids=[text.replace("\n", " ") for text, _ in BROKEN])
def test_each_problem_of_a_broken_config_has_its_place_and_its_fix(
    text: str, expected: list[tuple[int, int, str, str]]
) -> None:
    with pytest.raises(text_format.ParseError):  # the clients' parser agrees that it is broken
        text_format.Parse(text, model_config_pb2.ModelConfig())
    with pytest.raises(ConfigError) as caught:
        parse_text_config(text, name="m", where="m/config.pbtxt")
    problems = caught.value.problems
    assert [p.where.rsplit(":", 2)[1:] for p in problems] == [
        [str(line), str(column)] for line, column, _, _ in expected
    ]
    for problem, (_, _, what, fix) in zip(problems, expected, strict=True):
        assert problem.where.startswith("m/config.pbtxt:")
        assert what in problem.what
        assert fix in problem.fix


def test_a_problem_quotes_its_line() -> None:
    with pytest.raises(ConfigError, match=r"in `max_batchsize: 3  # eight`"):
        parse_text_config('name: "a"\n   max_batchsize: 3  # eight\n', name="m")


@given(st.text(alphabet='input{}[]<>:,;"\\#-_ \n\t0.aé=', max_size=60) | st.text(max_size=60))
@settings(max_examples=400, deadline=None)
def test_no_text_does_more_than_raise_config_error(text: str) -> None:
    survey(text, proto.ModelConfig.DESCRIPTOR)
    with contextlib.suppress(ConfigError):
        parse_text_config(text, name="m")


@pytest.mark.parametrize("deep", ["[" * 5000, "input {" * 5000, "<" * 5000])
def test_deep_nesting_is_an_error_and_not_a_crash(deep: str) -> None:
    with pytest.raises(ConfigError):
        parse_text_config(deep, name="m")


def test_the_survey_knows_where_each_field_stands() -> None:
    text = CONFIGS["a python model with parameters and warm-up"]
    positions = survey(text, proto.ModelConfig.DESCRIPTOR)
    lines = text.split("\n")
    for path, word in {
        "backend": "backend",
        "input[1].dims": "dims: [ -1 ], optional",
        "output[0].dims[1]": "dims: 2",
        'parameters["execution"]': "{ key",
        'model_warmup[0].inputs["TEXT"].dims': "dims: [ 1 ]",
        "input[0].format": "input { name",  # not there: the nearest thing around it
    }.items():
        line, column = positions.position(path) or (0, 0)
        assert lines[line - 1][column - 1 :].startswith(word), path


def test_a_model_without_a_config_has_only_its_name(tmp_path: Path) -> None:
    (tmp_path / "resnet").mkdir()
    assert load_config(tmp_path / "resnet") == proto.ModelConfig(name="resnet")


def test_a_missing_config_is_an_error_when_nothing_is_completed(tmp_path: Path) -> None:
    (tmp_path / "resnet").mkdir()
    with pytest.raises(ConfigError, match=r"failed to open text file for read resnet/config\.pbtxt: No such file"):
        load_config(tmp_path / "resnet", required=True)


def test_a_custom_config_is_read_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "config.pbtxt").write_text("max_batch_size: 1")
    (tmp_path / "configs" / "h100.pbtxt").write_text("max_batch_size: 64")
    assert load_config(tmp_path, config_name="h100").max_batch_size == 64
    assert load_config(tmp_path, config_name="a10").max_batch_size == 1
    assert load_config(tmp_path).max_batch_size == 1


def test_a_config_that_is_not_utf8_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_bytes(b'name: "\xff"')
    with pytest.raises(ConfigError, match="byte 7 is not UTF-8"):
        load_config(tmp_path)


def test_messages_never_show_the_servers_directories(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.pbtxt").write_text("nme: 1")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "m")
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.problems[0].where == "m/config.pbtxt:1:1"


def test_locating_adds_the_line_and_sorts_by_it(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('name: "a"\nmax_batch_size: 0\ninput { name: "x" }\n')
    written = load_config(tmp_path)
    file = f"{tmp_path.name}/config.pbtxt"
    given_problems = [
        Problem("input 'x'", "late"),
        Problem("max_batch_size", "early"),
        Problem("m/1/model.py:3", "code"),
    ]
    assert [p.where for p in locate(given_problems, tmp_path, written)] == [
        "m/1/model.py:3",
        f"{file}:2:1 max_batch_size",
        f"{file}:3:1 input 'x'",
    ]


def test_an_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text("max_batch_size: 2")
    problems = [Problem("max_batch_size", "no")]
    assert locate(problems, tmp_path, proto.ModelConfig(max_batch_size=3)) == problems


JSON: list[tuple[Any, str]] = [
    ({"max_batch_size": 8, "input": [{"name": "a", "data_type": "TYPE_FP32", "dims": [-1, 3]}]},
     'max_batch_size: 8 input { name: "a" data_type: TYPE_FP32 dims: [ -1, 3 ] }'),
    ('{"input":[{"dims":["3", 4], "data_type": "type_fp32"}]}', "input { dims: [ 3, 4 ] data_type: TYPE_FP32 }"),
    (b'{"maxBatchSize": 3}', "max_batch_size: 3"),
    ({"parameters": {"k": {"string_value": "v"}}}, 'parameters { key: "k" value { string_value: "v" } }'),
    ({"dynamic_batching": {"priority_queue_policy": {"1": {"timeout_action": "delay"}}}},
     "dynamic_batching { priority_queue_policy { key: 1 value { timeout_action: DELAY } } }"),
    ({"dynamic_batching": {"max_queue_delay_microseconds": 7}}, "dynamic_batching { max_queue_delay_microseconds: 7 }"),
    ({"version_policy": {"specific": {"versions": [1, "2"]}}}, "version_policy { specific { versions: [ 1, 2 ] } }"),
    ("{}", ""),
]  # fmt: skip


@pytest.mark.parametrize(("json", "text"), JSON)
def test_tritons_json_means_the_same_as_the_text(json: Any, text: str) -> None:
    assert parse_json_config(json) == parse_text_config(text, name="x")


@pytest.mark.parametrize(
    "json", ['{"nme": 1}', "{", "[1]", "3", "null", '{"max_batch_size": "a"}', '{"input": 3}', b"\xff", "[" * 100_000]
)
def test_json_that_is_no_config_is_an_invalid_override(json: str | bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"^Invalid config override: ") as caught:
        parse_json_config(json)
    assert "\n" not in caught.value.message
