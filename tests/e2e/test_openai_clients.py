"""Programs that were written for OpenAI's API chat with a small model, streamed: its own client, LangChain, curl, and a
reader of server-sent events that has never heard of either.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("openai clients")

QUESTION = "What is 2+2?"
ASKED: dict[str, Any] = {
    "model": "chat", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16, "temperature": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "chat/1").mkdir(parents=True)
    (folder / "chat/1/model.gguf").symlink_to(smollm2)
    with ServerProcess(folder) as running:
        yield running


@pytest.fixture(scope="module")
def answer(server: ServerProcess) -> str:
    """The whole answer, asked for with nothing but HTTP."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(ASKED))
    said = json.loads(connection.getresponse().read())
    connection.close()
    text = said["choices"][0]["message"]["content"]
    assert " 4" in text
    return str(text)


def test_openais_client_streams(server: ServerProcess, answer: str) -> None:
    with openai.OpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0) as client:
        with client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}) as stream:
            chunks = list(stream)
        assert [model.id for model in client.models.list()] == ["chat"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 4
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


def test_openais_asyncio_client_streams_to_several_at_once(server: ServerProcess, answer: str) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(**ASKED, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url("/v1"), api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(3)))

    for found in asyncio.run(together()):
        # Together, sums of numbers are rounded otherwise than alone: the answer need not be the same to its last word.
        assert found.startswith(answer[:4])


@pytest.fixture(scope="module")
def langchain(server: ServerProcess) -> ChatOpenAI:
    return ChatOpenAI(
        model="chat", base_url=server.url("/v1"), api_key=SecretStr("none"), temperature=0, max_completion_tokens=16,
        max_retries=0, stream_usage=True,
    )  # fmt: skip


def test_langchain_streams(langchain: ChatOpenAI, answer: str) -> None:
    chunks = list(langchain.stream([HumanMessage(QUESTION)]))
    assert "".join(str(chunk.content) for chunk in chunks) == answer
    assert len(chunks) > 4
    whole = sum(chunks[1:], start=chunks[0])
    assert isinstance(whole, AIMessageChunk)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 4
    assert whole.response_metadata["model_name"] == "chat"


def test_langchain_chains_a_prompt_and_the_model(langchain: ChatOpenAI, answer: str) -> None:
    chain = ChatPromptTemplate.from_messages([("user", "What is {a}+{b}?")]) | langchain
    assert chain.invoke({"a": 2, "b": 2}).content == answer
    told = langchain.invoke([SystemMessage("You are a pirate."), HumanMessage("Who are you?")])
    assert told.content
    assert told.response_metadata["finish_reason"] in ("stop", "length")


def test_langchains_batches_are_answered_each(langchain: ChatOpenAI) -> None:
    first, second = langchain.batch([[HumanMessage(QUESTION)], [HumanMessage("Say hello.")]])
    assert first.content != second.content


def test_a_plain_reader_of_server_sent_events_gets_every_piece(server: ServerProcess, answer: str) -> None:
    """By the rules of the HTML standard alone: fields, comments, blank lines."""
    connection = http.client.HTTPConnection(server.http, timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps({**ASKED, "stream": True}),
                       {"Accept": "text/event-stream"})  # fmt: skip
    response = connection.getresponse()
    kind = response.getheader("content-type", "")
    assert (response.status, kind.partition(";")[0]) == (200, "text/event-stream")
    data, text, reasons, ended = [], "", [], False
    for line in response:
        field, _, value = line.decode().rstrip("\n").partition(":")
        assert field in ("data", ""), line
        if field:
            data.append(value.removeprefix(" "))
        elif not value and data:
            event, data = "\n".join(data), []
            assert not ended
            if event == "[DONE]":
                ended = True
                continue
            choice = json.loads(event)["choices"][0]
            text += choice["delta"].get("content", "")
            reasons.append(choice["finish_reason"])
    connection.close()
    assert ended
    assert text == answer
    assert reasons[-1] in ("stop", "length")
    assert set(reasons[:-1]) == {None}


def curl(server: ServerProcess, **more: Any) -> list[str]:
    body = json.dumps({**ASKED, "stream": True, **more})
    return ["curl", "-sN", server.url("/v1/chat/completions"), "-H", "Content-Type: application/json", "-d", body]


def test_curl_gets_the_whole_stream(server: ServerProcess, answer: str) -> None:
    done = subprocess.run(curl(server), capture_output=True, text=True, timeout=60, check=True)
    *events, last, nothing = done.stdout.split("\n\n")
    assert (last, nothing) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == answer


def test_curl_shows_the_pieces_of_a_long_answer_long_before_its_end(server: ServerProcess) -> None:
    with subprocess.Popen(curl(server, max_tokens=4000, ignore_eos=True), stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        shown = [running.stdout.readline() for _ in range(10)]
        assert running.poll() is None
        running.kill()
    assert sum(line.startswith(b"data: {") for line in shown) == 5
