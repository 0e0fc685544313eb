"""Bodies of POST /v1/messages as chats, pieces as Anthropic's events: tables, and the real client on what is written.

Events are held against the models of the `anthropic` package, which are made from Anthropic's own description.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx2
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent

from doorstep.backends.llm.job import Delta, Usage
from doorstep.errors import BackendError, DoorstepError, InvalidArgument, NotFound, Unavailable
from doorstep.protocols.openai.answer import Choice
from doorstep.protocols.openai.errors import BadField, Deadline
from doorstep.protocols.openai.messages import CHECKS, COUNTED, asked_of, read_message
from doorstep.protocols.openai.messages_format import CountFormat, MessageFormat

ANY_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ADD = {"name": "add", "description": "Adds.", "input_schema": SCHEMA}
CHAT_ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}
USAGE = Usage(prompt=11, completion=7, cached=4)


# Reading


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words, "cache_control": {"type": "ephemeral"}}


def use(id: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": "add", "input": {"a": 1}}


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


def result(id: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": content, **more}


def asked(**body: Any) -> dict[str, Any]:
    said = {"model": "m", "max_tokens": 9, "messages": [user("Hi")], **body}
    return asked_of(read_message(said, CHECKS, "model", "max_tokens", "messages"))


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({}, [user("Hi")]),
        ({"messages": [user([text("H"), text("i")])]}, [user("Hi")]),
        ({"system": "Be brief."}, [SYSTEM, user("Hi")]),
        ({"system": [text("Be "), text("brief.")]}, [SYSTEM, user("Hi")]),
        ({"system": ""}, [user("Hi")]),
        ({"messages": [user("Hi"), SYSTEM, user("Ho")]}, [user("Hi"), SYSTEM, user("Ho")]),
        ({"messages": [user("Hi"), user([text("Ho")])]}, [user("Hi\nHo")]),
        (
            {"messages": [user("Hi"), {"role": "assistant", "content": [text("Ho")]}, user("Hu")]},
            [user("Hi"), {"role": "assistant", "content": "Ho"}, user("Hu")],
        ),
        (
            {
                "messages": [
                    user("1+?"),
                    {"role": "assistant", "content": [
                        {"type": "thinking", "thinking": "Hmm", "signature": ""},
                        {"type": "redacted_thinking", "data": "x"}, text("Well:"), use("t1"), use("t2")]},
                    user([result("t1", "2"), result("t2", [text("3")]), text("So?")]),
                ]
            },
            [
                user("1+?"),
                {"role": "assistant", "content": "Well:", "tool_calls": [call("t1"), call("t2")],
                 "reasoning_content": "Hmm"},
                {"role": "tool", "content": "2", "tool_call_id": "t1"},
                {"role": "tool", "content": "3", "tool_call_id": "t2"},
                user("So?"),
            ],
        ),
        (
            {"messages": [user("1+?"), {"role": "assistant", "content": [use("t1")]},
                          user([{"type": "tool_result", "tool_use_id": "t1", "is_error": True}])]},
            [
                user("1+?"),
                {"role": "assistant", "content": "", "tool_calls": [call("t1")]},
                {"role": "tool", "content": "error", "tool_call_id": "t1"},
            ],
        ),
    ],
)  # fmt: skip
def test_blocks_become_a_chats_messages(body: dict[str, Any], messages: list[Any]) -> None:
    assert asked(**body) == {"messages": messages, "max_tokens": 9}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"temperature": 1, "top_p": 0.5, "top_k": 4, "stop_sequences": ["x"]},
         {"temperature": 1.0, "top_p": 0.5, "top_k": 4, "stop": ["x"]}),
        ({"tools": [{**ADD, "type": "custom", "cache_control": {"type": "ephemeral"}}]}, {"tools": [CHAT_ADD]}),
        ({"tools": [ADD], "tool_choice": {"type": "auto"}}, {"tools": [CHAT_ADD], "tool_choice": "auto"}),
        ({"tools": [ADD], "tool_choice": {"type": "none"}}, {"tools": [CHAT_ADD], "tool_choice": "none"}),
        ({"tools": [ADD], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
         {"tools": [CHAT_ADD], "tool_choice": "required", "parallel_tool_calls": False}),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "add", "disable_parallel_tool_use": False}},
         {"tools": [CHAT_ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {"chat_template_kwargs": {"enable_thinking": True}}),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}},
         {"reasoning_effort": "low",
          "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        ({"metadata": {"user_id": "u"}, "cache_control": {"type": "ephemeral"}, "service_tier": "auto",
          "stream": True}, {}),
    ],
)  # fmt: skip
def test_fields_become_a_chats_fields(body: dict[str, Any], fields: dict[str, Any]) -> None:
    assert asked(**body) == {"messages": [user("Hi")], "max_tokens": 9, **fields}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": None}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["Hi"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [user(7)]}, "messages[0].content"),
        ({"messages": [user([text("What is it?"), {"type": "image", "source": {}}])]}, "messages[0].content[1]"),
        ({"messages": [user([{"type": "document", "source": {}}])]}, "messages[0].content[0]"),
        ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0].text"),
        ({"messages": [user([use("t1")])]}, "messages[0].content[0].type"),
        ({"messages": [user([result("t1", [{"type": "image"}])])]}, "messages[0].content[0].content[0]"),
        ({"messages": [user([{"type": "tool_result", "content": "x"}])]}, "messages[0].content[0].tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{**use("t1"), "input": "{}"}]}]},
         "messages[0].content[0].input"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"system": 7}, "system"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "add"}]}, "tools[0].input_schema"),
        ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**ADD, "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": "auto"}, "tool_choice.type"),
        ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format.type"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_place(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        asked(**body)
    assert caught.value.param == param
    assert param in caught.value.message


def test_tokens_are_counted_without_saying_how_many_may_come() -> None:
    said = {"model": "m", "messages": [user("Hi")], "system": "Be brief.", "tools": [ADD]}
    found = asked_of(read_message(said, COUNTED, "model", "messages"))
    assert found == {"messages": [SYSTEM, user("Hi")], "tools": [CHAT_ADD]}
    with pytest.raises(BadField, match="max_tokens"):
        read_message({**said, "max_tokens": 5}, COUNTED)
    choice = Choice()
    choice.add(Delta(value=[5, 6, 7], finish="stop"), keep=True)
    assert CountFormat().document([choice]) == {"input_tokens": 3}


# Events


def streamed(deltas: Sequence[Delta], error: DoorstepError | None = None) -> bytes:
    """As a call lets a format write (call.py): the beginning is asked for after the first piece's events."""
    format, choice, sent = MessageFormat("m"), Choice(), b""
    for delta in deltas:
        choice.add(delta, keep=format.keeps)
        data = format.events(0, delta)
        sent += data if sent else format.begin() + data
    return sent + (format.end([choice]) if error is None else format.failed(error))


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Each one's name is its type, and Anthropic's models take them."""
    blocks = stream.split(b"\n\n")
    assert blocks.pop() == b""
    found = []
    for block in blocks:
        name, data = block.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name == f"event: {event['type']}".encode()
        if event["type"] not in ("ping", "error"):
            assert ANY_EVENT.validate_python(event).type == event["type"]
        found.append(event)
    return found


def told(event: dict[str, Any]) -> str:
    """An event in a line: what it is about, and what it says."""
    words = [event["type"]] + ([str(event["index"])] if "index" in event else [])
    for part in (event.get("content_block", {}), event.get("delta", {}), event.get("error", {})):
        words += [str(value) for value in part.values()]
    if "usage" in event:
        words.append("in {input_tokens}+{cache_read_input_tokens} out {output_tokens}".format(**event["usage"]))
    return " ".join(words)


WORDS = [Delta(usage=Usage(prompt=11, cached=4)), Delta("Hel", tokens=1), Delta("lo", tokens=1)]
CALL = {"index": 0, "id": "call_1", "name": "add", "arguments": ""}
SAID = ["content_block_start 0 text ", "content_block_delta 0 text_delta Hel", "content_block_delta 0 text_delta lo"]
ALL = [
    Delta(reasoning="Hm", tokens=1),
    Delta(reasoning="m", tokens=1),
    Delta("Yes", tokens=1),
    Delta(tool_calls=[CALL], tokens=1),
    Delta(tool_calls=[{"index": 0, "arguments": '{"a":'}], tokens=1),
    Delta(tool_calls=[{"index": 0, "arguments": "1}"}], tokens=1),
    Delta(tool_calls=[{"index": 1, "id": "call_2", "name": "sub", "arguments": "{}"}], tokens=1),
    Delta(finish="tool_calls", usage=USAGE),
]


@pytest.mark.parametrize(
    ("deltas", "events"),
    [
        (
            [*WORDS, Delta(finish="stop", usage=USAGE)],
            [*SAID, "content_block_stop 0", "message_delta end_turn None in 7+4 out 7"],
        ),
        (
            [*WORDS, Delta(finish="length", usage=USAGE)],
            [*SAID, "content_block_stop 0", "message_delta max_tokens None in 7+4 out 7"],
        ),
        ([Delta(finish="stop", usage=USAGE)], ["message_delta end_turn None in 7+4 out 7"]),
        (
            ALL,
            [
                "content_block_start 0 thinking  ",
                "content_block_delta 0 thinking_delta Hm",
                "content_block_delta 0 thinking_delta m",
                "content_block_delta 0 signature_delta ",
                "content_block_stop 0",
                "content_block_start 1 text ",
                "content_block_delta 1 text_delta Yes",
                "content_block_stop 1",
                "content_block_start 2 tool_use call_1 add {}",
                'content_block_delta 2 input_json_delta {"a":',
                "content_block_delta 2 input_json_delta 1}",
                "content_block_stop 2",
                "content_block_start 3 tool_use call_2 sub {}",
                "content_block_delta 3 input_json_delta {}",
                "content_block_stop 3",
                "message_delta tool_use None in 7+4 out 7",
            ],
        ),
    ],
    ids=["words", "cut", "nothing", "all-kinds"],
)
def test_pieces_become_anthropics_events(deltas: list[Delta], events: list[str]) -> None:
    found = [told(event) for event in events_of(streamed(deltas))]
    assert found == ["message_start", "ping", *events, "message_stop"]


def test_the_beginning_tells_the_prompts_tokens_where_they_are_known() -> None:
    start = events_of(streamed(WORDS))[0]["message"]
    assert (start["content"], start["stop_reason"], start["stop_sequence"]) == ([], None, None)
    assert start["usage"] == {
        "input_tokens": 7, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 0,
    }  # fmt: skip


def test_an_answer_that_began_with_a_sign_of_life_begins_once_and_ends_with_all_tokens() -> None:
    format, choice = MessageFormat("m"), Choice()
    choice.add(Delta(finish="stop", usage=USAGE), keep=False)
    sent = format.begin() + format.ping + b"".join(format.events(0, delta) for delta in WORDS) + format.end([choice])
    events = events_of(sent)
    assert events[0]["message"]["usage"]["input_tokens"] == 0  # nothing is known of the prompt yet
    assert [told(event) for event in events[1:]] == [
        "ping",
        "ping",
        *SAID,
        "content_block_stop 0",
        "message_delta end_turn None in 7+4 out 7",
        "message_stop",
    ]


def document(deltas: Sequence[Delta]) -> Any:
    choice = Choice()
    for delta in deltas:
        choice.add(delta, keep=True)
    return MessageFormat("m").document([choice])


def test_a_whole_answer_has_a_block_of_each_kind() -> None:
    found = document(ALL)
    Message.model_validate(found, strict=True)
    assert found["content"] == [
        {"type": "thinking", "thinking": "Hmm", "signature": ""},
        {"type": "text", "text": "Yes"},
        {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
        {"type": "tool_use", "id": "call_2", "name": "sub", "input": {}},
    ]
    assert (found["stop_reason"], found["stop_sequence"]) == ("tool_use", None)


@pytest.mark.parametrize("arguments", ["", '{"a":', "[1]"])
def test_a_call_that_was_cut_off_has_an_object_all_the_same(arguments: str) -> None:
    found = document([Delta(tool_calls=[{**CALL, "arguments": arguments}]), Delta(finish="length", usage=USAGE)])
    assert found["content"] == [{"type": "tool_use", "id": "call_1", "name": "add", "input": {}}]
    assert found["stop_reason"] == "max_tokens"


# The types that Anthropic's errors have by status
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidArgument("no"), "invalid_request_error"),
        (NotFound("no"), "not_found_error"),
        (Unavailable("no"), "overloaded_error"),
        (Deadline(), "timeout_error"),
        (BackendError("no"), "api_error"),
    ],
)
def test_errors_have_anthropics_shape_before_an_answer_and_in_it(error: DoorstepError, kind: str) -> None:
    said = {"type": "error", "error": {"type": kind, "message": error.message}}
    assert MessageFormat("m").error_document(error) == said
    assert CountFormat().error_document(error) == said
    assert events_of(streamed(WORDS, error))[-1] == said


# The real client on what is written


def client_of(stream: bytes) -> anthropic.Anthropic:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=stream)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return anthropic.Anthropic(api_key="k", base_url="http://x", max_retries=0, http_client=http)


def test_anthropics_client_puts_a_stream_of_all_kinds_together() -> None:
    with (
        client_of(streamed(ALL)) as client,
        client.messages.stream(model="m", max_tokens=9, messages=[user("Hi")]) as stream,
    ):
        found = stream.get_final_message().to_dict()
    assert found["content"] == Message.model_validate(document(ALL)).to_dict()["content"]
    assert (found["stop_reason"], found["usage"]["output_tokens"]) == ("tool_use", 7)


def test_anthropics_client_raises_what_an_answer_failed_of() -> None:
    with (
        client_of(streamed(WORDS, BackendError("it broke"))) as client,
        client.messages.stream(model="m", max_tokens=9, messages=[user("Hi")]) as stream,
        pytest.raises(anthropic.APIStatusError, match="it broke") as caught,
    ):
        list(stream)
    assert caught.value.body == {"type": "error", "error": {"type": "api_error", "message": "it broke"}}
