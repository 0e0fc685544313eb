"""What bodies of OpenAI's API may say, field by field, as tables: good values, bad ones, and what an engine never sees.

Ranges are those of OpenAI's API reference where it gives some; the others are bounds against hostile bodies (vLLM's
CVE-2025-48942, -48943, -48944, -62426 and CVE-2026-34756, llama.cpp's CVE-2026-21869).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, get_args

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params

from doorstep.protocols.openai import chat, completions, embeddings, fields, rerank, responses_in, tokens
from doorstep.protocols.openai import messages_blocks as blocks
from doorstep.protocols.openai.chat import chat_jobs, read_chat
from doorstep.protocols.openai.completions import completion_jobs, read_completion
from doorstep.protocols.openai.errors import BadField, error_object
from doorstep.protocols.openai.schema import (
    MOST_BYTES,
    MOST_DEPTH,
    MOST_NODES,
    MOST_OPTIONAL,
    MOST_PATTERNS,
    MOST_REPEATS,
    MOST_VALUES,
    check_schema,
)

MESSAGES = [{"role": "user", "content": "hi"}]
CHAT: dict[str, Any] = {"model": "m", "messages": MESSAGES}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi"}
Read = Callable[[Mapping[str, Any]], dict[str, Any]]
BOTH = pytest.mark.parametrize(("read", "least"), [(read_chat, CHAT), (read_completion, COMPLETION)])
NAN, INF = math.nan, math.inf


def tool(name: Any = "f", **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def refused(read: Read, body: Mapping[str, Any]) -> BadField:
    with pytest.raises(BadField) as caught:
        read(body)
    return caught.value


# Every field of OpenAI's


@pytest.mark.parametrize(
    ("checks", "theirs"),
    [
        (chat.CHECKS, chat_create_params.CompletionCreateParamsNonStreaming),
        (completions.CHECKS, completion_create_params.CompletionCreateParamsNonStreaming),
        (embeddings.CHECKS, embedding_create_params.EmbeddingCreateParams),
    ],
    ids=["chat", "completions", "embeddings"],
)
def test_every_field_of_the_client_is_known(checks: Mapping[str, Any], theirs: Any) -> None:
    """Known: done, passed over where it is without effect here, or refused with a reason."""
    assert set(theirs.__annotations__) - {"stream"} <= set(checks), "a field of a newer client"


@BOTH
@pytest.mark.parametrize(
    "name", ["n_discard", "cache_prompt", "id_slot", "samplers", "json_schema", "grammar", "lora", "n_predict",
             "return_tokens", "t_max_predict_ms", "__class__", "", "Temperature"],
)  # fmt: skip
def test_a_field_that_is_not_named_is_refused(read: Read, least: dict[str, Any], name: str) -> None:
    error = refused(read, {**least, name: 1})
    assert (error.param, error.api_code) == (name, "unknown_parameter")


@BOTH
@pytest.mark.parametrize("name", ["model", "messages", "prompt"])
def test_what_is_missing_is_named(read: Read, least: dict[str, Any], name: str) -> None:
    if name not in least:
        return
    body = {key: value for key, value in least.items() if key != name}
    for nothing in (body, {**body, name: None}):
        error = refused(read, nothing)
        assert (error.param, error.api_code) == (name, "missing")


@BOTH
def test_null_is_as_if_it_were_not_there(read: Read, least: dict[str, Any]) -> None:
    said = dict.fromkeys((*fields.SAMPLING, "n", "stream", "stream_options", "logprobs", "user"))
    assert read({**least, **said}) == read(least)


@BOTH
@pytest.mark.parametrize("name", ["user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"])
def test_what_is_without_effect_does_not_get_to_the_engine(read: Read, least: dict[str, Any], name: str) -> None:
    assert read({**least, name: {"any": ["thing"]}}) == read(least)


# Values

GOOD: dict[str, list[Any]] = {
    "temperature": [0, 2, 0.7],
    "top_p": [0, 1, 0.5],
    "max_tokens": [1, 4096],
    "seed": [0, -1, 2**63 - 1, -(2**63)],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2.0],
    "top_k": [-1, 0, 50],
    "min_p": [0, 1],
    "repetition_penalty": [0.01, 1.1, 10],
    "ignore_eos": [True, False],
    "n": [1, 8],
    "stream": [True, False],
    "priority": [0, 1, 2**31],
    "stop": ["x", ["x"], ["x"] * 16, []],
    "logit_bias": [{}, {"0": -100, "49151": 100}, {str(i): 0 for i in range(300)}],
}
BAD: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.1, NAN, INF, -INF, "0", True, [], {}],
    "top_p": [-0.1, 1.1, NAN, "1", False],
    "max_tokens": [0, -1, 1.5, "1", True, 2**64, INF],
    "seed": [2**63, -(2**63) - 1, 1.0, "1", True],
    "presence_penalty": [-2.1, 2.1, NAN, "0"],
    "frequency_penalty": [-2.1, 2.1, NAN, None.__class__.__name__],
    "top_k": [-2, 1.5, 2**40, "1"],
    "min_p": [-1, 2, NAN],
    "repetition_penalty": [0, -1, 11, NAN],
    "ignore_eos": [0, 1, "true"],
    "n": [0, 9, -1, 10**9, 1.0, "2", True],
    "stream": [0, 1, "true", "false"],
    "priority": [-1, 2**31 + 1, "high", 1.5],
    "stop": ["", [""], ["x"] * 17, [1], {"a": 1}, 5, "x" * 257, ["x" * 257], [["x"]]],
    "logit_bias": [[], "a", {"a": 1}, {"-1": 1}, {"1.5": 1}, {"0": 101}, {"0": -101}, {"0": NAN}, {"0": "1"},
                   {"0": True}, {"": 0}, {"9" * 10: 0}, {"\u0661": 0}, {str(i): 0 for i in range(301)}],
    "model": [1, [], {}, "x" * 513, True],
}  # fmt: skip
CHAT_GOOD: dict[str, list[Any]] = {
    "max_completion_tokens": [1],
    "logprobs": [True, False],
    "tools": [[], [tool()], [tool(f"f{i}") for i in range(128)], [tool("a-b_c.9", description="d", strict=True)]],
    "parallel_tool_calls": [True, False],
    "reasoning_effort": ["none", "low", "high"],
    "chat_template_kwargs": [{}, {"enable_thinking": False}, {"reasoning_effort": "low"}],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}, {"type": "json_object"},
                        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {}}}],
    "structured_outputs": [{"json": {}}],
    "guided_json": [{}, {"type": "object"}],
}  # fmt: skip
CHAT_BAD: dict[str, list[Any]] = {
    "max_completion_tokens": [0, "1"],
    "logprobs": [1, 0, "true", 5],
    "tools": [{}, "a", [1], [{}], [tool(1)], [tool("")], [tool("a b")], [tool("x" * 65)], [tool("é")], [tool("a\n")],
              [{"type": "retrieval"}], [{"type": "function"}], [{"type": "function", "function": []}],
              [tool(f"f{i}") for i in range(129)], [tool(), tool()], [tool(parameters=[])], [tool(parameters="{}")],
              [tool(description=1)], [tool(description="x" * 65537)]],
    "parallel_tool_calls": [1, "true"],
    "reasoning_effort": ["lots", 1, [], {}],
    "chat_template_kwargs": [[], {"chat_template": "{{ 1 }}"}, {"enable_thinking": 1}, {"tokenize": True},
                             {"reasoning_effort": {}}, {"messages": []}],
    "modalities": [["audio"], "text", [{}]],
    "audio": [{}, {"voice": "a"}, 1],
    "functions": [[], [{}]],
    "function_call": ["auto"],
    "web_search_options": [{}],
    "response_format": [{}, [], "json", {"type": "xml"}, {"type": ["json_object"]}, {"type": "json_schema"},
                        {"type": "json_schema", "json_schema": {"schema": []}},
                        {"type": "json_schema", "json_schema": {"schema": True}}],
    "structured_outputs": [{}, [], {"regex": "a"}, {"grammar": "root ::= x"}, {"choice": []}, {"choice": ["a"]},
                           {"json": {}, "choice": ["a"]}, {"json": "{}"}],
    "guided_json": [[], "{}", 1],
    "stream_options": [1, [], {"include_usage": 1}, {"else": True}],
}  # fmt: skip


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [
        pytest.param(name, value, id=f"{name}-{i}") for name, values in table.items() for i, value in enumerate(values)
    ]


@BOTH
@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_a_good_value_is_taken(read: Read, least: dict[str, Any], name: str, value: Any) -> None:
    found = read({**least, name: value})
    assert found[name] == ([value] if isinstance(value, str) else value)


@BOTH
@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_value_is_refused_by_its_name(read: Read, least: dict[str, Any], name: str, value: Any) -> None:
    param = refused(read, {**least, name: value}).param
    assert param is not None
    assert param.split(".")[0] == name


@pytest.mark.parametrize(("name", "value"), cases(CHAT_GOOD))
def test_a_good_value_of_a_chat_is_taken(name: str, value: Any) -> None:
    read_chat({**CHAT, name: value})


@pytest.mark.parametrize(("name", "value"), cases(CHAT_BAD))
def test_a_bad_value_of_a_chat_is_refused_by_its_name(name: str, value: Any) -> None:
    param = refused(read_chat, {**CHAT, "stream": True, name: value}).param
    assert param is not None
    assert param.split(".")[0].split("[")[0] == name


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),  # needs logprobs
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),  # needs stream
        ({"tool_choice": "auto"}, "tool_choice"),  # needs tools
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [tool()]}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool()]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [tool()]}, "tool_choice"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json"),  # twice
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together_are_refused(more: dict[str, Any], param: str) -> None:
    assert refused(read_chat, {**CHAT, **more}).param == param


# Messages

PART = {"type": "text", "text": "a"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ("hi", "messages"),
        ([], "messages"),
        ({}, "messages"),
        ([1], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "robot", "content": "a"}], "messages[0].role"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role"),
        ([{"role": {}, "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 1}], "messages[0].content"),
        ([{"role": "user", "content": {}}], "messages[0].content"),
        ([*MESSAGES, {"role": "user", "content": [1]}], "messages[1].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [PART] * 1001}], "messages[0].content"),
        ([{"role": "user", "content": [PART, {"type": "image_url", "image_url": {"url": "http://a"}}]}],
         "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]}],
         "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": {}, "text": "a"}]}], "messages[0].content[0]"),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content"),
        ([{"role": "assistant", "tool_calls": [{}]}], "messages[0].tool_calls[0].function.name"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
         "messages[0].tool_calls[0].function.arguments"),
        ([{"role": "assistant", "tool_calls": [CALL] * 129}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": CALL}], "messages[0].tool_calls"),
        ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
        ([{"role": "tool", "content": "a", "tool_call_id": 1}], "messages[0].tool_call_id"),
        (MESSAGES * 1001, "messages"),
    ],
)  # fmt: skip
def test_a_bad_message_is_named_by_its_place(messages: Any, param: str) -> None:
    assert refused(read_chat, {"model": "m", "messages": messages}).param == param


def test_messages_become_plain_ones() -> None:
    found = read_chat({"model": "m", "messages": [
        {"role": "developer", "content": [PART, {"type": "text", "text": "b"}], "name": "x"},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "audio": None},
        {"role": "tool", "tool_call_id": "c", "content": [PART]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]})["messages"]  # fmt: skip
    assert found == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "a", "tool_call_id": "c"},
        {"role": "assistant", "content": "no"},
    ]


# Schemas


def nested(levels: int) -> Any:
    made: Any = {}
    for _ in range(levels - 1):
        made = {"not": made}
    return made


def wide(parts: int) -> Any:
    return {"anyOf": [{} for _ in range(parts)]}


@pytest.mark.parametrize(
    "schema",
    [
        nested(MOST_DEPTH),
        wide(MOST_NODES - 2),
        {"pattern": "a{2000}"},
        {"pattern": "^[a-z]{3}(b|c)*$", "maxLength": MOST_REPEATS},
        {"properties": {"pattern": {"type": "string"}, "minItems": {"type": "integer"}}},
        {"$defs": {"a": {}}, "$ref": "#/$defs/a"},
        {"enum": ["x" * 50] * MOST_VALUES},
        {"minItems": 5, "maxItems": 5},
        {"pattern": "^[ж-йё]+[^\\u0100-\\uffff]\\\\u\\é(?i:[a-\U0010ffff])$"},
        {"anyOf": [{"pattern": "a" * 512}] * (MOST_PATTERNS // 512)},
        {"properties": {f"p{i}": {} for i in range(MOST_OPTIONAL)}},
        {"properties": {f"p{i}": {} for i in range(999)}, "required": [f"p{i}" for i in range(999)]},
    ],
)
def test_a_schema_within_bounds_is_left_as_it_is(schema: Any) -> None:
    before = json.dumps(schema)
    assert check_schema(schema, "s") is schema
    assert json.dumps(schema) == before


@pytest.mark.parametrize(
    "schema",
    [
        nested(MOST_DEPTH + 1),
        nested(900),  # what a parser of JSON takes
        wide(MOST_NODES),
        {"enum": ["x" * MOST_BYTES]},
        {"pattern": "a{2001}"},
        {"pattern": "(a{100}){100}"},
        {"pattern": "((a{0,50}){0,50}){0,50}"},
        {"pattern": "a{1000000000000000000000}"},
        {"pattern": "a" * 513},
        {"pattern": "("},
        {"patternProperties": {"(": {}}},
        {"patternProperties": {"a{9999}": {}}},
        {"pattern": "[z-a]"},
        {"pattern": "[я-a]"},
        {"anyOf": [{"pattern": "a" * 512}] * (MOST_PATTERNS // 512 + 1)},
        {"pattern": "(?P<a>b)(?P<a>c)"},
        {"maxItems": 10**9},
        {"minItems": 2001},
        {"maxLength": 1e300},
        {"minLength": -1},
        {"type": "string", "minLength": 5, "maxLength": 1},  # of which llama.cpp makes a grammar without end
        {"items": {"type": "array", "minItems": 2, "maxItems": 1}},
        {"minProperties": 2, "maxProperties": 1},
        {"enum": ["x"] * (MOST_VALUES + 1)},
        {"anyOf": [{"enum": list(range(600))}, {"enum": list(range(600))}]},
        {"properties": {f"p{i}": {} for i in range(MOST_OPTIONAL + 1)}},
        {"properties": {f"p{i}": {} for i in range(MOST_OPTIONAL + 2)}, "required": ["p0", 1, [], {}]},
        {"maxProperties": 2**63},
        {"items": {"properties": {"a": {"maxItems": 5000}}}},
        {"$ref": "http://169.254.169.254/"},
        {"$ref": "file:///etc/passwd"},
        {"anyOf": [{"$ref": "other.json#/a"}]},
        [],
        "{}",
        True,
        None,
    ],
)
def test_a_schema_beyond_bounds_is_refused(schema: Any) -> None:
    refused(lambda body: check_schema(body, "s"), schema)


def test_patterns_cost_little_whatever_characters_they_have() -> None:
    """Python's `re` takes half a second for one of these as it is written."""
    before = time.process_time()
    for last in ("\uffff", "\\uffff", "\U0010ffff", "\\U0010ffff"):
        check_schema({"anyOf": [{"pattern": f"(?i){i}" + f"[a-{last}]" * 35} for i in range(10)]}, "s")
    assert time.process_time() - before < 1


PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "tools": lambda schema: {"tools": [tool(parameters=schema)]},
    "response_format": lambda schema: {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
    "structured_outputs": lambda schema: {"structured_outputs": {"json": schema}},
    "guided_json": lambda schema: {"guided_json": schema},
}


@pytest.mark.parametrize("place", PLACES)
def test_schemas_are_checked_wherever_they_are(place: str) -> None:
    refused(read_chat, {**CHAT, **PLACES[place](nested(MOST_DEPTH + 1))})
    refused(read_chat, {**CHAT, **PLACES[place]({"pattern": "a{9999}"})})
    read_chat({**CHAT, **PLACES[place]({"type": "object"})})


@pytest.mark.parametrize("read", [fields.tools, blocks.read_tools, responses_in.CHECKS["tools"]])
def test_tools_are_bounded_together(read: Callable[[Any, str], Any]) -> None:
    words = "x" * (fields.MOST_TOOL_BYTES // 16)

    def tools(count: int) -> list[dict[str, Any]]:
        own = [{"name": f"f{i}", "description": words} for i in range(count)]
        if read is blocks.read_tools:
            return [{**one, "input_schema": {"type": "object"}} for one in own]
        return [tool(**one) if read is fields.tools else {"type": "function", **one} for one in own]

    assert len(read(tools(15), "tools")) == 15
    with pytest.raises(BadField, match="'tools' is larger than 524288 bytes"):
        read(tools(16), "tools")


# Jobs


def test_each_choice_is_a_job_and_seeds_differ() -> None:
    body = read_chat({**CHAT, "n": 3, "seed": 2**32 - 1, "max_completion_tokens": 5, "stream": True, "user": "u"})
    jobs = chat_jobs(body, "adapter")
    assert [job.body["seed"] for job in jobs] == [2**32 - 1, 0, 1]
    assert {job.adapter for job in jobs} == {"adapter"}
    assert jobs[0].body == {"messages": MESSAGES, "max_tokens": 5, "seed": 2**32 - 1}


def test_each_prompt_and_choice_is_a_job() -> None:
    jobs = completion_jobs(read_completion({"model": "m", "prompt": ["a", "b"], "n": 2}), "")
    assert [job.body for job in jobs] == [{"prompt": p, "max_tokens": 16} for p in ("a", "a", "b", "b")]


@pytest.mark.parametrize("prompts", [["a"] * 17, ["a"] * 64])
def test_prompts_times_choices_are_bounded(prompts: list[str]) -> None:
    assert refused(read_completion, {"model": "m", "prompt": prompts, "n": 8}).param == "n"


# Anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("checks", "least"),
    [
        (chat.CHECKS, CHAT),
        (completions.CHECKS, COMPLETION),
        (embeddings.CHECKS, {"model": "m"}),
        (rerank.CHECKS, {"model": "m"}),
        (tokens.TOKENIZE, {"model": "m"}),
        (tokens.DETOKENIZE, {"model": "m"}),
    ],
    ids=["chat", "completions", "embeddings", "rerank", "tokenize", "detokenize"],
)
@given(data=st.data())
def test_whatever_a_body_says_it_is_read_or_refused(
    checks: Mapping[str, Any], least: dict[str, Any], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(checks)))
    body = {**least, name: data.draw(JSON)}
    try:
        found = fields.read(body, checks)
        if checks is chat.CHECKS and name != "messages":
            found = read_chat({**CHAT, **body})
    except BadField as error:
        orjson.dumps(error_object(error))
    else:
        orjson.dumps(found)  # it can go on its way


@given(st.binary(max_size=40))
def test_a_body_is_an_object_or_refused(body: bytes) -> None:
    try:
        found = fields.document(body)
    except BadField:
        return
    assert found == json.loads(body)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":NaN}', b'"\\ud800"', b"{}x", b""])
def test_a_body_that_is_hostile_is_refused(body: bytes) -> None:
    with pytest.raises(BadField):
        fields.document(body)


def test_the_clients_kinds_of_tool_choice_are_known() -> None:
    """`none`, `auto`, `required`, or a function: what the client's type says."""
    from openai.types.chat import ChatCompletionToolChoiceOptionParam

    words = [word for part in get_args(ChatCompletionToolChoiceOptionParam) for word in get_args(part)]
    assert set(words) == {"none", "auto", "required"}
    for word in words:
        read_chat({**CHAT, "tools": [tool()], "tool_choice": word})
    read_chat({**CHAT, "tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "f"}}})
