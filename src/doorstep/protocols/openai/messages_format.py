"""Answers of POST /v1/messages: pieces become blocks of a message, and Anthropic's events of them. Pure.

Blocks come one after the other: what the model thinks, what it says, each use of a tool. One is open at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from doorstep.backends.llm.job import Delta, Usage
from doorstep.errors import DoorstepError
from doorstep.protocols.openai.answer import Choice, named_event, new_id
from doorstep.protocols.openai.embeddings import ValueFormat
from doorstep.protocols.openai.errors import anthropic_error

Event = dict[str, Any]
PING = named_event({"type": "ping"})
# The engine says only that a stop string or the end came, not which: it is told as the end.
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageFormat:
    keeps = False
    ping = PING

    def __init__(self, model: str) -> None:
        self._message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model}
        self._begun = False
        self._prompt = Usage()  # what is known of it when the answer begins
        self._blocks = 0  # begun
        self._open = ""  # the type of the last, until it has ended

    # Events

    def begin(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        message: Event = {**self._message, "content": [], "stop_reason": None, "stop_sequence": None,
                   "usage": _usage(self._prompt)}  # fmt: skip
        return named_event({"type": "message_start", "message": message}) + PING

    def events(self, index: int, delta: Delta) -> bytes:
        if delta.usage is not None and not self._begun:
            self._prompt = Usage(delta.usage.prompt, 0, delta.usage.cached)
        return b"".join(map(named_event, self._of(delta)))

    def _of(self, delta: Delta) -> Iterator[Event]:
        if delta.reasoning:
            yield from self._switch("thinking", thinking="", signature="")
            yield self._delta("thinking_delta", thinking=delta.reasoning)
        if delta.text:
            yield from self._switch("text", text="")
            yield self._delta("text_delta", text=delta.text)
        for call in delta.tool_calls:
            if "id" in call:
                yield from self._close()
                yield self._start("tool_use", id=call["id"], name=call["name"], input={})
            if call["arguments"] and self._open == "tool_use":
                yield self._delta("input_json_delta", partial_json=call["arguments"])

    def _switch(self, kind: str, **fields: Any) -> Iterator[Event]:
        if self._open != kind:
            yield from self._close()
            yield self._start(kind, **fields)

    def _start(self, kind: str, **fields: Any) -> Event:
        self._open = kind
        self._blocks += 1
        return {"type": "content_block_start", "index": self._blocks - 1, "content_block": {"type": kind, **fields}}

    def _delta(self, kind: str, **fields: Any) -> Event:
        return {"type": "content_block_delta", "index": self._blocks - 1, "delta": {"type": kind, **fields}}

    def _close(self) -> Iterator[Event]:
        if not self._open:
            return
        if self._open == "thinking":
            yield self._delta("signature_delta", signature="")  # nobody checks it here
        yield {"type": "content_block_stop", "index": self._blocks - 1}
        self._open = ""

    def end(self, choices: Sequence[Choice]) -> bytes:
        choice = choices[0]
        last: list[Event] = [
            *self._close(),
            {"type": "message_delta", "delta": _stop(choice), "usage": _usage(choice.usage)},
            {"type": "message_stop"},
        ]
        return b"".join(map(named_event, last))

    def failed(self, error: DoorstepError) -> bytes:
        return named_event(anthropic_error(error))

    # Documents

    def document(self, choices: Sequence[Choice]) -> Any:
        choice = choices[0]
        content: list[dict[str, Any]] = []
        if choice.reasoning:
            content.append({"type": "thinking", "thinking": "".join(choice.reasoning), "signature": ""})
        if text := choice.text:
            content.append({"type": "text", "text": text})
        content += [
            {"type": "tool_use", "id": call["id"], "name": call["name"], "input": _input("".join(call["arguments"]))}
            for call in choice.calls
        ]
        return {**self._message, "content": content, **_stop(choice), "usage": _usage(choice.usage)}

    def error_document(self, error: DoorstepError) -> Any:
        return anthropic_error(error)


class CountFormat(ValueFormat):
    def __init__(self) -> None:
        super().__init__(lambda choice: {"input_tokens": len(choice.value)})

    def error_document(self, error: DoorstepError) -> Any:
        return anthropic_error(error)


def _stop(choice: Choice) -> dict[str, Any]:
    return {"stop_reason": _STOP_REASONS.get(choice.finish, "end_turn"), "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, int]:
    """Anthropic's input tokens are those that were in no cache."""
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _input(arguments: str) -> Mapping[str, Any]:
    """An object, which it may not be where the answer was cut off in the middle."""
    try:
        said = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return {}
    return said if isinstance(said, dict) else {}
