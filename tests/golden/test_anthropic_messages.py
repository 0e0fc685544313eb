"""The `anthropic` package against a server of a real language model.

What the model says is what it says by the chat route, whose own tests hold it against the engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pydantic
import pytest
import requests

from doorstep.testing.server import ServerProcess

TIMEOUT_S = 60
HELLO: Any = {"role": "user", "content": "Say hello."}
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
CHAT_WEATHER = {
    "type": "function",
    "function": {
        "name": WEATHER["name"],
        "description": WEATHER["description"],
        "parameters": WEATHER["input_schema"],
    },
}
QUESTION: Any = {"role": "user", "content": "How is the weather in Paris?"}


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
def client(server: ServerProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url(""), api_key="k", max_retries=0, timeout=TIMEOUT_S) as found:
        yield found


def asked(*messages: Any, max_tokens: int = 8, sampling: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    """The same answer each time. The client has no arguments for sampling any more; the API does."""
    body = {"temperature": 0} if sampling is None else sampling
    return {"model": "smol", "messages": messages, "max_tokens": max_tokens, "extra_body": body, **rest}


def chat(server: ServerProcess, *messages: Any, **rest: Any) -> Any:
    body = {"model": "smol", "messages": messages, "temperature": 0, "max_tokens": 8, **rest}
    found = requests.post(server.url("/v1/chat/completions"), json=body, timeout=TIMEOUT_S)
    assert found.status_code == 200, found.text
    return found.json()


def prompt_tokens(usage: Any) -> int:
    return usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens


def test_an_answer_is_what_the_chat_route_says(server: ServerProcess, client: anthropic.Anthropic) -> None:
    found = client.messages.create(**asked(HELLO))
    said = chat(server, HELLO)
    assert [block.type for block in found.content] == ["text"]
    assert found.content[0].text == said["choices"][0]["message"]["content"] != ""
    assert (found.stop_reason, said["choices"][0]["finish_reason"]) == ("max_tokens", "length")
    assert (prompt_tokens(found.usage), found.usage.output_tokens) == (said["usage"]["prompt_tokens"], 8)
    assert (found.type, found.role, found.model, found.stop_sequence) == ("message", "assistant", "smol", None)


@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]])
def test_the_system_is_the_chats_and_a_stop_sequence_ends_a_turn(
    server: ServerProcess, client: anthropic.Anthropic, system: Any
) -> None:
    found = client.messages.create(**asked(HELLO, max_tokens=50, system=system, stop_sequences=["!"]))
    said = chat(server, {"role": "system", "content": "Be brief."}, HELLO, max_tokens=50, stop=["!"])
    assert said["choices"][0]["finish_reason"] == "stop"
    assert (found.content[0].text, found.stop_reason) == (said["choices"][0]["message"]["content"], "end_turn")
    assert prompt_tokens(found.usage) == said["usage"]["prompt_tokens"]


def test_the_likeliest_token_alone_leaves_nothing_to_chance(client: anthropic.Anthropic) -> None:
    found = client.messages.create(**asked(HELLO, sampling={"temperature": 1, "top_k": 1}))
    assert found.content == client.messages.create(**asked(HELLO)).content


def test_a_stream_makes_the_same_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**asked(HELLO))
    with client.messages.stream(**asked(HELLO)) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert len(pieces) > 1
    assert "".join(pieces) == final.content[0].text == whole.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    assert prompt_tokens(final.usage) == prompt_tokens(whole.usage)


def test_a_stream_is_anthropics_events_in_order(server: ServerProcess) -> None:
    body = {"model": "smol", "messages": [HELLO], "max_tokens": 3, "stream": True}
    found = requests.post(server.url("/v1/messages"), json=body, timeout=TIMEOUT_S)
    assert (found.status_code, found.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    blocks = found.content.split(b"\n\n")
    assert blocks.pop() == b""
    events = [block.split(b"\n") for block in blocks]
    types = [json.loads(data.removeprefix(b"data: "))["type"] for _, data in events]
    assert [name for name, _ in events] == [f"event: {type}".encode() for type in types]
    deltas = types.count("content_block_delta")
    assert deltas >= 1
    assert types == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_tool_that_must_be_used_is(client: anthropic.Anthropic, choice: Any) -> None:
    body = asked(QUESTION, max_tokens=80, tools=[WEATHER], tool_choice=choice)
    whole = client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    for found in (whole, final):
        assert [(block.type, block.name) for block in found.content] == [("tool_use", "get_weather")]
        assert set(found.content[0].input) == {"city"}
        assert found.stop_reason == "tool_use"
    assert json.loads("".join(pieces)) == final.content[0].input == whole.content[0].input


def test_a_tools_result_is_heard_as_by_the_chat_route(server: ServerProcess, client: anthropic.Anthropic) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "It rains."}]}
    turns: list[Any] = [QUESTION, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    found = client.messages.create(**asked(*turns, tools=[WEATHER]))
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    said = chat(
        server,
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "content": "It rains."},
        tools=[CHAT_WEATHER],
    )
    assert found.content[0].text == said["choices"][0]["message"]["content"]
    assert prompt_tokens(found.usage) == said["usage"]["prompt_tokens"]


def test_a_turn_that_has_begun_goes_on(server: ServerProcess, client: anthropic.Anthropic) -> None:
    begun = {"role": "assistant", "content": "Good morning, dear"}
    found = client.messages.create(**asked(HELLO, begun))
    assert found.content[0].text == chat(server, HELLO, begun)["choices"][0]["message"]["content"]
    assert "Good morning" not in found.content[0].text


def test_a_pydantic_model_is_filled_in(client: anthropic.Anthropic) -> None:
    question = {"role": "user", "content": "Tell about Paris in JSON."}
    found = client.messages.parse(**asked(question, max_tokens=60), output_format=City)
    assert found.stop_reason == "end_turn"
    assert found.parsed_output == City.model_validate_json(found.content[0].text)


@pytest.mark.parametrize("more", [{}, {"system": "Be brief."}, {"tools": [WEATHER]}])
def test_tokens_are_counted_as_a_message_then_has_them(client: anthropic.Anthropic, more: dict[str, Any]) -> None:
    count = client.messages.count_tokens(model="smol", messages=[QUESTION], **more)
    found = client.messages.create(**asked(QUESTION, max_tokens=1, **more))
    assert count.input_tokens == prompt_tokens(found.usage) > 10


def test_the_beta_client_and_the_asynchronous_one_hear_the_same(
    server: ServerProcess, client: anthropic.Anthropic
) -> None:
    async def ask() -> tuple[str, str]:
        url = server.url("")
        async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0, timeout=TIMEOUT_S) as there:
            whole = await there.messages.create(**asked(HELLO))
            async with there.messages.stream(**asked(HELLO)) as stream:
                return whole.content[0].text, await stream.get_final_text()

    whole, streamed = asyncio.run(ask())
    beta = client.beta.messages.create(**asked(HELLO), betas=["token-efficient-tools-2025-02-19"])
    assert whole == streamed == beta.content[0].text == client.messages.create(**asked(HELLO)).content[0].text


IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("body", "raised", "kind", "words"),
    [
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error", "'messages'"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, anthropic.BadRequestError, "invalid_request_error",
         "text only"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError,
         "invalid_request_error", "runs no tools"),
        ({"extra_body": {"colour": "red"}}, anthropic.BadRequestError, "invalid_request_error", "colour"),
        ({"extra_body": {"temperature": 1.5}}, anthropic.BadRequestError, "invalid_request_error", "between 0 and 1"),
        ({"max_tokens": 5000}, anthropic.BadRequestError, "invalid_request_error", "4096 tokens"),
        ({"messages": [{"role": "user", "content": "a " * 20_000}]}, anthropic.BadRequestError,
         "invalid_request_error", "maximum context length"),
        ({"model": "other"}, anthropic.NotFoundError, "not_found_error", "'other'"),
        ({"extra_headers": {"x-request-timeout-ms": "1"}}, anthropic.APIStatusError, "timeout_error", "deadline"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_cannot_be_done_is_an_error_of_anthropics_shape(
    client: anthropic.Anthropic, body: dict[str, Any], raised: type[Exception], kind: str, words: str, stream: bool
) -> None:
    with pytest.raises(raised, match=words) as caught:
        client.messages.create(**{**asked(HELLO), **body}, stream=stream)
    said = caught.value.body
    assert set(said) == {"type", "error"}
    assert (said["type"], said["error"]["type"], set(said["error"])) == ("error", kind, {"type", "message"})


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"model": "other", "messages": [], "max_tokens": 1}'])
def test_a_body_that_is_none_has_anthropics_shape_too(server: ServerProcess, path: str, body: bytes) -> None:
    found = requests.post(server.url(path), data=body, timeout=TIMEOUT_S)
    said = found.json()
    assert (found.status_code, said["type"], said["error"]["type"]) == (400, "error", "invalid_request_error")
