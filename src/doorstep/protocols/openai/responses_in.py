"""The body of POST /v1/responses, checked and made into what a chat asks. Pure; knows no engine.

Nothing is stored between requests: whoever goes on with a conversation sends all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from doorstep.backends.llm.job import Job
from doorstep.protocols.openai import fields
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.messages_in import MOST_MESSAGES, read_content
from doorstep.protocols.openai.schema import check_schema

LOGPROBS = "message.output_text.logprobs"
# What may be asked to be told more fully; but for the first, things that no answer here has.
_INCLUDES = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
_ROLES = {"user": "user", "system": "system", "developer": "system", "assistant": "assistant"}
_MOST_METADATA = 16
_STORES_NOTHING = "nothing is stored here; send the whole conversation as 'input'"
_RUNS_NOTHING = "this server runs no tools of its own; declare those of yours as type function"


def read_input(value: Any, where: str) -> list[dict[str, Any]]:
    """A text or items, as a chat's messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise BadField(f"'{where}' must be a string or a list of at least one item", where, "invalid_type")
    if len(value) > MOST_MESSAGES:
        raise BadField(f"'{where}' may have {MOST_MESSAGES} items at most", where, "array_above_max_length")
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(value):
        place = f"{where}[{i}]"
        if not isinstance(item, dict):
            raise BadField(f"'{place}' must be an object", place, "invalid_type")
        kind = item.get("type") or "message"
        read = _ITEMS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise BadField(
                f"'{place}.type' is '{str(kind)[:64]}' and must be one of {', '.join(_ITEMS)}: {_RUNS_NOTHING}",
                f"{place}.type",
                "unsupported_value",
            )
        read(item, place, messages)
    if not messages:
        raise BadField(f"'{where}' has nothing to answer", where, "invalid_value")
    return messages


def _message(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    given = item.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadField(f"'{where}.role' must be one of {', '.join(_ROLES)}", f"{where}.role", "invalid_value")
    if item.get("content") is None:
        raise BadField(f"'{where}.content' is missing", f"{where}.content", "missing")
    messages.append({"role": role, "content": read_content(item["content"], f"{where}.content")})


def _call(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    """Calls that follow each other, or the words before them, are one message of the assistant's."""
    id, name, arguments = (_text(item, field, where) for field in ("call_id", "name", "arguments"))
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _call_output(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    if item.get("output") is None:
        raise BadField(f"'{where}.output' is missing", f"{where}.output", "missing")
    output = read_content(item["output"], f"{where}.output")
    messages.append({"role": "tool", "content": output, "tool_call_id": _text(item, "call_id", where)})


def _nothing(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    """What the model thought before is its own affair."""


_ITEMS: Mapping[str, Callable[[Mapping[str, Any], str, list[dict[str, Any]]], None]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _call_output,
    "reasoning": _nothing,
}


def _text(item: Mapping[str, Any], field: str, where: str) -> str:
    value = item.get(field)
    if not isinstance(value, str):
        raise BadField(f"'{where}.{field}' must be a string", f"{where}.{field}", "missing")
    return value


def _tool(value: Any, where: str) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "function":
        raise BadField(f"'{where}.type' is '{str(kind)[:64]}': {_RUNS_NOTHING}", f"{where}.type", "unsupported_value")
    return fields.function_tool(value, where)


def read_tool_choice(value: Any, where: str) -> Any:
    if value in ("none", "auto", "required"):
        return value
    kind, name = (value.get("type"), value.get("name")) if isinstance(value, dict) else (None, None)
    if kind == "function" and isinstance(name, str):
        return {"type": "function", "function": {"name": name}}
    raise BadField(
        f'\'{where}\' must be none, auto, required or {{"type": "function", "name": …}}', where, "invalid_value"
    )


def read_text(value: Any, where: str) -> dict[str, Any] | None:
    """The format of the answer, as a chat has it; None for words."""
    format = value.get("format") or {"type": "text"} if isinstance(value, dict) else None
    if not isinstance(format, dict):
        raise BadField(f"'{where}' must be an object, and so its format", where, "invalid_type")
    match format.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema":
            return fields.schema_format(check_schema(format.get("schema"), f"{where}.format.schema"))
    place = f"{where}.format.type"
    raise BadField(f"'{place}' must be text, json_object or json_schema", place, "invalid_value")


_effort = fields.one_of("none", "minimal", "low", "medium", "high", "xhigh")


def read_reasoning(value: Any, where: str) -> str | None:
    """The effort. That a summary is wanted has no effect: what the model thinks is shown as it is."""
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object", where, "invalid_type")
    effort = value.get("effort")
    return None if effort is None else _effort(effort, f"{where}.effort")


def read_include(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(one in _INCLUDES for one in value):
        raise BadField(f"'{where}' must be a list of {', '.join(_INCLUDES)}", where, "invalid_value")
    return value


def read_metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BadField(f"'{where}' must be an object of strings", where, "invalid_type")
    if len(value) > _MOST_METADATA:
        raise BadField(f"'{where}' may have {_MOST_METADATA} entries at most", where, "object_above_max_properties")
    return value


CHECKS: Mapping[str, fields.Check] = {
    **{name: check for name, check in fields.OUTER.items() if name != "n"},
    **{name: check for name, check in fields.SAMPLING.items() if name != "max_tokens"},
    "input": read_input,
    "instructions": fields.text(),
    "max_output_tokens": fields.integer(1, fields.MOST_TOKENS),
    "tools": fields.tool_list(_tool),
    "tool_choice": read_tool_choice,
    "parallel_tool_calls": fields.boolean,
    "text": read_text,
    "reasoning": read_reasoning,
    "include": read_include,
    "top_logprobs": fields.integer(0, fields.MOST_TOP_LOGPROBS),
    "metadata": read_metadata,
    "chat_template_kwargs": fields.template_kwargs,
    "truncation": fields.one_of("auto", "disabled"),  # auto is leave to shorten, of which no use is made
    "background": fields.unless_harmless(lambda v: v is False, "an answer is not kept for whoever comes back for it"),
    "previous_response_id": fields.refused(_STORES_NOTHING),
    "conversation": fields.refused(_STORES_NOTHING),
    "prompt": fields.refused("no templates of prompts are kept here"),
    "moderation": fields.refused("nothing is moderated here"),
    "context_management": fields.unless_harmless(lambda v: v == [], "the context is not compacted here"),
    **dict.fromkeys(
        ("user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
         "prompt_cache_options", "max_tool_calls", "stream_options"), fields.anything
    ),
}  # fmt: skip
# Ours → the chat's, as engines know it.
_ASKED = {
    **{name: name for name in fields.SAMPLING if name != "max_tokens"},
    "max_output_tokens": "max_tokens",
    "tools": "tools",
    "tool_choice": "tool_choice",
    "parallel_tool_calls": "parallel_tool_calls",
    "text": "response_format",
    "reasoning": "reasoning_effort",
    "chat_template_kwargs": "chat_template_kwargs",
}


def read_response(said: Mapping[str, Any]) -> dict[str, Any]:
    """The body, checked. Raises BadField."""
    body = fields.read(said, CHECKS)
    for name in ("model", "input"):
        if name not in body:
            raise BadField(f"'{name}' is missing", name, "missing")
    choice = body.get("tool_choice", "auto")
    names = [tool["function"]["name"] for tool in body.get("tools", ())]
    if isinstance(choice, Mapping) and choice["function"]["name"] not in names:
        name = choice["function"]["name"][:64]
        raise BadField(f"'tool_choice' names '{name}', which is not in 'tools'", "tool_choice", "invalid_value")
    if choice == "required" and not names:
        raise BadField("'tool_choice' needs 'tools'", "tool_choice", "invalid_value")
    if len(set(names)) < len(names):
        raise BadField("'tools' has two of one name", "tools", "invalid_value")
    return body


def wanted_logprobs(body: Mapping[str, Any]) -> int | None:
    """How many alternatives are told with each token; None where not even the token's own probability is."""
    tops: int = body.get("top_logprobs", 0)
    return tops if tops or LOGPROBS in body.get("include", ()) else None


def response_job(body: Mapping[str, Any], adapter: str) -> Job:
    messages: list[dict[str, Any]] = body["input"]
    if instructions := body.get("instructions"):
        # With what the system says next, in one: many templates take one such message, at the beginning.
        first = messages[0]
        rest = messages[1:] if first["role"] == "system" else messages
        words = f"{instructions}\n\n{first['content']}" if first["role"] == "system" else instructions
        messages = [{"role": "system", "content": words}, *rest]
    asked: dict[str, Any] = {"messages": messages}  # first: requests that begin alike have the same first bytes
    asked |= {theirs: body[ours] for ours, theirs in _ASKED.items() if ours in body}
    if (tops := wanted_logprobs(body)) is not None:
        asked |= {"logprobs": True, "top_logprobs": tops}
    return Job("chat", asked, adapter)
