"""Event streams of OpenAI's API byte by byte, as curl receives them over HTTP/1.1 and HTTP/2; and what headers say.

The chunks are OpenAI's (API reference, "The chat completion chunk object"), their texts the tokens that xllamacpp gives
when it is asked directly. Ids and times are masked.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

sys.path.insert(0, str(Path(__file__).parent))

from llm_server import CAPITAL, CONTEXT, PATIENCE_S, TINY, LLMServer, Reference, save_model

from doorstep.testing.wire import RawClient

pytestmark = pytest.mark.xdist_group("openai-events")
GREEDY: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
CHAT: dict[str, Any] = {"model": "tiny", "messages": CAPITAL, **GREEDY}
PROMPT = "The capital of France is"
PROTOCOLS = pytest.mark.parametrize("protocol", ["--http1.1", "--http2-prior-knowledge"])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[LLMServer]:
    models = tmp_path_factory.mktemp("events")
    save_model(models, "tiny", TINY, smollm2)
    with LLMServer(models, "--sse-ping-secs=1") as found:
        yield found


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def chat(reference: Reference) -> dict[str, Any]:
    return reference.chat({**CHAT, "logprobs": True})


def tokens(answer: dict[str, Any]) -> list[str]:
    return [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]]


def curl(server: LLMServer, protocol: str, path: str, *options: str, **body: Any) -> tuple[int, dict[str, str], str]:
    """Status, headers and body, by curl."""
    found = subprocess.run(
        ["curl", "-sS", "-N", "-i", protocol, "-m", str(PATIENCE_S), "-H", "content-type: application/json",
         *options, "-d", json.dumps(body), server.url(path)],
        capture_output=True, check=True,
    )  # fmt: skip
    head, _, text = found.stdout.decode().partition("\r\n\r\n")
    line, *fields = head.split("\r\n")
    return int(line.split()[1]), dict(field.lower().split(": ", 1) for field in fields), text


def masked(text: str) -> str:
    text = re.sub(r'"id":"(chatcmpl|cmpl|call)[-_]\w+"', r'"id":"\1"', text)
    text = re.sub(r'"created":\d+', '"created":0', text)
    return re.sub(r'"system_fingerprint":"fp_[0-9a-f]{8}"', '"system_fingerprint":"fp"', text)


def chunk(choices: str, usage: str | None = None) -> str:
    said = "" if usage is None else f',"usage":{usage}'
    return (
        'data: {"id":"chatcmpl","created":0,"model":"tiny","object":"chat.completion.chunk","system_fingerprint":"fp",'
        f'"choices":[{choices}]{said}}}\n\n'
    )


def delta(said: str, finish: str = "null") -> str:
    return f'{{"index":0,"delta":{said},"logprobs":null,"finish_reason":{finish}}}'


def text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


BEGIN = delta('{"role":"assistant","content":""}')
EVENTS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


@PROTOCOLS
@pytest.mark.parametrize("usage", [False, True])
def test_a_chat_is_streamed_event_by_event(server: LLMServer, chat: dict[str, Any], protocol: str, usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    status, headers, found = curl(server, protocol, "/v1/chat/completions", stream=True, **options, **CHAT)
    null = "null" if usage else None
    expected = [chunk(choices, null) for choices in (
        BEGIN, *(delta(f'{{"content":{text(token)}}}') for token in tokens(chat)), delta("{}", '"length"')
    )]  # fmt: skip
    if usage:
        told = chat["usage"]
        numbers = f'"prompt_tokens":{told["prompt_tokens"]},"completion_tokens":4,"total_tokens":{told["total_tokens"]}'
        expected.append(chunk("", f'{{{numbers},"prompt_tokens_details":{{"cached_tokens":0}}}}'))
    found = re.sub(r'"cached_tokens":\d+', '"cached_tokens":0', masked(found))
    assert found == "".join(expected) + "data: [DONE]\n\n"
    assert status == 200
    assert EVENTS.items() <= headers.items()


@PROTOCOLS
def test_a_completion_is_streamed_event_by_event(server: LLMServer, reference: Reference, protocol: str) -> None:
    said = tokens(reference.complete({"prompt": PROMPT, "logprobs": 1, **GREEDY}))
    _, headers, found = curl(server, protocol, "/v1/completions", model="tiny", prompt=PROMPT, stream=True, **GREEDY)

    def one(choice: str, finish: str = "null") -> str:
        return (
            'data: {"id":"cmpl","object":"text_completion","created":0,"model":"tiny","system_fingerprint":"fp",'
            f'"choices":[{{"index":0,"text":{choice},"logprobs":null,"finish_reason":{finish}}}]}}\n\n'
        )

    assert masked(found) == "".join(one(text(token)) for token in said) + one('""', '"length"') + "data: [DONE]\n\n"
    assert EVENTS.items() <= headers.items()


def test_a_call_is_streamed_event_by_event(server: LLMServer) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "go", "parameters": schema}}
    asked = {**CHAT, "tools": [tool], "tool_choice": "required", "max_tokens": 30}
    _, _, found = curl(server, "--http1.1", "/v1/chat/completions", stream=True, **asked)
    *_, done, nothing = events = masked(found).split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert events[0] + "\n\n" == chunk(BEGIN)
    call = '{"tool_calls":[{"index":0,"id":"call","type":"function","function":{"name":"go","arguments":""}}]}'
    assert events[1] + "\n\n" == chunk(delta(call))
    pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[2:-3]]
    assert all(set(piece["tool_calls"][0]) == {"index", "function"} for piece in pieces)
    assert json.loads("".join(piece["tool_calls"][0]["function"]["arguments"] for piece in pieces)) == {}
    assert events[-3] + "\n\n" == chunk(delta("{}", '"tool_calls"'))


@PROTOCOLS
def test_events_are_not_compressed(server: LLMServer, protocol: str) -> None:
    """A compressor would hold them back."""
    _, headers, found = curl(
        server, protocol, "/v1/chat/completions", "-H", "accept-encoding: gzip, deflate", stream=True, **CHAT
    )
    assert "content-encoding" not in headers
    assert found.startswith("data: {")


@PROTOCOLS
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("given", "echoed"),
    [("abc-123", True), ("x" * 128, True), ("x" * 129, False), ("two words", False), (None, False)],
    ids=["usual", "longest", "too-long", "space", "none"],
)
def test_every_answer_has_a_request_id(
    server: LLMServer, protocol: str, stream: bool, given: str | None, echoed: bool
) -> None:
    options = [] if given is None else ["-H", f"x-request-id: {given}"]
    body = {**CHAT, "max_tokens": 1}
    status, headers, _ = curl(server, protocol, "/v1/chat/completions", *options, stream=stream, **body)
    assert status == 200
    assert (headers["x-request-id"] == given) == echoed
    assert headers["x-request-id"]


def test_an_errors_request_id_is_found_by_the_client(server: LLMServer) -> None:
    with server.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, n=2000, extra_headers={"x-request-id": "mine"})
    assert caught.value.request_id == "mine"
    with server.client() as client, pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(**{**CHAT, "model": "nobody"})
    assert unknown.value.request_id


@PROTOCOLS
@pytest.mark.parametrize("wrong", [{"messages": []}, {"max_tokens": CONTEXT + 1}, {"model": "nobody"}])
def test_what_is_wrong_before_the_first_event_is_a_status(
    server: LLMServer, protocol: str, wrong: dict[str, Any]
) -> None:
    status, headers, found = curl(server, protocol, "/v1/chat/completions", **{**CHAT, "stream": True, **wrong})
    assert status in (400, 404)
    assert headers["content-type"] == "application/json"
    assert json.loads(found)["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("stream", [False, True])
def test_how_busy_the_model_is_in_orcas_words(server: LLMServer, stream: bool) -> None:
    """The header of Envoy's ORCA (and Triton's): TEXT with named_metrics.x=y, or JSON with an object of them."""

    def ask(form: str) -> str | None:
        return requests.post(
            f"{server.v1}/chat/completions", json={**CHAT, "max_tokens": 1, "stream": stream},
            headers={"endpoint-load-metrics-format": form}, timeout=PATIENCE_S,
        ).headers.get("endpoint-load-metrics")  # fmt: skip

    as_json, as_text = ask("json"), ask("text")
    assert as_json is not None
    assert as_text is not None
    kind, _, rest = as_json.partition(" ")
    named = json.loads(rest)["named_metrics"]
    assert (kind, named.keys()) == ("JSON", {"kv_cache_utilization", "max_token_capacity"})
    assert named["max_token_capacity"] == CONTEXT
    assert 0 <= named["kv_cache_utilization"] <= 1
    kind, _, rest = as_text.partition(" ")
    pairs = dict(pair.split("=") for pair in rest.split(", "))
    assert (kind, pairs.keys()) == ("TEXT", {f"named_metrics.{name}" for name in named})
    assert requests.post(f"{server.v1}/chat/completions", json=CHAT, timeout=PATIENCE_S).headers.get(
        "endpoint-load-metrics"
    ) is None  # fmt: skip


def test_a_stream_that_waits_says_that_somebody_is_there(server: LLMServer, chat: dict[str, Any]) -> None:
    """Comments, which every reader of events passes over (HTML, "server-sent events")."""
    body = json.dumps({**CHAT, "stream": True}).encode()
    with server.client() as client, RawClient(socket.create_connection(("127.0.0.1", server.http_port))) as waiting:
        with client.chat.completions.create(
            **{**CHAT, "max_tokens": CONTEXT - 100}, stream=True, extra_body={"ignore_eos": True}
        ) as holder:
            next(iter(holder))
            waiting.sock.settimeout(PATIENCE_S)
            waiting.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
                % (len(body), body)
            )
            head = waiting.receive_until(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            before = waiting.receive_until(b": ping\n\n")
            assert b'"content":"' in before
        rest = waiting.receive_until(b"data: [DONE]\n\n")
    events = re.findall(rb"data: (\{.*?\})\n\n", rest)
    said = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(said) == chat["choices"][0]["message"]["content"]
