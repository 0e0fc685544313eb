"""POST /v1/chat/completions with OpenAI's own client; what the model says is what xllamacpp says, asked directly.

Fields and their meaning are OpenAI's API reference; extensions (top_k, min_p, guided_json …) are vLLM's.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import requests
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).parent))

from llm_server import CAPITAL, CONTEXT, PATIENCE_S, SMOL, TINY, LLMServer, Reference, save_model

pytestmark = pytest.mark.xdist_group("openai-chat")
GREEDY: dict[str, Any] = {"messages": CAPITAL, "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[LLMServer]:
    models = tmp_path_factory.mktemp("chat")
    save_model(models, "smol", SMOL, smollm2)
    save_model(models, "tiny", TINY, smollm2)
    with LLMServer(models, "--access-log") as found:
        yield found


@pytest.fixture(scope="module")
def client(server: LLMServer) -> Iterator[openai.OpenAI]:
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def said(reference: Reference) -> dict[str, Any]:
    """What the model answers to GREEDY."""
    return reference.chat(GREEDY)


def post(server: LLMServer, headers: dict[str, str] | None = None, **body: Any) -> requests.Response:
    return requests.post(
        f"{server.v1}/chat/completions", json={"model": "smol", **GREEDY, **body}, headers=headers, timeout=PATIENCE_S
    )


# Answers


def test_an_answer_is_the_models(client: openai.OpenAI, said: dict[str, Any]) -> None:
    found = client.chat.completions.create(model="smol", **GREEDY)
    (choice,) = found.choices
    assert choice.message.content == said["choices"][0]["message"]["content"]
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert (choice.logprobs, choice.message.refusal, choice.message.tool_calls) == (None, None, None)
    assert (found.object, found.model) == ("chat.completion", "smol")
    assert found.id.startswith("chatcmpl-")
    assert found.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(found.usage, name) == said["usage"][name]


def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI, said: dict[str, Any]) -> None:
    chunks = list(
        client.chat.completions.create(model="smol", stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    *pieces, last = chunks
    assert (pieces[0].choices[0].delta.role, pieces[0].choices[0].delta.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in pieces)
    assert text == said["choices"][0]["message"]["content"]
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in pieces)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == said["usage"]["completion_tokens"]
    assert len(pieces) > 3, "it came in pieces"


def test_usage_in_a_stream_is_for_those_who_ask(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="smol", stream=True, **GREEDY))
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_async_streams_run_side_by_side(server: LLMServer, said: dict[str, Any]) -> None:
    async def read(client: openai.AsyncOpenAI) -> str:
        async with await client.chat.completions.create(model="smol", stream=True, **GREEDY) as stream:
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def both() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(read(client), read(client))

    assert asyncio.run(both()) == [said["choices"][0]["message"]["content"]] * 2


def test_the_clients_own_stream_helper_puts_the_answer_together(client: openai.OpenAI, said: dict[str, Any]) -> None:
    text = said["choices"][0]["message"]["content"]
    # The helper takes no answer that ended for its length.
    with client.chat.completions.stream(model="smol", stop=text[3:6], **GREEDY) as stream:
        kinds = {event.type for event in stream}
        found = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert found.choices[0].message.content == text[:3]


def test_of_the_same_prompt_most_need_not_be_read_again(client: openai.OpenAI) -> None:
    client.chat.completions.create(model="smol", **GREEDY)
    found = client.chat.completions.create(model="smol", **GREEDY)
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    cached = found.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 0 < cached < found.usage.prompt_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


# Sampling: each field as xllamacpp has it


@pytest.mark.parametrize(
    ("asked", "theirs"),
    [
        ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
        ({"presence_penalty": 2}, {"presence_penalty": 2}),
        ({"repetition_penalty": 1.8}, {"repeat_penalty": 1.8}),
        ({"temperature": 1.5, "top_k": 1}, {"temperature": 1.5, "top_k": 1}),
        ({"temperature": 1.5, "min_p": 1.0}, {"temperature": 1.5, "min_p": 1.0}),
        ({"temperature": 1.5, "top_p": 0.01}, {"temperature": 1.5, "top_p": 0.01}),
        ({"temperature": 1.5, "seed": 11}, {"temperature": 1.5, "seed": 11}),
        ({"logit_bias": {"504": 100}}, {"logit_bias": {"504": 100}}),
        ({"stop": [" the", ","]}, {"stop": [" the", ","]}),
    ],
    ids="-".join,
)
def test_a_sampling_field_means_what_the_engine_means(
    server: LLMServer, reference: Reference, asked: dict[str, Any], theirs: dict[str, Any]
) -> None:
    found = post(server, **asked)
    expected = reference.chat({**GREEDY, **theirs})
    assert found.status_code == 200, found.text
    for name in ("finish_reason", "message"):
        ours = found.json()["choices"][0][name]
        assert (ours["content"] if name == "message" else ours) == (
            expected["choices"][0][name]["content"] if name == "message" else expected["choices"][0][name]
        )


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI, said: dict[str, Any]) -> None:
    whole = said["choices"][0]["message"]["content"]
    stop = whole[3:6]
    found = client.chat.completions.create(model="smol", stop=stop, **GREEDY).choices[0]
    assert (found.message.content, found.finish_reason) == (whole.partition(stop)[0], "stop")


def test_an_answer_is_as_long_as_asked_by_either_name(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "smol", "messages": CAPITAL, "temperature": 0}
    for name in ("max_tokens", "max_completion_tokens"):
        found = client.chat.completions.create(**body, **{name: 3})
        assert found.usage is not None
        assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (3, "length")


def test_the_same_seed_gives_the_same_answer_and_choices_differ(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {**GREEDY, "model": "smol", "temperature": 2.0, "seed": 5, "n": 2, "max_tokens": 8}
    first, second = (client.chat.completions.create(**body) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]


def test_choices_are_numbered_and_their_prompt_counts_once(client: openai.OpenAI, said: dict[str, Any]) -> None:
    found = client.chat.completions.create(model="smol", n=2, **GREEDY)
    text = said["choices"][0]["message"]["content"]
    assert [(c.index, c.message.content) for c in found.choices] == [(0, text), (1, text)]
    assert found.usage is not None
    assert found.usage.prompt_tokens == said["usage"]["prompt_tokens"]
    assert found.usage.completion_tokens == 2 * said["usage"]["completion_tokens"]


def test_streamed_choices_are_told_apart_by_their_index(client: openai.OpenAI, said: dict[str, Any]) -> None:
    texts = {0: "", 1: ""}
    finishes = []
    for chunk in client.chat.completions.create(model="smol", n=2, stream=True, **GREEDY):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        finishes += [choice.index] if choice.finish_reason else []
    assert set(texts.values()) == {said["choices"][0]["message"]["content"]}
    assert sorted(finishes) == [0, 1]


@pytest.mark.parametrize("tops", [0, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_engines(
    client: openai.OpenAI, reference: Reference, tops: int, stream: bool
) -> None:
    expected = reference.chat({**GREEDY, "logprobs": True, "top_logprobs": max(tops, 1)})["choices"][0]["logprobs"]
    body: dict[str, Any] = {"model": "smol", "logprobs": True, "top_logprobs": tops, **GREEDY}
    if stream:
        chunks = list(client.chat.completions.create(stream=True, **body))
        found = [entry for chunk in chunks if (said := chunk.choices[0].logprobs) for entry in said.content or ()]
    else:
        said = client.chat.completions.create(**body).choices[0].logprobs
        assert said is not None
        found = said.content or []
    assert len(found) == len(expected["content"]) == 6
    for entry, wanted in zip(found, expected["content"], strict=True):
        assert (entry.token, entry.bytes) == (wanted["token"], wanted["bytes"])
        assert entry.logprob == pytest.approx(wanted["logprob"], abs=0.05)
        assert [top.token for top in entry.top_logprobs] == [top["token"] for top in wanted["top_logprobs"]][:tops]


def test_parts_of_text_and_the_developers_role_are_as_plain_ones(client: openai.OpenAI, reference: Reference) -> None:
    expected = reference.chat({**GREEDY, "messages": [{"role": "system", "content": "Be short."}, *CAPITAL]})
    parts: Any = [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": " of France?"}]
    found = client.chat.completions.create(
        model="smol", max_tokens=6, temperature=0,
        messages=[{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}],
        user="somebody", metadata={"k": "v"}, store=False,
    )  # fmt: skip
    assert found.choices[0].message.content == expected["choices"][0]["message"]["content"]
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected["usage"]["prompt_tokens"]


# Tools


def tool(name: str, *values: str) -> Any:
    schema = {
        "type": "object",
        "properties": {"of": {"type": "string", "enum": list(values)}},
        "required": ["of"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": f"The {name}", "parameters": schema}}


WEATHER, TIME = tool("weather", "Rome", "Oslo"), tool("time", "Rome")
ASK: dict[str, Any] = {"model": "smol", "messages": [{"role": "user", "content": "Rome?"}], "temperature": 0}


def check_call(call: Any, names: set[str], values: set[str]) -> None:
    assert (call.type, call.function.name in names) == ("function", True)
    assert call.id
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"of"}
    assert arguments["of"] in values


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_come_comes_and_fits_its_schema(client: openai.OpenAI, choice: Any) -> None:
    found = client.chat.completions.create(**ASK, tools=[WEATHER, TIME], tool_choice=choice, max_tokens=60).choices[0]
    assert (found.finish_reason, found.message.content) == ("tool_calls", None)
    (call,) = found.message.tool_calls or ()
    check_call(call, {"weather"} if choice != "required" else {"weather", "time"}, {"Rome", "Oslo"})


def test_a_call_is_streamed_as_a_name_and_pieces_of_arguments(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {**ASK, "tools": [WEATHER], "tool_choice": "required", "max_tokens": 60}
    whole = client.chat.completions.create(**body).choices[0].message.tool_calls
    chunks = list(client.chat.completions.create(**body, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    first, *rest = deltas
    assert (first.index, first.type) == (0, "function")
    assert first.id
    assert first.function is not None
    assert first.function.name == "weather"
    assert all(call.id is None and call.function.name is None and call.index == 0 for call in rest)
    assert whole is not None
    assert "".join(call.function.arguments or "" for call in deltas) == whole[0].function.arguments
    assert len(rest) > 1, "the arguments came in pieces"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(**body) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    check_call(call, {"weather"}, {"Rome", "Oslo"})


class Place(BaseModel):
    city: Literal["Rome", "Oslo"]


class Journey(BaseModel):
    start: Place
    end: Place


def test_a_tool_may_be_a_class_with_classes_in_it(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Journey)]
    found = client.chat.completions.parse(**ASK, tools=tools, tool_choice="required", max_tokens=60).choices[0]
    (call,) = found.message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Journey)


def test_several_calls_come_at_once_where_that_is_asked(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        **ASK, tools=[tool("t", "a")], tool_choice="required", parallel_tool_calls=True, max_tokens=60
    ).choices[0]
    calls = found.message.tool_calls
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    check_call(calls[0], {"t"}, {"a"})


def test_tools_that_may_not_be_called_are_not_shown(client: openai.OpenAI, reference: Reference) -> None:
    plain = reference.chat({**ASK, "max_tokens": 4})
    found = client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="none", max_tokens=4)
    assert found.choices[0].message.content == plain["choices"][0]["message"]["content"]
    assert found.usage is not None
    assert found.usage.prompt_tokens == plain["usage"]["prompt_tokens"]


def test_tools_that_may_be_called_are_shown_and_words_stay_words(server: LLMServer, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(**ASK, tools=[WEATHER], tool_choice="auto", max_tokens=4)
    shown = requests.post(
        server.url("/tokenize"), json={"model": "smol", "messages": ASK["messages"], "tools": [WEATHER]}, timeout=60
    ).json()
    text = requests.post(
        server.url("/detokenize"), json={"model": "smol", "tokens": shown["tokens"]}, timeout=60
    ).json()["prompt"]
    assert json.dumps(WEATHER["function"]["description"]) in text
    assert found.usage is not None
    assert found.usage.prompt_tokens == shown["count"]
    assert found.choices[0].finish_reason == "length"
    assert found.choices[0].message.content


def test_a_tools_result_goes_back_to_the_model(client: openai.OpenAI) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"of": "Rome"}'}}
    history: Any = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    with_result = client.chat.completions.create(**{**ASK, "messages": history}, tools=[WEATHER], max_tokens=2)
    without = client.chat.completions.create(**ASK, tools=[WEATHER], max_tokens=2)
    assert with_result.usage is not None
    assert without.usage is not None
    assert with_result.usage.prompt_tokens > without.usage.prompt_tokens + 10


# Structure


class Verdict(BaseModel):
    mood: Literal["good", "bad"]


SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}},
    "required": ["mood"],
    "additionalProperties": False,
}


def test_an_answer_becomes_the_clients_own_class(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(**ASK, response_format=Verdict, max_tokens=40)
    assert isinstance(found.choices[0].message.parsed, Verdict)


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "v", "strict": True, "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
    ],
    ids=lambda value: next(iter(value)),
)
def test_an_answer_fits_a_schema_by_any_of_its_names(server: LLMServer, asked: dict[str, Any]) -> None:
    found = post(server, **asked, max_tokens=40)
    assert found.status_code == 200, found.text
    assert json.loads(found.json()["choices"][0]["message"]["content"])["mood"] in ("good", "bad")


def test_any_json_object_is_one(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {**GREEDY, "response_format": {"type": "json_object"}, "max_tokens": 60}
    [choice] = client.chat.completions.create(model="smol", **body).choices
    found = choice.message.content
    assert found is not None
    assert found.startswith("{")
    assert choice.finish_reason == "length" or isinstance(json.loads(found), dict)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
        ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]'),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(client: openai.OpenAI, schema: Any, why: str) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=f"the JSON schema cannot be used: .*{why}"):
        client.chat.completions.create(model="smol", **GREEDY, response_format=wanted)


# Errors


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", **GREEDY)
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "model_not_found", "model", "invalid_request_error"
    )  # fmt: skip
    assert "'gpt-9'" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_before_any_work(
    server: LLMServer, client: openai.OpenAI, stream: bool
) -> None:
    before = server.metric("doorstep_llm_prompt_tokens_total", model="smol")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="smol", messages=[{"role": "user", "content": "word " * (CONTEXT + 200)}], stream=stream
        )
    assert caught.value.code == "context_length_exceeded"
    assert f"maximum context length is {CONTEXT} tokens" in caught.value.message
    assert server.metric("doorstep_llm_prompt_tokens_total", model="smol") == before


@pytest.mark.parametrize(
    ("path", "much"),
    [
        ("/chat/completions", {"messages": CAPITAL, "metadata": "x" * (6 << 20)}),
        ("/completions", {"prompt": ["a", "b"], "user": "x" * (6 << 20)}),
        ("/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "metadata": "x" * (6 << 20)}),
        ("/messages/count_tokens", {"messages": [{"role": "user", "content": "x" * (6 << 20)}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * (6 << 20)}]}),
    ],
)
def test_a_body_that_is_larger_than_any_that_fits_is_not_kept_waiting(
    server: LLMServer, path: str, much: dict[str, Any]
) -> None:
    path = path if path == "/tokenize" else f"/v1{path}"
    found = requests.post(server.url(path), json={"model": "tiny", **much}, timeout=PATIENCE_S)
    assert found.status_code == 400
    assert "the body has 62" in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n_discard", -1, "unknown_parameter"),  # CVE-2026-21869
        ("temperature", 3, "invalid_value"),
        ("n", 9, "invalid_value"),
        ("max_tokens", CONTEXT + 1, None),
        ("functions", [], "unsupported_parameter"),
        ("model", "", "model_not_found"),
    ],
)
def test_a_bad_field_is_named(server: LLMServer, field: str, value: Any, code: str | None) -> None:
    found = post(server, **{field: value})
    error = found.json()["error"]
    assert found.status_code == (404 if code == "model_not_found" else 400), found.text
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, code)
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "smol", "messages": []}', b"\xff", b"null"])
def test_a_body_that_is_no_request_is_refused(server: LLMServer, body: bytes) -> None:
    found = requests.post(f"{server.v1}/chat/completions", data=body, timeout=PATIENCE_S)
    assert (found.status_code, found.json()["error"]["type"]) == (400, "invalid_request_error")


# The queue


@contextmanager
def held(server: LLMServer) -> Iterator[Any]:
    """Somebody has the only slot of `tiny` until the end of the block."""
    with (
        server.client("holder") as client,
        client.chat.completions.create(
            model="tiny", messages=CAPITAL, max_tokens=CONTEXT - 100, stream=True, temperature=0,
            extra_body={"ignore_eos": True},
        ) as stream,
    ):  # fmt: skip
        next(iter(stream))
        yield stream


class Waiter:
    """A request for `tiny` in a thread of its own, by its name in the access log."""

    def __init__(self, server: LLMServer, name: str, *, key: str, **body: Any) -> None:
        self._server, self._name, self._key, self._body = server, name, key, body
        self.error: Exception | None = None
        before = server.metric("doorstep_queue_depth", model="tiny")
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        server.wait_for(lambda: server.metric("doorstep_queue_depth", model="tiny") > before, f"{name} in the queue")

    def _run(self) -> None:
        try:
            with self._server.client(self._key) as client:
                client.chat.completions.create(
                    model="tiny", messages=CAPITAL, max_tokens=2, temperature=0, extra_body=self._body,
                    extra_headers={"x-request-id": self._name},
                )  # fmt: skip
        except Exception as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        assert self.error is None, self.error


def test_keys_take_turns_and_priorities_go_first(server: LLMServer) -> None:
    with held(server):
        waiters = [Waiter(server, f"turn-a{i}", key="a") for i in range(3)]
        waiters.append(Waiter(server, "turn-b", key="b"))
        waiters.append(Waiter(server, "turn-urgent", key="a", priority=1))
    for waiter in waiters:
        waiter.join()
    found = re.findall(r"id=turn-(\w+)", server.logs())
    assert found == ["urgent", "a0", "b", "a1", "a2"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(server: LLMServer) -> None:
    with held(server):
        waiters = [Waiter(server, str(i), key="a") for i in range(4)]
        with server.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model="tiny", **GREEDY)
        answer = caught.value.response
        assert (answer.status_code, caught.value.code) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        assert post(server).status_code == 200, "another model is not full"
    for waiter in waiters:
        waiter.join()


def test_a_client_that_tries_again_is_served_in_the_end(server: LLMServer) -> None:
    answers: list[Any] = []
    rejected = server.metric("doorstep_llm_rejected_requests_total", model="tiny")
    with held(server) as stream:
        waiters = [Waiter(server, str(i), key="a") for i in range(4)]
        with openai.OpenAI(base_url=server.v1, api_key="b", max_retries=5, timeout=PATIENCE_S) as client:
            thread = threading.Thread(
                target=lambda: answers.append(client.chat.completions.create(model="tiny", **GREEDY))
            )
            thread.start()
            server.wait_for(
                lambda: server.metric("doorstep_llm_rejected_requests_total", model="tiny") > rejected, "a refusal"
            )
            stream.close()
            thread.join(PATIENCE_S)
    for waiter in waiters:
        waiter.join()
    assert answers[0].choices[0].finish_reason == "length"


def test_a_deadline_ends_a_request_that_waits(server: LLMServer) -> None:
    with held(server):
        found = post(server, {"x-request-timeout-ms": "50"}, model="tiny")
        assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
        assert server.metric("doorstep_queue_depth", model="tiny") == 0


def test_a_deadline_ends_a_request_that_runs(server: LLMServer) -> None:
    found = post(server, {"x-request-timeout-ms": "300"}, max_tokens=900, ignore_eos=True)
    assert (found.status_code, found.json()["error"]["code"]) == (504, "timeout")
    server.wait_for(lambda: server.metric("doorstep_inflight_requests", model="smol") == 0, "the slot")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "1e3", "", "0" * 11 + "1" * 400, "0" * 11 + "1" * 5000])
def test_a_deadline_that_is_none_is_refused(server: LLMServer, value: str) -> None:
    found = post(server, {"x-request-timeout-ms": value})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "x-request-timeout-ms")
