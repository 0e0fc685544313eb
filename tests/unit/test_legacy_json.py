"""Config overrides may be written in the JSON that Triton's reader takes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from doorstep.config.legacy_json import parse
from doorstep.config.load import parse_json_config
from doorstep.errors import InvalidArgument


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2], "b": {"c": null}}', {"a": [1, 2], "b": {"c": None}}),
        ('{a: 1, "b" : {direct: {}}}', {"a": 1, "b": {"direct": {}}}),
        ("{'a': 'it\\'s \"so\"'}", {"a": 'it\'s "so"'}),
        ('{"a": [1, 2, ], "b": 3,\n}', {"a": [1, 2], "b": 3}),
        ('{"a": "x: 1, }", b: "\\"y: [1,]"}', {"a": "x: 1, }", "b": '"y: [1,]'}),
        ("{true_: true, f: false, n: null}", {"true_": True, "f": False, "n": None}),
    ],
)
def test_what_protobuf_reads_is_read(text: str, value: Any) -> None:
    assert parse(text) == parse(text.encode()) == value


@pytest.mark.parametrize("text", ["{a}", "{a: b}", "{'a: 1}", '{"a": 1,, }', "", "{" * 3, '{"a": [,]}'])
def test_what_is_no_json_is_refused_in_words_about_what_was_written(text: str) -> None:
    with pytest.raises(json.JSONDecodeError) as error:
        parse(text)
    assert error.value.doc == text


def test_an_override_may_leave_out_quotes() -> None:
    config = parse_json_config("{max_batch_size: 4, 'sequence_batching': {direct: {},},}")
    assert config.max_batch_size == 4
    assert config.sequence_batching.HasField("direct")
    with pytest.raises(InvalidArgument, match=r"^Invalid config override: "):
        parse_json_config("{max_batch_size: }")
