"""POST /v1/completions with OpenAI's own client; what the model says is what xllamacpp says, asked directly."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

sys.path.insert(0, str(Path(__file__).parent))

from llm_server import CONTEXT, PATIENCE_S, SMOL, LLMServer, Reference, save_model

pytestmark = pytest.mark.xdist_group("openai-completions")
PROMPT = "The capital of France is"
OTHER = "Water is made of"
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[LLMServer]:
    models = tmp_path_factory.mktemp("completions")
    save_model(models, "smol", SMOL, smollm2)
    with LLMServer(models) as found:
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
    """Prompt → what the model answers."""
    return {prompt: reference.complete({"prompt": prompt, "logprobs": 3, **GREEDY}) for prompt in (PROMPT, OTHER)}


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["text"])


def tokens(server: LLMServer, text: str) -> list[int]:
    answer = requests.post(server.url("/tokenize"), json={"model": "smol", "prompt": text}, timeout=PATIENCE_S)
    return list(answer.json()["tokens"])


def test_a_prompt_goes_on_as_the_model_has_it(client: openai.OpenAI, said: dict[str, Any]) -> None:
    found = client.completions.create(model="smol", prompt=PROMPT, **GREEDY)
    (choice,) = found.choices
    assert (choice.text, choice.index, choice.finish_reason) == (text_of(said[PROMPT]), 0, "length")
    assert choice.logprobs is None
    assert (found.object, found.model, found.id[:5]) == ("text_completion", "smol", "cmpl-")
    assert found.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(found.usage, name) == said[PROMPT]["usage"][name]


def test_an_answer_has_sixteen_tokens_where_nothing_is_said(client: openai.OpenAI) -> None:
    """OpenAI's default."""
    found = client.completions.create(model="smol", prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert found.usage is not None
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (16, "length")


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_the_same_piece_by_piece(client: openai.OpenAI, said: dict[str, Any], usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(client.completions.create(model="smol", prompt=PROMPT, stream=True, **options, **GREEDY))
    if usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == said[PROMPT]["usage"]["completion_tokens"]
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_of(said[PROMPT])
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_are_answered_in_their_order(client: openai.OpenAI, said: dict[str, Any]) -> None:
    found = client.completions.create(model="smol", prompt=[PROMPT, OTHER], n=2, **GREEDY)
    expected = [text_of(said[prompt]) for prompt in (PROMPT, PROMPT, OTHER, OTHER)]
    assert [(choice.index, choice.text) for choice in found.choices] == list(enumerate(expected))
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(said[p]["usage"]["prompt_tokens"] for p in (PROMPT, OTHER))
    assert found.usage.completion_tokens == 2 * sum(said[p]["usage"]["completion_tokens"] for p in (PROMPT, OTHER))


def test_streamed_prompts_are_told_apart_by_their_index(client: openai.OpenAI, said: dict[str, Any]) -> None:
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(model="smol", prompt=[PROMPT, OTHER], stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: text_of(said[PROMPT]), 1: text_of(said[OTHER])}


def test_token_ids_are_prompts_too(server: LLMServer, client: openai.OpenAI, said: dict[str, Any]) -> None:
    ids = tokens(server, PROMPT)
    one = client.completions.create(model="smol", prompt=ids, **GREEDY)
    two = client.completions.create(model="smol", prompt=[ids, tokens(server, OTHER)], **GREEDY)
    assert one.choices[0].text == text_of(said[PROMPT])
    assert [choice.text for choice in two.choices] == [text_of(said[PROMPT]), text_of(said[OTHER])]
    assert one.usage is not None
    assert one.usage.prompt_tokens == len(ids) == said[PROMPT]["usage"]["prompt_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_is_the_prompt_and_then_the_answer(client: openai.OpenAI, said: dict[str, Any], stream: bool) -> None:
    body: dict[str, Any] = {"model": "smol", "prompt": [PROMPT, OTHER], "echo": True, **GREEDY}
    texts = {0: "", 1: ""}
    if stream:
        for chunk in client.completions.create(stream=True, **body):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = {choice.index: choice.text for choice in client.completions.create(**body).choices}
    assert texts == {0: PROMPT + text_of(said[PROMPT]), 1: OTHER + text_of(said[OTHER])}


def test_best_of_all_is_all(client: openai.OpenAI) -> None:
    found = client.completions.create(model="smol", prompt=PROMPT, n=2, best_of=2, **GREEDY)
    assert len(found.choices) == 2
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smol", prompt=PROMPT, n=1, best_of=2, **GREEDY)
    assert caught.value.param == "best_of"


@pytest.mark.parametrize("tops", [0, 1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_older_apis_four_lists(
    client: openai.OpenAI, said: dict[str, Any], tops: int, stream: bool
) -> None:
    wanted = said[PROMPT]["choices"][0]["logprobs"]["content"]
    body: dict[str, Any] = {"model": "smol", "prompt": PROMPT, "logprobs": tops, **GREEDY}
    pieces = list(client.completions.create(stream=True, **body)) if stream else [client.completions.create(**body)]
    found = [four for piece in pieces if (four := piece.choices[0].logprobs) is not None]
    lists = [
        list(itertools.chain(*(getattr(one, name) for one in found)))
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    ]
    assert lists[0] == [entry["token"] for entry in wanted]
    assert lists[1] == pytest.approx([entry["logprob"] for entry in wanted], abs=0.05)
    assert [list(top) for top in lists[2]] == [[t["token"] for t in e["top_logprobs"]][:tops] for e in wanted]
    assert lists[3] == [len("".join(lists[0][:i])) for i in range(len(wanted))]
    assert "".join(lists[0]) == text_of(said[PROMPT])


def test_an_answer_ends_before_a_stop_string(client: openai.OpenAI, said: dict[str, Any]) -> None:
    whole = text_of(said[PROMPT])
    found = client.completions.create(model="smol", prompt=PROMPT, stop=["no such text", whole[4:6]], **GREEDY)
    assert (found.choices[0].text, found.choices[0].finish_reason) == (whole.partition(whole[4:6])[0], "stop")


def test_an_answer_fits_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    found = client.completions.create(
        model="smol", prompt=PROMPT, max_tokens=40, temperature=0, extra_body={"response_format": wanted}
    )
    assert json.loads(found.choices[0].text) == {"a": "x"}


def test_async_clients_are_served(server: LLMServer, said: dict[str, Any]) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with server.async_client() as client:
            answers = await asyncio.gather(
                *(client.completions.create(model="smol", prompt=prompt, **GREEDY) for prompt in (PROMPT, OTHER))
            )
            return [answer.choices[0].text for answer in answers]

    assert asyncio.run(ask()) == [text_of(said[PROMPT]), text_of(said[OTHER])]


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("prompt", [], "invalid_type"),
        ("prompt", [""] * 65, "array_above_max_length"),
        ("prompt", {"a": 1}, "invalid_type"),
        ("prompt", [1, "a"], "invalid_type"),
        ("prompt", [-1], "invalid_value"),
        ("suffix", "the end", "unsupported_parameter"),
        ("logprobs", 21, "invalid_value"),
        ("logprobs", True, "invalid_type"),
        ("messages", [], "unknown_parameter"),
        ("stream_options", {"include_usage": True}, "invalid_value"),
    ],
)
def test_a_bad_field_is_named(client: openai.OpenAI, field: str, value: Any, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="smol", **{"prompt": PROMPT, **GREEDY}, extra_body={field: value})
    assert (caught.value.param, caught.value.code) == (field, code)


def test_tokens_that_the_model_does_not_have_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="smol", prompt=[1, 2**31 - 1], **GREEDY)


def test_a_prompt_that_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    for prompt in ("word " * (CONTEXT + 10), [504] * (CONTEXT + 10), "x" * (CONTEXT * 300)):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="smol", prompt=prompt, **GREEDY)
        assert caught.value.code == "context_length_exceeded"
