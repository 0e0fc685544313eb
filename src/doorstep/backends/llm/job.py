"""What is asked of a language model, and the pieces it answers with. Knows no engine and no protocol.

A front makes a `Job` out of whatever its clients send; the engine, in its own process, answers with `Delta`s. Both
cross between the processes as JSON in a tensor that no client can name (`JOB`, `DELTA`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

JOB = "doorstep.job"  # names of tensors; a config cannot have them, so validation refuses them from clients
DELTA = "doorstep.delta"
COUNTS = "doorstep.counts"  # see counts.py

Operation = Literal["chat", "complete", "embed", "rerank", "tokenize", "detokenize"]
GENERATES = frozenset(("chat", "complete"))
LIGHT = frozenset(("tokenize", "detokenize"))  # need no slot of the engine


@dataclass(slots=True)
class Job:
    """`body` has fields by OpenAI's names, whitelisted and in range (protocols/openai/fields.py).

    chat: `messages`, `tools`, `tool_choice` … · complete: `prompt`, a text or token ids · embed: `input`, a list of
    texts or of token ids · rerank: `query`, `documents` · tokenize: `text`, or `messages` · detokenize: `tokens`."""

    operation: Operation
    body: dict[str, Any]
    adapter: str = ""  # the LoRA adapter's name

    def to_json(self) -> bytes:
        """What the body says comes first: requests with the same beginning have the same first bytes."""
        return orjson.dumps([self.body, self.operation, self.adapter])

    @classmethod
    def from_json(cls, text: bytes) -> Job:
        body, operation, adapter = orjson.loads(text)
        return cls(operation, body, adapter)


@dataclass(slots=True)
class Usage:
    """Tokens, and where the time went."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0  # of the prompt, whose work was done before
    prefill_us: int = 0
    decode_us: int = 0


@dataclass(slots=True)
class Delta:
    """One piece of an answer. The last has `finish` and `usage`; `tokens` is how many the piece stands for."""

    text: str = ""
    reasoning: str = ""
    # {"index", "id", "name", "arguments"}: the first piece of a call has its id and name, all may have arguments.
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    # {"token", "logprob", "bytes", "top_logprobs": [{"token", "logprob", "bytes"}]}, as in a chat's logprobs.content
    logprobs: list[dict[str, Any]] | None = None
    finish: str = ""  # stop, length, tool_calls
    usage: Usage | None = None  # the last piece's is whole; earlier ones may know the prompt's
    tokens: int = 0
    value: Any = None  # what operations that are not streams answer: vectors, scores, token ids, text

    def to_json(self) -> bytes:
        said: dict[str, Any] = {}
        if self.text:
            said["t"] = self.text
        if self.reasoning:
            said["r"] = self.reasoning
        if self.tool_calls:
            said["c"] = self.tool_calls
        if self.logprobs is not None:
            said["l"] = self.logprobs
        if self.finish:
            said["f"] = self.finish
        if self.usage is not None:
            u = self.usage
            said["u"] = (u.prompt, u.completion, u.cached, u.prefill_us, u.decode_us)
        if self.tokens:
            said["n"] = self.tokens
        if self.value is not None:
            said["v"] = self.value
        return orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY)

    @classmethod
    def from_json(cls, text: bytes) -> Delta:
        said = orjson.loads(text)
        usage = said.get("u")
        return cls(
            said.get("t", ""),
            said.get("r", ""),
            said.get("c", []),
            said.get("l"),
            said.get("f", ""),
            None if usage is None else Usage(*usage),
            said.get("n", 0),
            said.get("v"),
        )
