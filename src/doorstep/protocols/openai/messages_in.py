"""The messages of a chat, checked and made plain: texts by role, calls of tools and their results. Pure."""

from __future__ import annotations

from typing import Any

from doorstep.protocols.openai.errors import BadField

MOST_MESSAGES = 1000
MOST_PARTS = 1000
MOST_CALLS = 128
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def read_messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadField(f"'{where}' must be a list of at least one message", where, "invalid_type")
    if len(value) > MOST_MESSAGES:
        raise BadField(f"'{where}' may have {MOST_MESSAGES} messages at most", where, "array_above_max_length")
    return [_message(message, f"{where}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object", where, "invalid_type")
    given = value.get("role")
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise BadField(f"'{where}.role' must be one of {', '.join(_ROLES)}", f"{where}.role", "invalid_value")
    made: dict[str, Any] = {"role": role, "content": read_content(value.get("content"), f"{where}.content")}
    if role == "assistant":
        if calls := value.get("tool_calls"):
            made["tool_calls"] = _calls(calls, f"{where}.tool_calls")
        elif value.get("content") is None:
            raise BadField(f"'{where}' needs content or tool_calls", f"{where}.content", "missing")
        reasoning = value.get("reasoning_content")
        if isinstance(reasoning, str):
            made["reasoning_content"] = reasoning
    elif value.get("content") is None:
        raise BadField(f"'{where}.content' is missing", f"{where}.content", "missing")
    if role == "tool":
        if not isinstance(value.get("tool_call_id"), str):
            raise BadField(f"'{where}.tool_call_id' is missing", f"{where}.tool_call_id", "missing")
        made["tool_call_id"] = value["tool_call_id"]
    return made


def read_content(value: Any, where: str) -> str:
    """A text, or parts that are texts, as one."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) > MOST_PARTS:
        raise BadField(f"'{where}' must be a string or a list of parts", where, "invalid_type")
    return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return str(part["refusal"])
    if kind in ("image_url", "input_image", "input_audio", "file", "input_file"):
        raise BadField(f"'{where}' is of type {kind}: the model takes text only", where, "unsupported_content")
    raise BadField(f"'{where}' must be a part of type text", where, "invalid_value")


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MOST_CALLS:
        raise BadField(f"'{where}' must be a list of at most {MOST_CALLS} calls", where, "invalid_type")
    made = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadField(f"'{where}[{i}].function.name' is missing", f"{where}[{i}].function.name", "missing")
        arguments = function.get("arguments", "{}")
        if not isinstance(arguments, str):
            raise BadField(f"'{where}[{i}].function.arguments' must be a string", f"{where}[{i}].function.arguments")
        id = call.get("id") if isinstance(call.get("id"), str) else f"call_{i}"
        made.append({"id": id, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made
