"""What has come of a call so far, and what a format of answers is. Knows no connection.

A format turns pieces of answers into one API's events, or the whole into its document. One object per call.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import orjson

from doorstep.backends.llm.job import Delta, Usage
from doorstep.errors import DoorstepError

EVENT, END = b"data: ", b"\n\n"
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class Choice:
    """One answer, gathered from its pieces."""

    __slots__ = ("calls", "finish", "logprobs", "reasoning", "reasoning_tokens", "texts", "usage", "value")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.reasoning_tokens = 0
        self.calls: list[dict[str, Any]] = []  # {"id", "name", "arguments": [pieces]}
        self.logprobs: list[dict[str, Any]] = []
        self.finish = ""
        self.usage = Usage()
        self.value: Any = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: Delta, *, keep: bool) -> None:
        """`keep`: the whole answer is wanted in the end, not only what it came to."""
        if delta.usage is not None:
            self.usage = delta.usage
        if delta.finish:
            self.finish = delta.finish
        if delta.reasoning:
            self.reasoning_tokens += delta.tokens
        if not keep:
            return
        if delta.text:
            self.texts.append(delta.text)
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            if "id" in call:
                self.calls.append({"id": call["id"], "name": call["name"], "arguments": []})
            if call["arguments"] and self.calls:
                self.calls[min(call["index"], len(self.calls) - 1)]["arguments"].append(call["arguments"])
        if delta.logprobs:
            self.logprobs += delta.logprobs
        if delta.value is not None:
            self.value = delta.value

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """In OpenAI's form."""
        return [
            {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": "".join(c["arguments"])}}
            for c in self.calls
        ]


class Format(Protocol):
    """Touched only from the event loop."""

    keeps: bool  # even where it streams, its end needs the whole answer
    ping: bytes  # an event that says only that somebody is there

    def begin(self) -> bytes:
        """The first events; b"" where there are none."""

    def events(self, index: int, delta: Delta) -> bytes:
        """Of a piece of choice `index`; b"" for one that says nothing here."""

    def end(self, choices: Sequence[Choice]) -> bytes: ...

    def failed(self, error: DoorstepError) -> bytes:
        """The event of an error after others; nothing comes after it."""

    def document(self, choices: Sequence[Choice]) -> Any:
        """The whole answer, of a call that does not stream."""

    def error_document(self, error: DoorstepError) -> Any: ...


def event(document: Any) -> bytes:
    return EVENT + orjson.dumps(document) + END


def named_event(document: Mapping[str, Any]) -> bytes:
    """Where an API says an event's type beside its data too."""
    return b"event: %b\n" % str(document["type"]).encode() + event(document)


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def now_s() -> int:
    return int(time.time())


def usage_object(choices: Sequence[Choice], prompts: int = 1) -> dict[str, Any]:
    """Of all choices. The first `len / prompts` of them share a prompt, and so on: it counts once."""
    per_prompt = max(len(choices) // max(prompts, 1), 1)
    prompt = sum(choices[i].usage.prompt for i in range(0, len(choices), per_prompt))
    cached = sum(choices[i].usage.cached for i in range(0, len(choices), per_prompt))
    completion = sum(choice.usage.completion for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
