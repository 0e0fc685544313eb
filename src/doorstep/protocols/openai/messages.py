"""Anthropic's POST /v1/messages and /v1/messages/count_tokens. Knows no engine; nothing is kept between requests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from doorstep.backends.llm.job import Job
from doorstep.protocols.openai import fields
from doorstep.protocols.openai import messages_blocks as blocks
from doorstep.protocols.openai.call import Call
from doorstep.protocols.openai.errors import BadField, anthropic_body
from doorstep.protocols.openai.front import Front, check_size, respond_error
from doorstep.protocols.openai.identity import caller_of
from doorstep.protocols.openai.messages_format import CountFormat, MessageFormat
from doorstep.wire.exchange import Exchange

COUNTED: Mapping[str, fields.Check] = {
    "model": fields.text(512),
    "messages": blocks.read_messages,
    "system": blocks.read_system,
    "tools": blocks.read_tools,
    "tool_choice": blocks.read_tool_choice,
    "thinking": blocks.read_thinking,
    "output_config": blocks.read_output_config,
    **dict.fromkeys(("cache_control", "metadata", "service_tier", "inference_geo", "speed"), fields.anything),
}
CHECKS: Mapping[str, fields.Check] = {
    **COUNTED,
    "max_tokens": fields.integer(1, fields.MOST_TOKENS),
    "stop_sequences": fields.stops,
    "temperature": fields.number(0, 1),
    "top_p": fields.number(0, 1),
    "top_k": fields.integer(0, 1_000_000),
    "stream": fields.boolean,
    "container": fields.refused("this server runs no code"),
    "mcp_servers": fields.refused("this server calls no others"),
    "context_management": fields.refused("the context is not edited here"),
    # Extensions, as the other APIs have them
    **{name: fields.SAMPLING[name] for name in ("seed", "min_p", "repetition_penalty", "ignore_eos")},
    "priority": fields.OUTER["priority"],
}
# Ours → the chat's, as engines know it.
_ASKED = {
    **{name: name for name in ("tools", "max_tokens", "temperature", "top_p", "top_k", "seed", "min_p",
                               "repetition_penalty", "ignore_eos")},
    "stop_sequences": "stop",
    "thinking": "chat_template_kwargs",
}  # fmt: skip


def read_message(said: Mapping[str, Any], checks: Mapping[str, fields.Check], *needed: str) -> dict[str, Any]:
    """The body, checked. Raises BadField."""
    body = fields.read(said, checks)
    for name in needed:
        if name not in body:
            raise BadField(f"'{name}' is missing", name)
    choice = body.get("tool_choice", {}).get("tool_choice")
    names = [tool["function"]["name"] for tool in body.get("tools", ())]
    if isinstance(choice, Mapping) and choice["function"]["name"] not in names:
        name = choice["function"]["name"][:64]
        raise BadField(f"'tool_choice' names '{name}', which is not in 'tools'", "tool_choice")
    if choice == "required" and not names:
        raise BadField("'tool_choice' needs 'tools'", "tool_choice")
    return body


def _whole(said: Mapping[str, Any]) -> dict[str, Any]:
    return read_message(said, CHECKS, "model", "max_tokens", "messages")


def _counted(said: Mapping[str, Any]) -> dict[str, Any]:
    return read_message(said, COUNTED, "model", "messages")


def asked_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a chat asks."""
    system = [{"role": "system", "content": body["system"]}] if "system" in body else []
    asked: dict[str, Any] = {"messages": [*system, *body["messages"]]}  # first: what begins alike has the same bytes
    asked |= {theirs: body[ours] for ours, theirs in _ASKED.items() if ours in body}
    return {**asked, **body.get("tool_choice", {}), **body.get("output_config", {})}


class Messages:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._refuse = partial(respond_error, body_of=anthropic_body)

    def create(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, _whole, self._create, self._refuse)

    def _create(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        model, adapter = self._front.generator(body["model"])
        job = Job("chat", asked_of(body), adapter)
        self._front.start(exchange, model, body, [job], MessageFormat(body["model"]))

    def count(self, exchange: Exchange) -> None:
        self._front.with_document(exchange, _counted, self._count, self._refuse)

    def _count(self, body: Mapping[str, Any], exchange: Exchange) -> None:
        model, _ = self._front.generator(body["model"])
        check_size(exchange, model)
        job, caller = Job("tokenize", asked_of(body)), caller_of(exchange, {})
        Call(self._front, exchange, model, [job], CountFormat(), caller, stream=False).begin()
