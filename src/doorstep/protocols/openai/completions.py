"""POST /v1/completions, OpenAI's older API: a prompt goes on. Body to jobs, pieces to chunks or the document. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from doorstep.backends.llm.job import Delta, Job
from doorstep.errors import DoorstepError
from doorstep.protocols.openai import fields
from doorstep.protocols.openai.answer import DONE, PING, Choice, event, new_id, now_s, usage_object
from doorstep.protocols.openai.chat import stream_options
from doorstep.protocols.openai.errors import BadField, error_object

MOST_PROMPTS = 64
MOST_CHOICES = 128  # prompts times n
_TOKEN = fields.integer(0, 2**31 - 1)


def read_prompts(value: Any, where: str) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return [[_TOKEN(token, where) for token in value]]
        if len(value) > MOST_PROMPTS:
            raise BadField(f"'{where}' may have {MOST_PROMPTS} prompts at most", where, "array_above_max_length")
        if all(isinstance(one, str) for one in value):
            return value
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in value):
            return [[_TOKEN(token, where) for token in one] for one in value]
    raise BadField(f"'{where}' must be a string, token ids, or a list of either", where, "invalid_type")


CHECKS: Mapping[str, fields.Check] = {
    **fields.OUTER,
    **fields.SAMPLING,
    **fields.WITHOUT_EFFECT,
    "prompt": read_prompts,
    "logprobs": fields.integer(0, fields.MOST_TOP_LOGPROBS),
    "echo": fields.boolean,
    "best_of": fields.integer(1, fields.MOST_CHOICES),
    "suffix": fields.unless_harmless(lambda v: v == "", "the model only goes on where the prompt ends"),
    "response_format": fields.response_format,
    "stream_options": stream_options,
}
_FRONT = ("model", "n", "stream", "priority", "stream_options", "prompt", "echo", "best_of")


def read_completion(said: Mapping[str, Any]) -> dict[str, Any]:
    body = fields.read(said, CHECKS)
    for name in ("model", "prompt"):
        if name not in body:
            raise BadField(f"'{name}' is missing", name, "missing")
    n = body.get("n", 1)
    if body.get("best_of", n) != n:
        raise BadField("'best_of' must be what 'n' is: all answers are given", "best_of", "unsupported_parameter")
    if n * len(body["prompt"]) > MOST_CHOICES:
        raise BadField(f"'n' times the prompts may be {MOST_CHOICES} at most", "n", "invalid_value")
    if body.get("echo") and ("logprobs" in body or any(isinstance(p, list) for p in body["prompt"])):
        raise BadField(
            "'echo' goes with prompts that are text, and without 'logprobs'", "echo", "unsupported_parameter"
        )
    if "stream_options" in body and not body.get("stream"):
        raise BadField("'stream_options' needs 'stream': true", "stream_options", "invalid_value")
    return body


def completion_jobs(body: Mapping[str, Any], adapter: str) -> list[Job]:
    """The choices of the first prompt, then those of the next."""
    rest = {name: value for name, value in body.items() if name not in _FRONT}
    rest.setdefault("max_tokens", 16)  # OpenAI's default
    jobs = []
    for prompt in body["prompt"]:
        for i in range(body.get("n", 1)):
            seed = {"seed": (rest["seed"] + i) % 2**32} if "seed" in rest else {}
            jobs.append(Job("complete", {"prompt": prompt, **rest, **seed}, adapter))
    return jobs


class CompletionFormat:
    keeps = False
    ping = PING

    def __init__(self, body: Mapping[str, Any], fingerprint: str) -> None:
        n = body.get("n", 1)
        self._wants_usage = body.get("stream_options", {}).get("include_usage", False)
        self._logprobs_count: int | None = body.get("logprobs")
        self._prompts = len(body["prompt"])
        self._echoes = [prompt if body.get("echo") else "" for prompt in body["prompt"] for _ in range(n)]
        self._offsets = [len(echo) for echo in self._echoes]  # of the next token's text, in characters
        self._common = {"id": new_id("cmpl-"), "object": "text_completion", "created": now_s(), "model": body["model"],
                        "system_fingerprint": fingerprint}  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        made = {**self._common, "choices": choices}
        if self._wants_usage:
            made["usage"] = usage
        return event(made)

    def begin(self) -> bytes:
        return b"".join(self._chunk([_choice(i, echo, None, None)]) for i, echo in enumerate(self._echoes) if echo)

    def events(self, index: int, delta: Delta) -> bytes:
        if not delta.text and not delta.finish and not delta.logprobs:
            return b""
        logprobs = self._logprobs(index, delta.logprobs or []) if delta.logprobs else None
        return self._chunk([_choice(index, delta.text, logprobs, delta.finish or None)])

    def end(self, choices: Sequence[Choice]) -> bytes:
        return (self._chunk([], usage_object(choices, self._prompts)) if self._wants_usage else b"") + DONE

    def failed(self, error: DoorstepError) -> bytes:
        return event({"error": error_object(error, "prompt")}) + DONE

    def document(self, choices: Sequence[Choice]) -> Any:
        made = []
        for i, choice in enumerate(choices):
            logprobs = self._logprobs(i, choice.logprobs)
            made.append(_choice(i, self._echoes[i] + choice.text, logprobs, choice.finish))
        return {**self._common, "choices": made, "usage": usage_object(choices, self._prompts)}

    def error_document(self, error: DoorstepError) -> Any:
        return {"error": error_object(error, "prompt")}

    def _logprobs(self, index: int, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
        """In the older API's four lists."""
        count = self._logprobs_count
        if count is None:
            return None
        tokens = [str(entry["token"]) for entry in entries]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [
                {top["token"]: top["logprob"] for top in (entry.get("top_logprobs") or ())[:count]} for entry in entries
            ],
            "text_offset": offsets,
        }


def _choice(index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
