"""The `openai` package's responses, against a server of a real language model.

What the model says is what it says by the chat route, whose own tests hold it against the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import requests

from doorstep.testing.server import ServerProcess

TIMEOUT_S = 60
HELLO = "Say hello."
SURE: dict[str, Any] = {"temperature": 0}  # the same answer each time
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CHAT_WEATHER: Any = {
    "type": "function",
    "function": {key: WEATHER[key] for key in ("name", "description", "parameters")},
}


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    capital: bool


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    (models / "smol" / "1").mkdir(parents=True)
    (models / "smol" / "1" / "model.gguf").symlink_to(smollm2)
    with ServerProcess(models) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url("/v1"), api_key="k", max_retries=0, timeout=TIMEOUT_S) as found:
        yield found


def chat(client: openai.OpenAI, messages: Any, **rest: Any) -> Any:
    return client.chat.completions.create(model="smol", messages=messages, temperature=0, **rest)


def test_an_answer_is_what_the_chat_route_says(client: openai.OpenAI) -> None:
    found = client.responses.create(model="smol", input=HELLO, max_output_tokens=8, **SURE)
    said = chat(client, [{"role": "user", "content": HELLO}], max_tokens=8)
    assert found.output_text == said.choices[0].message.content != ""
    assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert said.choices[0].finish_reason == "length"
    assert (found.usage.input_tokens, found.usage.output_tokens) == (said.usage.prompt_tokens, 8)
    assert found.usage.total_tokens == said.usage.total_tokens
    assert (found.object, found.model, found.store) == ("response", "smol", False)


def test_instructions_are_what_the_system_says_and_a_stop_completes(client: openai.OpenAI) -> None:
    stop = {"stop": ["!"]}
    found = client.responses.create(model="smol", instructions="Be brief.", input=HELLO, extra_body=stop, **SURE)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": HELLO}]
    said = chat(client, messages, **stop)
    assert said.choices[0].finish_reason == "stop"
    assert (found.output_text, found.status) == (said.choices[0].message.content, "completed")
    assert (found.usage.input_tokens, found.instructions) == (said.usage.prompt_tokens, "Be brief.")


def test_a_conversation_goes_on_by_sending_it_whole(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": HELLO}]}]
    first = client.responses.create(model="smol", input=turns, max_output_tokens=8, **SURE)
    turns += [one.to_dict() for one in first.output]
    turns.append({"role": "user", "content": "And now?"})
    found = client.responses.create(model="smol", input=turns, max_output_tokens=8, **SURE)
    messages = [
        {"role": "user", "content": HELLO},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And now?"},
    ]
    said = chat(client, messages, max_tokens=8)
    assert found.output_text == said.choices[0].message.content
    assert found.usage.input_tokens == said.usage.prompt_tokens


def test_a_streams_events_come_in_order_and_make_the_same_answer(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="smol", input=HELLO, max_output_tokens=6, **SURE)
    events = list(client.responses.create(model="smol", input=HELLO, max_output_tokens=6, stream=True, **SURE))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1].response
    assert whole.output_text == "".join(deltas) == last.output_text
    assert len(deltas) > 1
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert len({event.response.id for event in (events[0], events[1], events[-1])}) == 1


def test_a_stream_is_named_events_and_no_more(server: ServerProcess) -> None:
    body = {"model": "smol", "input": HELLO, "stream": True, "max_output_tokens": 2, "store": True}
    found = requests.post(server.url("/v1/responses"), json=body, timeout=TIMEOUT_S)
    assert (found.status_code, found.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    blocks = found.content.split(b"\n\n")
    assert blocks.pop() == b""
    for block in blocks:
        name, data = block.split(b"\n")
        assert name == b"event: " + json.loads(data.removeprefix(b"data: "))["type"].encode()
    assert blocks[-1].startswith(b"event: response.incomplete\n")  # and no [DONE], which is the chats'


def test_a_pydantic_model_is_filled_in_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "input": "Tell about Paris in JSON.", "max_output_tokens": 60, **SURE}
    found = client.responses.parse(text_format=City, **asked)
    assert found.status == "completed"
    assert found.output_parsed == City.model_validate_json(found.output_text)
    with client.responses.stream(text_format=City, **asked) as stream:
        assert stream.get_final_response().output_parsed == found.output_parsed


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_tool_that_must_be_called_is(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"input": "How is the weather in Paris?", "tools": [WEATHER], "tool_choice": choice, **SURE}
    with client.responses.stream(model="smol", max_output_tokens=80, **asked) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [one.type for one in final.output] == ["function_call"]
    call = final.output[0]
    assert call.parsed_arguments == json.loads(call.arguments)
    assert set(call.parsed_arguments) == {"city"}
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[2] == "output_item.added"
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments


def test_a_tools_result_is_heard_as_by_the_chat_route(client: openai.OpenAI) -> None:
    question = {"role": "user", "content": "How is the weather in Paris?"}
    arguments = '{"city":"Paris"}'
    turns: Any = [
        question,
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "It rains."},
    ]
    found = client.responses.create(model="smol", input=turns, tools=[WEATHER], max_output_tokens=8, **SURE)
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "It rains."},
    ]
    said = chat(client, messages, tools=[CHAT_WEATHER], max_tokens=8)
    assert found.output_text == said.choices[0].message.content
    assert found.usage.input_tokens == said.usage.prompt_tokens


def test_log_probabilities_are_the_chat_routes(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    found = client.responses.create(
        model="smol", input=HELLO, include=include, top_logprobs=2, max_output_tokens=3, **SURE
    )
    said = chat(client, [{"role": "user", "content": HELLO}], max_tokens=3, logprobs=True, top_logprobs=2)
    ours, theirs = found.output[0].content[0].logprobs, said.choices[0].logprobs.content
    assert [one.token for one in ours] == [one.token for one in theirs]
    assert [one.bytes for one in ours] == [one.bytes for one in theirs]
    assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=0.05)
    assert [len(one.top_logprobs) for one in ours] == [2, 2, 2]


def test_the_asynchronous_client_hears_the_same(server: ServerProcess, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "smol", "input": HELLO, "max_output_tokens": 4, **SURE}

    async def ask() -> tuple[str, str]:
        url = server.url("/v1")
        async with openai.AsyncOpenAI(base_url=url, api_key="k", max_retries=0, timeout=TIMEOUT_S) as there:
            whole = await there.responses.create(**asked)
            stream = await there.responses.create(stream=True, **asked)
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return whole.output_text, "".join(deltas)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed == client.responses.create(**asked).output_text


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, 400, "background", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "unsupported_value"),
        ({"extra_body": {"colour": "red"}}, 400, "colour", "unknown_parameter"),
        ({"max_output_tokens": 1_000_000}, 400, "max_output_tokens", "invalid_value"),
        ({"input": "a " * 20_000}, 400, "input", "context_length_exceeded"),
        ({"input": "a " * 20_000, "stream": True}, 400, "input", "context_length_exceeded"),
        ({"model": "other"}, 404, "model", "model_not_found"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_openais_shape(
    client: openai.OpenAI, body: dict[str, Any], status: int, param: str, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.responses.create(**{"model": "smol", "input": HELLO, **body})
    assert type(caught.value) is {400: openai.BadRequestError, 404: openai.NotFoundError}[status]
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_deadline_is_a_timeout_of_openais_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.responses.create(model="smol", input=HELLO, extra_headers={"x-request-timeout-ms": "1"})
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
