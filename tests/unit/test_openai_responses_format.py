"""Bodies of POST /v1/responses as chats, and pieces as OpenAI's events: tables, and the real client on what is written.

Events are held against the models of the `openai` package, which are made from OpenAI's own description.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import httpx2
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from doorstep.backends.llm.job import Delta, Usage
from doorstep.errors import BackendError, DoorstepError, InvalidArgument
from doorstep.protocols.openai.answer import Choice
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.responses_format import ResponseFormat
from doorstep.protocols.openai.responses_in import read_response, response_job

ANY_EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
ADD = {
    "type": "function",
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": True,
}
CHAT_ADD = {"type": "function", "function": {key: ADD[key] for key in ("name", "description", "parameters")}}
USAGE = Usage(prompt=11, completion=7, cached=4)


# Reading


def asked(**body: Any) -> dict[str, Any]:
    return response_job(read_response({"model": "m", **body}), "").body


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


def item(id: str) -> dict[str, Any]:
    return {"type": "function_call", "id": "fc_1", "call_id": id, "name": "add", "arguments": '{"a":1}'}


def output(id: str, value: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": value}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"input": "Hi"}, [user("Hi")]),
        ({"input": [user("Hi")]}, [user("Hi")]),
        (
            {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
            [user("Hi")],
        ),
        (
            {
                "input": [
                    user("Hi"),
                    {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                     "content": [{"type": "output_text", "text": "Ho", "annotations": [], "logprobs": []}]},
                    user("Hu"),
                ]
            },
            [user("Hi"), {"role": "assistant", "content": "Ho"}, user("Hu")],
        ),
        (
            {"input": [{"role": "developer", "content": "Be brief."}, user("Hi")]},
            [{"role": "system", "content": "Be brief."}, user("Hi")],
        ),
        ({"instructions": "Be brief.", "input": "Hi"}, [{"role": "system", "content": "Be brief."}, user("Hi")]),
        (
            {"instructions": "Be brief.", "input": [{"role": "developer", "content": "Be kind."}, user("Hi")]},
            [{"role": "system", "content": "Be brief.\n\nBe kind."}, user("Hi")],
        ),
        (
            {"input": [user("1+?"), {"type": "reasoning", "id": "rs_1", "summary": []}, item("c1"), item("c2"),
                       output("c1", "2"), output("c2", [{"type": "input_text", "text": "3"}])]},
            [
                user("1+?"),
                {"role": "assistant", "content": "", "tool_calls": [call("c1"), call("c2")]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
                {"role": "tool", "content": "3", "tool_call_id": "c2"},
            ],
        ),
        (
            {"input": [user("1+?"), {"role": "assistant", "content": "Well:"}, item("c1"), output("c1", "2"),
                       item("c2"), output("c2", "3")]},
            [
                user("1+?"),
                {"role": "assistant", "content": "Well:", "tool_calls": [call("c1")]},
                {"role": "tool", "content": "2", "tool_call_id": "c1"},
                {"role": "assistant", "content": "", "tool_calls": [call("c2")]},
                {"role": "tool", "content": "3", "tool_call_id": "c2"},
            ],
        ),
    ],
)  # fmt: skip
def test_items_become_a_chats_messages(body: dict[str, Any], messages: list[Any]) -> None:
    assert asked(**body) == {"messages": messages}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({"max_output_tokens": 9, "temperature": 0, "top_p": 0.5},
         {"max_tokens": 9, "temperature": 0.0, "top_p": 0.5}),
        ({"tools": [ADD], "parallel_tool_calls": False}, {"tools": [CHAT_ADD], "parallel_tool_calls": False}),
        ({"tools": [ADD], "tool_choice": "required"}, {"tools": [CHAT_ADD], "tool_choice": "required"}),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "add"}},
         {"tools": [CHAT_ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"tools": [], "tool_choice": "auto"}, {"tool_choice": "auto"}),
        ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
        ({"text": {}}, {}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        ({"text": {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": SCHEMA}}},
         {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": None}}, {}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
        ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"include": ["reasoning.encrypted_content"], "top_logprobs": 0}, {}),
        ({"store": True, "metadata": {"a": "b"}, "user": "u", "truncation": "auto", "service_tier": "auto",
          "background": False, "previous_response_id": None, "max_tool_calls": 3, "prompt_cache_key": "k",
          "safety_identifier": "s", "stream_options": {"include_obfuscation": False}}, {}),
        ({"seed": 3, "stop": "x", "top_k": 4, "chat_template_kwargs": {"enable_thinking": False}},
         {"seed": 3, "stop": ["x"], "top_k": 4, "chat_template_kwargs": {"enable_thinking": False}}),
    ],
)  # fmt: skip
def test_fields_become_a_chats_fields(body: dict[str, Any], fields: dict[str, Any]) -> None:
    assert asked(input="Hi", **body) == {"messages": [user("Hi")], **fields}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 7}, "input"),
        ({"input": ["Hi"]}, "input[0]"),
        ({"input": [{"type": "reasoning", "id": "rs_1", "summary": []}]}, "input"),
        ({"input": [user("Hi"), {"role": "tool", "content": "x"}]}, "input[1].role"),
        ({"input": [{"role": ["user"], "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"type": ["message"]}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]},
         "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "add"}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": [{"type": "function_call_output", "output": "2"}]}, "input[0].call_id"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [ADD, {"type": "file_search", "vector_store_ids": ["vs_1"]}]}, "tools[1].type"),
        ({"tools": [{**ADD, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [{**ADD, "parameters": {"$ref": "http://x"}}]}, "tools[0].parameters"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "tool_choice"),
        ({"tools": [ADD], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": "json"}, "text"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort"),
        ({"include": ["everything"]}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"truncation": "some"}, "truncation"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_its_place(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadField) as caught:
        asked(**{"input": "Hi", **body})
    assert caught.value.param == param
    assert param in caught.value.message


# Events


def made(**body: Any) -> ResponseFormat:
    said = {"model": "m", "input": "Hi", **body}
    return ResponseFormat(said, read_response(said))


def streamed(format: ResponseFormat, deltas: Sequence[Delta], error: DoorstepError | None = None) -> bytes:
    """As a call lets a format write (call.py): the beginning is asked for after the first piece's events."""
    choice, sent = Choice(), b""
    for delta in deltas:
        choice.add(delta, keep=format.keeps)
        data = format.events(0, delta)
        sent += data if sent else format.begin() + data
    return sent + (format.end([choice]) if error is None else format.failed(error))


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Each one's name is its type, they are numbered, and OpenAI's models take them."""
    blocks = stream.split(b"\n\n")
    assert blocks.pop() == b""
    found = []
    for number, block in enumerate(blocks):
        name, data = block.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}".encode(), number)
        assert ANY_EVENT.validate_python(event).type == event["type"]
        found.append(event)
    return found


def told(event: dict[str, Any]) -> str:
    """An event in a line: what it is about, and what it says."""
    kind = event["type"].removeprefix("response.")
    words = [kind] + [str(event[name]) for name in ("output_index", "content_index") if name in event]
    if "item" in event:
        words += [event["item"]["type"], event["item"]["status"]]
    if "part" in event:
        words += [event["part"]["type"], repr(event["part"]["text"])]
    if "response" in event:
        words += [event["response"]["status"], str(len(event["response"]["output"]))]
    words += [repr(event[name]) for name in ("delta", "text", "arguments", "code", "message") if name in event]
    return " ".join(words)


WORDS = [Delta(usage=Usage(prompt=11)), Delta("Hel", tokens=1), Delta("lo", tokens=1)]
CALL = {"index": 0, "id": "call_1", "name": "add", "arguments": ""}
BEGINNING = ["created in_progress 0", "in_progress in_progress 0"]
SAID = [
    "output_item.added 0 message in_progress",
    "content_part.added 0 0 output_text ''",
    "output_text.delta 0 0 'Hel'",
    "output_text.delta 0 0 'lo'",
    "output_text.done 0 0 'Hello'",
    "content_part.done 0 0 output_text 'Hello'",
]


@pytest.mark.parametrize(
    ("deltas", "events"),
    [
        (
            [*WORDS, Delta(finish="stop", usage=USAGE)],
            [*SAID, "output_item.done 0 message completed", "completed completed 1"],
        ),
        (
            [*WORDS, Delta(finish="length", usage=USAGE)],
            [*SAID, "output_item.done 0 message incomplete", "incomplete incomplete 1"],
        ),
        ([Delta(finish="stop", usage=USAGE)], ["completed completed 0"]),
        (
            [
                Delta(reasoning="Hm", tokens=1),
                Delta(reasoning="m", tokens=1),
                Delta("Yes", tokens=1),
                Delta(tool_calls=[CALL], tokens=1),
                Delta(tool_calls=[{"index": 0, "arguments": '{"a":'}], tokens=1),
                Delta(tool_calls=[{"index": 0, "arguments": "1}"}], tokens=1),
                Delta(tool_calls=[{"index": 1, "id": "call_2", "name": "sub", "arguments": "{}"}], tokens=1),
                Delta(finish="tool_calls", usage=USAGE),
            ],
            [
                "output_item.added 0 reasoning in_progress",
                "content_part.added 0 0 reasoning_text ''",
                "reasoning_text.delta 0 0 'Hm'",
                "reasoning_text.delta 0 0 'm'",
                "reasoning_text.done 0 0 'Hmm'",
                "content_part.done 0 0 reasoning_text 'Hmm'",
                "output_item.done 0 reasoning completed",
                "output_item.added 1 message in_progress",
                "content_part.added 1 0 output_text ''",
                "output_text.delta 1 0 'Yes'",
                "output_text.done 1 0 'Yes'",
                "content_part.done 1 0 output_text 'Yes'",
                "output_item.done 1 message completed",
                "output_item.added 2 function_call in_progress",
                "function_call_arguments.delta 2 '{\"a\":'",
                "function_call_arguments.delta 2 '1}'",
                "function_call_arguments.done 2 '{\"a\":1}'",
                "output_item.done 2 function_call completed",
                "output_item.added 3 function_call in_progress",
                "function_call_arguments.delta 3 '{}'",
                "function_call_arguments.done 3 '{}'",
                "output_item.done 3 function_call completed",
                "completed completed 4",
            ],
        ),
    ],
    ids=["words", "cut", "nothing", "all-kinds"],
)
def test_pieces_become_openais_events(deltas: list[Delta], events: list[str]) -> None:
    assert [told(event) for event in events_of(streamed(made(stream=True), deltas))] == [*BEGINNING, *events]


def test_an_answer_that_began_with_a_sign_of_life_begins_once() -> None:
    format, choice = made(stream=True), Choice()
    sent = format.begin() + format.ping + b"".join(format.events(0, delta) for delta in WORDS) + format.end([choice])
    assert sent.count(b": ping\n\n") == 1
    events = events_of(sent.replace(b": ping\n\n", b""))
    assert [told(event) for event in events[:6]] == [*BEGINNING, *SAID[:4]]


@pytest.mark.parametrize(
    ("error", "code"),
    [(BackendError("it broke"), "server_error"), (InvalidArgument("it was too long"), "invalid_prompt")],
)
def test_an_error_after_others_is_told_twice_and_ends_the_stream(error: DoorstepError, code: str) -> None:
    events = events_of(streamed(made(stream=True), WORDS, error))
    assert [told(event) for event in events[2:]] == [
        *SAID[:4],
        f"error {None!r} {error.message!r}",
        "failed failed 1",
    ]
    assert events[-1]["response"]["error"] == {"code": code, "message": error.message}
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Hello"


def unnamed(response: Any) -> Any:
    """Without what differs each time."""
    if isinstance(response, dict):
        return {key: unnamed(value) for key, value in response.items() if key not in ("id", "created_at")}
    return [unnamed(one) for one in response] if isinstance(response, list) else response


ENTRY = {"token": "Hel", "logprob": -0.5, "bytes": [72], "top_logprobs": [{"token": "He", "logprob": -1, "bytes": []}]}
ALL = [
    Delta(reasoning="Hmm", tokens=1),
    Delta("Hel", logprobs=[ENTRY], tokens=1),
    Delta("lo", logprobs=[{**ENTRY, "token": "lo"}], tokens=1),
    Delta(tool_calls=[{**CALL, "arguments": '{"a":1}'}], tokens=1),
    Delta(finish="tool_calls", usage=USAGE),
]


def document(format: ResponseFormat, deltas: Sequence[Delta]) -> Any:
    choice = Choice()
    for delta in deltas:
        choice.add(delta, keep=True)
    return json.loads(json.dumps(format.document([choice])))


def test_a_whole_answer_is_what_its_stream_comes_to() -> None:
    body: dict[str, Any] = {
        "instructions": "Be brief.", "temperature": 0.5, "max_output_tokens": 9, "tools": [ADD], "tool_choice": "auto",
        "metadata": {"a": "b"}, "include": ["message.output_text.logprobs"], "top_logprobs": 1, "store": True,
        "reasoning": {"effort": "low", "summary": "auto"}, "user": "u",
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    }  # fmt: skip
    whole = document(made(**body), ALL)
    last = events_of(streamed(made(**body, stream=True), ALL))[-1]["response"]
    assert unnamed(whole) == unnamed(last)
    Response.model_validate(whole, strict=True)
    assert whole["usage"] == {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 1},
        "total_tokens": 18,
    }
    # What was asked is said again; what was not done is not said to have been.
    for name in (
        "instructions",
        "temperature",
        "max_output_tokens",
        "tools",
        "tool_choice",
        "metadata",
        "text",
        "user",
    ):
        assert whole[name] == body[name]
    assert (whole["store"], whole["truncation"], whole["previous_response_id"]) == (False, "disabled", None)
    assert whole["output"][1]["content"][0]["logprobs"][0] == ENTRY


def test_log_probabilities_of_a_piece_of_a_character_come_with_its_text() -> None:
    deltas = [
        Delta(logprobs=[{**ENTRY, "token": "\ufffd"}], tokens=1),
        Delta("é", logprobs=[{**ENTRY, "token": "\ufffd"}], tokens=1),
        Delta("!", logprobs=[{**ENTRY, "token": "!"}], tokens=1),
        Delta(finish="stop", usage=USAGE),
    ]
    events = events_of(streamed(made(top_logprobs=1, stream=True), deltas))
    told = [[one["token"] for one in event["logprobs"]] for event in events if "logprobs" in event]
    assert told == [["\ufffd", "\ufffd"], ["!"], ["\ufffd", "\ufffd", "!"]]


def test_log_probabilities_are_not_told_unasked() -> None:
    whole = document(made(), ALL)
    assert whole["output"][1]["content"][0]["logprobs"] == []


# The real client on what is written


def client_of(stream: bytes) -> openai.OpenAI:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=stream)

    transport = httpx2.MockTransport(answer)
    return openai.OpenAI(
        api_key="k", base_url="http://x/v1", max_retries=0, http_client=httpx2.Client(transport=transport)
    )


def test_openais_client_puts_a_stream_of_all_kinds_together() -> None:
    with (
        client_of(streamed(made(stream=True), ALL)) as client,
        client.responses.stream(model="m", input="Hi", tools=[ADD]) as stream,
    ):
        found = stream.get_final_response()
    assert [one.type for one in found.output] == ["reasoning", "message", "function_call"]
    assert found.output_text == "Hello"
    assert found.output[2].parsed_arguments == {"a": 1}


def test_openais_client_sees_an_answer_fail() -> None:
    with client_of(streamed(made(stream=True), WORDS, BackendError("it broke"))) as client:
        found = list(client.responses.create(model="m", input="Hi", stream=True))
    assert [event.type for event in found[-2:]] == ["error", "response.failed"]
    assert found[-1].response.error.message == "it broke"
