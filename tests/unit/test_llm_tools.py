"""Calls of tools in what a model writes: found in JSON that is forced, and between Hermes' marks, however it is cut."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import llguidance
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from doorstep.backends.llm.job import Delta
from doorstep.backends.llm.openai_chunks import split_calls
from doorstep.backends.llm.tools import (
    CLOSE,
    OPEN,
    CallsInText,
    CallStream,
    begins,
    call_schema,
    calls_in_words,
    forced_tools,
    with_tools_in_words,
)

Call = tuple[str, Any]  # name, arguments
WEATHER = {"name": "weather", "description": "…", "parameters": {"type": "object", "properties": {"of": {}}}}
TIME = {"name": "time"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]


def together(deltas: Iterable[dict[str, Any]]) -> list[Call]:
    """As a client puts pieces of calls together: by index; the first has the id and the name."""
    found: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if "id" in delta:
            assert delta["index"] == len(found), "calls come in order, each begun once"
            found[delta["index"]] = {"name": delta["name"], "arguments": "", "id": delta["id"]}
        found[delta["index"]]["arguments"] += delta["arguments"]
    assert len({call["id"] for call in found.values()}) == len(found)
    return [(call["name"], json.loads(call["arguments"])) for _, call in sorted(found.items())]


def pieces(text: str, cuts: Iterable[int]) -> Iterator[str]:
    at = 0
    for cut in [*sorted(cuts), len(text)]:
        yield text[at:cut]
        at = cut


def streamed(text: str, cuts: Iterable[int]) -> list[Call]:
    stream = CallStream()
    deltas = [delta for piece in pieces(text, cuts) for delta in stream.feed(piece)]
    found = together(deltas)
    assert stream.count == len(found)
    return found


def split(text: str, cuts: Iterable[int]) -> tuple[str, list[Call]]:
    splitter = CallsInText()
    said = [one for piece in pieces(text, cuts) for one in splitter.feed(piece)]
    said += splitter.finish()
    assert all(bool(words) != bool(calls) for words, calls in said)
    return "".join(words for words, _ in said), together(delta for _, calls in said for delta in calls)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(['"', "\\", "}", "{", "]", ",:"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=6) | st.sampled_from(["name", "arguments", "}"]), JSON, max_size=4)
NAMES = st.text("abcXYZ019_-.", min_size=1, max_size=12)
CALLS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=4)
CUTS = st.sets(st.integers(0, 400), max_size=60)


def written(call: Call, *, indent: int | None, ascii_only: bool, name_first: bool = True) -> str:
    name, arguments = call
    whole = {"name": name, "arguments": arguments} if name_first else {"arguments": arguments, "name": name}
    return json.dumps(whole, indent=indent, ensure_ascii=ascii_only)


FORMS = st.tuples(st.sampled_from([None, 0, 2]), st.booleans(), st.booleans())


@given(CALLS, FORMS, CUTS, st.booleans())
def test_forced_calls_are_the_same_however_they_are_cut(
    calls: list[Call], form: tuple[int | None, bool, bool], cuts: set[int], in_list: bool
) -> None:
    indent, ascii_only, name_first = form
    texts = [written(call, indent=indent, ascii_only=ascii_only, name_first=name_first) for call in calls]
    text = "[" + ", ".join(texts) + "]" if in_list else texts[0]
    wanted = calls if in_list else calls[:1]
    assert streamed(text, ()) == wanted
    assert streamed(text, range(1, len(text))) == wanted
    assert streamed(text, [cut for cut in cuts if cut < len(text)]) == wanted


@given(st.text('{}[]":,\\ nameargumts', max_size=80), CUTS)
@example('{"name": "a", "arguments": "b"}', set())
@example('{"name": 1, "arguments": {}}', set())
@example('{"name": "a"', set())
@example('{"arguments": {}}', set())
@example("]]]]}}}}", set())
@example('{"name":"\\', set())
@example('{"name":"\\q"', set())
def test_what_is_no_call_does_no_harm(text: str, cuts: set[int]) -> None:
    """An answer that was cut off, or a model that is not constrained after all."""
    stream = CallStream()
    for piece in pieces(text, [cut for cut in cuts if cut < len(text)]):
        for delta in stream.feed(piece):
            assert 0 <= delta["index"] < stream.count


@given(st.integers(0, 60))
def test_a_call_that_is_cut_off_gives_what_there_is(length: int) -> None:
    text = '{"name": "weather", "arguments": {"of": "Rome", "days": [1, 2]}}'
    stream = CallStream()
    deltas = stream.feed(text[:length])
    arguments = "".join(delta["arguments"] for delta in deltas)
    if length >= len('{"name": "weather"'):
        assert deltas[0]["name"] == "weather"
    assert '{"of": "Rome", "days": [1, 2]}'.startswith(arguments)


# Between marks

WORDS = st.text("ab <>/tool_c\né", max_size=12).filter(lambda text: OPEN not in text and CLOSE not in text)


def marked(call: Call) -> str:
    return OPEN + json.dumps({"name": call[0], "arguments": call[1]}) + CLOSE


@given(
    st.lists(st.tuples(WORDS, NAMES, ARGUMENTS.filter(lambda a: CLOSE not in json.dumps(a))), max_size=3), WORDS, CUTS
)
def test_words_and_calls_are_told_apart_however_they_are_cut(
    said: list[tuple[str, str, Any]], last: str, cuts: set[int]
) -> None:
    text = "".join(words + marked((name, arguments)) for words, name, arguments in said) + last
    whole = split(text, ())
    assert whole[1] == [(name, arguments) for _, name, arguments in said]
    assert split(text, [cut for cut in cuts if cut < len(text)]) == whole
    assert split(text, range(1, len(text))) == whole
    # Only space between calls, and after the last, is left out.
    assert "".join(whole[0].split()) == "".join("".join([*(words for words, _, _ in said), last]).split())
    assert said or whole[0] == last


@pytest.mark.parametrize(
    ("text", "words", "calls"),
    [
        ("hello", "hello", []),
        ("a <b> c", "a <b> c", []),
        ("a <tool_cal", "a <tool_cal", []),  # no mark after all
        (f'{OPEN}{{"name": "f"}}{CLOSE}', "", [("f", {})]),
        (f'{OPEN}\n{{"name": "f", "arguments": {{"a": 1}}}}\n{CLOSE}', "", [("f", {"a": 1})]),
        (f'{OPEN}{{"name": "f", "arguments": "{{\\"a\\": 1}}"}}{CLOSE}', "", [("f", {"a": 1})]),  # as text
        (f'{OPEN}{{"name": "f", "arguments": {{}}}}', "", [("f", {})]),  # the end mark never came
        (f'{OPEN}{{"name": "f"', f'{OPEN}{{"name": "f"', []),  # and it was not whole
        (f"{OPEN}no JSON{CLOSE}", f"{OPEN}no JSON{CLOSE}", []),
        (f'{OPEN}{{"name": 1}}{CLOSE}', f'{OPEN}{{"name": 1}}{CLOSE}', []),
        (f"{OPEN}[1]{CLOSE}", f"{OPEN}[1]{CLOSE}", []),
        (f'{OPEN}"f"{CLOSE}', f'{OPEN}"f"{CLOSE}', []),
        (f"{OPEN}null{CLOSE}", f"{OPEN}null{CLOSE}", []),
        (f"a{CLOSE}b", f"a{CLOSE}b", []),
        (f'{OPEN}{{"name": "f"}}{CLOSE}\n{OPEN}{{"name": "g"}}{CLOSE}', "", [("f", {}), ("g", {})]),
        (f'first {OPEN}{{"name": "f"}}{CLOSE} then', "first  then", [("f", {})]),
    ],
)
def test_calls_between_marks(text: str, words: str, calls: list[Call]) -> None:
    assert split(text, ()) == (words, calls)
    assert split(text, range(1, len(text))) == (words, calls)


@given(st.text("<tool_call>x", max_size=30))
def test_words_are_held_back_only_while_they_may_be_a_mark(text: str) -> None:
    splitter = CallsInText()
    said = "".join(words for words, _ in splitter.feed(text))
    if OPEN not in text:
        assert len(text) - len(said) == begins(text, OPEN) < len(OPEN)
        assert text.startswith(said)


@pytest.mark.parametrize(
    ("text", "count"), [("", 0), ("x", 0), ("<", 1), ("x<tool", 5), ("<tool_call", 10), ("<<", 1), ("<tool_call>", 0)]
)
def test_how_much_may_be_the_beginning_of_a_mark(text: str, count: int) -> None:
    assert begins(text, OPEN) == count


# The prompt and the schema


def matches(schema: Any, value: Any) -> bool:
    """As much of JSON Schema as `call_schema` uses."""
    if "anyOf" in schema:
        return any(matches(one, value) for one in schema["anyOf"])
    if "const" in schema:
        return bool(value == schema["const"])
    if schema.get("type") == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(matches(schema["items"], one) for one in value)
        )
    if schema.get("type") == "object":
        properties = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value)
            and (schema.get("additionalProperties", True) or set(value) <= set(properties))
            and all(matches(properties[name], one) for name, one in value.items() if name in properties)
        )
    return True


@pytest.mark.parametrize(
    ("value", "tools", "parallel", "fits"),
    [
        ({"name": "weather", "arguments": {"of": 1}}, [WEATHER], False, True),
        ({"name": "time", "arguments": {}}, [WEATHER], False, False),
        ({"name": "time", "arguments": {}}, [WEATHER, TIME], False, True),
        ({"name": "time", "arguments": []}, [TIME], False, False),
        ({"name": "time"}, [TIME], False, False),
        ({"name": "time", "arguments": {}, "more": 1}, [TIME], False, False),
        ([{"name": "time", "arguments": {}}], [TIME], False, False),
        ([{"name": "time", "arguments": {}}], [TIME], True, True),
        ([{"name": "time", "arguments": {}}, {"name": "weather", "arguments": {}}], [TIME, WEATHER], True, True),
        ([], [TIME], True, False),
        ([{"name": "time", "arguments": {}}] * 9, [TIME], True, False),
    ],
)
def test_the_schema_fits_calls_and_nothing_else(value: Any, tools: Any, parallel: bool, fits: bool) -> None:
    assert matches(call_schema(tools, parallel=parallel), value) == fits


NESTED = {
    "name": "plan",
    "parameters": {
        "$defs": {"Day": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Day"}, "$ref": {"const": "#/a"}}}},
        "type": "object",
        "properties": {"day": {"$ref": "#/$defs/Day"}, "all": {"$ref": "#"}, "x": {"const": {"$ref": "#/$defs/Day"}}},
    },
}


def pointed_at(schema: Any, reference: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to."""
    for part in reference.removeprefix("#").split("/")[1:]:
        schema = schema[int(part)] if isinstance(schema, list) else schema[part]
    return schema


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize(("tools", "number"), [([NESTED], 0), ([WEATHER, NESTED], 1), ([NESTED, TIME], 0)])
def test_what_a_tools_schema_refers_to_in_itself_is_found_in_the_whole(tools: Any, number: int, parallel: bool) -> None:
    """As pydantic writes classes in classes."""
    before = json.dumps(tools)
    whole = call_schema(tools, parallel=parallel)
    assert json.dumps(tools) == before
    one = whole["items"] if parallel else whole
    arguments = (one["anyOf"][number] if len(tools) > 1 else one)["properties"]["arguments"]
    day = arguments["$defs"]["Day"]
    assert pointed_at(whole, arguments["properties"]["day"]["$ref"]) is day
    assert pointed_at(whole, day["properties"]["next"]["$ref"]) is day
    assert pointed_at(whole, arguments["properties"]["all"]["$ref"]) is arguments
    assert arguments["properties"]["x"] == {"const": {"$ref": "#/$defs/Day"}}, "a value refers to nothing"
    assert day["properties"]["$ref"] == {"const": "#/a"}, "a property of that name neither"
    error = llguidance.LLMatcher.validate_grammar(f"%llguidance {{}}\nstart: %json {json.dumps(whole)}")
    assert not error, error


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, []),
        ("auto", []),
        ("none", []),
        ("required", ["weather", "time"]),
        ({"type": "function", "function": {"name": "time"}}, ["time"]),
    ],
)
def test_which_tools_must_be_called(choice: Any, names: list[str]) -> None:
    body = {"tools": TOOLS} | ({} if choice is None else {"tool_choice": choice})
    assert [tool["name"] for tool in forced_tools(body)] == names


def test_what_a_piece_has_beside_its_text_is_told_once_however_it_is_split() -> None:
    call = f'{OPEN}{{"name": "time"}}{CLOSE}'
    logprobs = [{"token": "x", "logprob": -1.0}]
    given = Delta(f"Now. {call}{call}", "Hm.", logprobs=logprobs, tokens=3)
    pieces = list(split_calls(CallsInText(), given))
    assert len(pieces) == 3
    assert sum(piece.tokens for piece in pieces) == 3
    assert [entry for piece in pieces for entry in piece.logprobs or ()] == logprobs
    assert "".join(piece.reasoning for piece in pieces) == "Hm."


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("forced", [False, True])
def test_a_template_without_tools_is_told_of_them_in_the_systems_words(system: bool, forced: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}] if system else []
    messages.append({"role": "user", "content": "Rome?"})
    before = json.dumps(messages)
    first, *rest = with_tools_in_words(messages, [WEATHER, TIME], forced=forced)
    assert json.dumps(messages) == before, "the request's own messages stay as they are"
    assert first["role"] == "system"
    assert first["content"].startswith("Be kind.") == system
    for tool in TOOLS:
        assert any(json.loads(line) == tool for line in first["content"].splitlines() if line.startswith("{"))
    assert (OPEN in first["content"]) == (not forced)
    assert rest == [{"role": "user", "content": "Rome?"}]


def test_calls_and_results_become_words_that_are_calls_again() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"of": "Rome \\"x\\""}'}}]
    found = calls_in_words([
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ])  # fmt: skip
    assert [message["role"] for message in found] == ["assistant", "user"]
    assert split(found[0]["content"], ()) == ("Let me see.", [("weather", {"of": 'Rome "x"'})])
    assert "sunny" in found[1]["content"]
