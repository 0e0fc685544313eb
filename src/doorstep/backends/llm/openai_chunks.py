"""Chunks of OpenAI's streams, as engines with such an API send them, become deltas. Knows no engine and no socket."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from doorstep.backends.llm import tools
from doorstep.backends.llm.job import Delta, Usage
from doorstep.backends.llm.tool_plan import Split


def delta_of(choice: Mapping[str, Any]) -> Delta:
    """One choice of a chunk, of a chat or a completion."""
    said = choice.get("delta")
    logprobs = _logprobs(choice.get("logprobs") or {})
    if said is None:  # a completion
        text = choice.get("text") or ""
        return Delta(text=text, logprobs=logprobs, tokens=_tokens(text, logprobs))
    text, reasoning = said.get("content") or "", said.get("reasoning_content") or said.get("reasoning") or ""
    calls = [_call(call) for call in said.get("tool_calls") or ()]
    return Delta(text, reasoning, calls, logprobs, tokens=_tokens(text or reasoning or calls, logprobs))


def usage_of(told: Mapping[str, Any], *, prefill_us: int = 0, decode_us: int = 0) -> Usage:
    cached = (told.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Usage(told.get("prompt_tokens", 0), told.get("completion_tokens") or 0, cached, prefill_us, decode_us)


def split_calls(split: Split, delta: Delta) -> Iterator[Delta]:
    """A piece of text that may hold calls, as pieces of words and of calls."""
    if isinstance(split, tools.CallStream):
        yield Delta(reasoning=delta.reasoning, tool_calls=split.feed(delta.text), tokens=delta.tokens)
        return
    (words, calls), *rest = list(split.feed(delta.text)) or [("", [])]
    yield Delta(words, delta.reasoning, calls, delta.logprobs, tokens=delta.tokens)
    for words, calls in rest:
        yield Delta(text=words, tool_calls=calls)


def _tokens(said: Any, logprobs: Sequence[Any] | None) -> int:
    """A chunk is a token, unless the log probabilities count otherwise."""
    return len(logprobs) if logprobs else int(bool(said))


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    made: dict[str, Any] = {"index": call.get("index", 0), "arguments": function.get("arguments") or ""}
    if function.get("name"):
        made |= {"id": call.get("id") or tools.new_call_id(), "name": function["name"]}
    return made


def _logprobs(said: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A chat's as they are; a completion's, which are parallel lists, as a chat's."""
    if (content := said.get("content")) is not None or "tokens" not in said:
        return content
    tops = said.get("top_logprobs") or [None] * len(said["tokens"])
    return [
        {**_entry(token, logprob), "top_logprobs": [_entry(*pair) for pair in (top or {}).items()]}
        for token, logprob, top in zip(said["tokens"], said["token_logprobs"], tops, strict=False)
        if logprob is not None
    ]


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob if math.isfinite(logprob) else -9999.0, "bytes": list(token.encode())}
