"""POST /v1/chat/completions: OpenAI's body to jobs, and pieces to chunks or the document. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from doorstep.backends.llm.job import Delta, Job
from doorstep.errors import DoorstepError
from doorstep.protocols.openai import fields
from doorstep.protocols.openai.answer import DONE, PING, Choice, event, new_id, now_s, usage_object
from doorstep.protocols.openai.errors import BadField, error_object
from doorstep.protocols.openai.messages_in import read_messages
from doorstep.protocols.openai.schema import check_schema


def stream_options(value: Any, where: str) -> dict[str, bool]:
    allowed = ("include_usage", "include_obfuscation")
    if not isinstance(value, dict) or not all(k in allowed and type(v) is bool for k, v in value.items()):
        raise BadField(f"'{where}' may have {', '.join(allowed)}, true or false", where, "invalid_value")
    return value


CHECKS: Mapping[str, fields.Check] = {
    **fields.OUTER,
    **fields.SAMPLING,
    **fields.WITHOUT_EFFECT,
    "messages": read_messages,
    "max_completion_tokens": fields.integer(1, fields.MOST_TOKENS),
    "logprobs": fields.boolean,
    "top_logprobs": fields.integer(0, fields.MOST_TOP_LOGPROBS),
    "response_format": fields.response_format,
    "structured_outputs": fields.structured_outputs,
    "guided_json": lambda value, where: fields.schema_format(check_schema(value, where)),
    "tools": fields.tools,
    "tool_choice": fields.tool_choice,
    "parallel_tool_calls": fields.boolean,
    "stream_options": stream_options,
    "reasoning_effort": fields.one_of("none", "minimal", "low", "medium", "high", "xhigh", "max"),
    "chat_template_kwargs": fields.template_kwargs,
    "modalities": fields.unless_harmless(lambda v: v in (["text"], []), "the model writes text only"),
    "audio": fields.refused("the model writes text only"),
    "web_search_options": fields.refused("nothing is looked up here"),
    "moderation": fields.refused("nothing is moderated here"),
    "functions": fields.refused("it is old; use 'tools'"),
    "function_call": fields.refused("it is old; use 'tool_choice'"),
}
# What the engine is not told, as the front does it.
_FRONT = ("model", "n", "stream", "priority", "stream_options", "max_completion_tokens", "structured_outputs",
          "guided_json")  # fmt: skip


def read_chat(said: Mapping[str, Any]) -> dict[str, Any]:
    """The body, checked. Raises BadField."""
    body = fields.read(said, CHECKS)
    for name in ("model", "messages"):
        if name not in body:
            raise BadField(f"'{name}' is missing", name, "missing")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise BadField("'top_logprobs' needs 'logprobs': true", "top_logprobs", "invalid_value")
    if "stream_options" in body and not body.get("stream"):
        raise BadField("'stream_options' needs 'stream': true", "stream_options", "invalid_value")
    _check_tools(body)
    formats = [name for name in ("response_format", "structured_outputs", "guided_json") if name in body]
    if len(formats) > 1:
        raise BadField(f"'{formats[0]}' and '{formats[1]}' say the same thing twice", formats[1], "invalid_value")
    return body


def _check_tools(body: Mapping[str, Any]) -> None:
    choice = body.get("tool_choice", "auto")
    names = [tool["function"]["name"] for tool in body.get("tools", ())]
    if isinstance(choice, Mapping) and choice["function"]["name"] not in names:
        raise BadField(
            f"'tool_choice' names '{choice['function']['name'][:64]}', which is not in 'tools'", "tool_choice"
        )
    if choice in ("required", "auto") and "tool_choice" in body and not names:
        raise BadField("'tool_choice' needs 'tools'", "tool_choice", "invalid_value")
    if len(set(names)) < len(names):
        raise BadField("'tools' has two of one name", "tools", "invalid_value")


def chat_jobs(body: Mapping[str, Any], adapter: str) -> list[Job]:
    """One per choice. Seeds differ, so that the choices do."""
    asked = {"messages": body["messages"]}  # first: requests that begin alike have the same first bytes
    asked |= {name: value for name, value in body.items() if name not in _FRONT}
    if "max_completion_tokens" in body:
        asked["max_tokens"] = body["max_completion_tokens"]
    for name in ("structured_outputs", "guided_json"):
        if name in body:
            asked["response_format"] = body[name]
    jobs = []
    for i in range(body.get("n", 1)):
        seed = {"seed": (asked["seed"] + i) % 2**32} if "seed" in asked else {}
        jobs.append(Job("chat", {**asked, **seed}, adapter))
    return jobs


class ChatFormat:
    keeps = False
    ping = PING

    def __init__(self, body: Mapping[str, Any], fingerprint: str) -> None:
        options = body.get("stream_options", {})
        self._wants_usage = options.get("include_usage", False)
        self._wants_logprobs = body.get("logprobs", False)
        self._top_logprobs = body.get("top_logprobs", 0)
        self._count = body.get("n", 1)
        self._common = {"id": new_id("chatcmpl-"), "created": now_s(), "model": body["model"]}
        self._fingerprint = fingerprint

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        made = {**self._common, "object": "chat.completion.chunk", "system_fingerprint": self._fingerprint,
                "choices": choices}  # fmt: skip
        if self._wants_usage:
            made["usage"] = usage
        return event(made)

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(self._chunk([_streamed(i, dict(role))]) for i in range(self._count))

    def events(self, index: int, delta: Delta) -> bytes:
        said: dict[str, Any] = {}
        if delta.text:
            said["content"] = delta.text
        if delta.reasoning:
            said["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            said["tool_calls"] = [_streamed_call(call) for call in delta.tool_calls]
        if not said and not delta.finish and not delta.logprobs:
            return b""
        choice = _streamed(index, said)
        if delta.logprobs and self._wants_logprobs:
            choice["logprobs"] = self._logprobs(delta.logprobs)
        if not delta.finish:
            return self._chunk([choice])
        last = self._chunk([_streamed(index, {}, delta.finish)])
        return self._chunk([choice]) + last if said or delta.logprobs else last

    def end(self, choices: Sequence[Choice]) -> bytes:
        return (self._chunk([], usage_object(choices)) if self._wants_usage else b"") + DONE

    def failed(self, error: DoorstepError) -> bytes:
        return event({"error": error_object(error)}) + DONE

    def document(self, choices: Sequence[Choice]) -> Any:
        return {
            **self._common,
            "object": "chat.completion",
            "system_fingerprint": self._fingerprint,
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage_object(choices),
        }

    def error_document(self, error: DoorstepError) -> Any:
        return {"error": error_object(error)}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        calls = choice.tool_calls
        text = choice.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if choice.reasoning:
            message["reasoning_content"] = "".join(choice.reasoning)
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(choice.logprobs) if self._wants_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"content": [logprob_entry(entry, self._top_logprobs) for entry in entries], "refusal": None}


def logprob_entry(entry: Mapping[str, Any], tops: int) -> dict[str, Any]:
    made = {name: entry.get(name) for name in ("token", "logprob", "bytes")}
    made["top_logprobs"] = [
        {name: top.get(name) for name in ("token", "logprob", "bytes")}
        for top in (entry.get("top_logprobs") or ())[:tops]
    ]
    return made


def _streamed(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


def _streamed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"index": call["index"]}
    function: dict[str, Any] = {"arguments": call["arguments"]}
    if "id" in call:
        made |= {"id": call["id"], "type": "function"}
        function = {"name": call["name"], **function}
    return {**made, "function": function}
