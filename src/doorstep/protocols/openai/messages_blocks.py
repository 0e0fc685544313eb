"""Anthropic's messages, tools and choice of tools, checked and made into a chat's. Pure; knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from doorstep.protocols.openai import fields
from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.messages_in import MOST_MESSAGES, MOST_PARTS
from doorstep.protocols.openai.schema import check_schema

_RUNS_NOTHING = "this server runs no tools of its own; declare yours with a name and an input_schema"
# role → the types of blocks that it may have
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}
_NOT_TEXT = ("image", "document", "search_result", "container_upload")


def read_system(value: Any, where: str) -> str | None:
    return _text(value, where) or None


def read_messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadField(f"'{where}' must be a list of at least one message", where)
    if len(value) > MOST_MESSAGES:
        raise BadField(f"'{where}' may have {MOST_MESSAGES} messages at most", where)
    made: list[dict[str, Any]] = []
    for i, message in enumerate(value):
        for one in _message(message, f"{where}[{i}]"):
            before = made[-1] if made else one
            if before is not one and one["role"] == before["role"] == "user":  # turns of one side are one turn
                before["content"] += "\n" + one["content"]
            else:
                made.append(one)
    return made


def _message(value: Any, where: str) -> list[dict[str, Any]]:
    """A user's results of tools are messages of their own."""
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object", where)
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _BLOCKS:
        raise BadField(f"'{where}.role' must be one of {', '.join(_BLOCKS)}", f"{where}.role")
    if content is None:
        raise BadField(f"'{where}.content' is missing", f"{where}.content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    blocks = _blocks(content, f"{where}.content", _BLOCKS[role])
    words = "".join(block["text"] for block, _ in blocks if block["type"] == "text")
    said: dict[str, Any] = {"role": role, "content": words}
    if role == "assistant":
        if calls := [_call(block, place) for block, place in blocks if block["type"] == "tool_use"]:
            said["tool_calls"] = calls
        if thoughts := [_field(block, "thinking", place) for block, place in blocks if block["type"] == "thinking"]:
            said["reasoning_content"] = "".join(thoughts)
        return [said]
    results = [_result(block, place) for block, place in blocks if block["type"] == "tool_result"]
    return [*results, said] if words or not results else results


def _blocks(value: Any, where: str, types: tuple[str, ...]) -> list[tuple[dict[str, Any], str]]:
    """Each with its place. Those of type text have a text."""
    if not isinstance(value, list) or len(value) > MOST_PARTS:
        raise BadField(f"'{where}' must be a string or a list of blocks", where)
    found = []
    for i, block in enumerate(value):
        place = f"{where}[{i}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind in _NOT_TEXT:
            raise BadField(f"'{place}' is of type {kind}: the model takes text only", place, "unsupported_content")
        if kind not in types:
            raise BadField(f"'{place}.type' must be one of {', '.join(types)}", f"{place}.type")
        if kind == "text":
            _field(block, "text", place)
        found.append((block, place))
    return found


def _text(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    return "".join(block["text"] for block, _ in _blocks(value, where, ("text",)))


def _field(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise BadField(f"'{where}.{name}' must be a string", f"{where}.{name}")
    return value


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    id, name, input = _field(block, "id", where), _field(block, "name", where), block.get("input")
    if not isinstance(input, dict):
        raise BadField(f"'{where}.input' must be an object", f"{where}.input")
    return {"id": id, "type": "function", "function": {"name": name, "arguments": orjson.dumps(input).decode()}}


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    text = "" if content is None else _text(content, f"{where}.content")
    if not text and block.get("is_error"):
        text = "error"  # a chat has no other place to say so
    return {"role": "tool", "content": text, "tool_call_id": _field(block, "tool_use_id", where)}


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    made: list[dict[str, Any]] | None = _tools(value, where)
    if made is not None and len({tool["function"]["name"] for tool in made}) < len(made):
        raise BadField(f"'{where}' has two of one name", where)
    return made


def _tool(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object", where)
    kind = value.get("type") or "custom"
    if kind != "custom":
        raise BadField(f"'{where}.type' is '{str(kind)[:64]}': {_RUNS_NOTHING}", f"{where}.type")
    if value.get("input_schema") is None:
        raise BadField(f"'{where}.input_schema' is missing", f"{where}.input_schema")
    return fields.function_tool(value, where, "input_schema")


_tools = fields.tool_list(_tool)


def read_tool_choice(value: Any, where: str) -> dict[str, Any]:
    """`tool_choice`, and where it is said `parallel_tool_calls`, as a chat has them."""
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "auto" | "none":
            choice: Any = kind
        case "any":
            choice = "required"
        case "tool":
            choice = {"type": "function", "function": {"name": _field(value, "name", where)}}
        case _:
            raise BadField(f"'{where}.type' must be auto, any, tool or none", f"{where}.type")
    alone = value.get("disable_parallel_tool_use")
    if alone is not None and fields.boolean(alone, f"{where}.disable_parallel_tool_use"):
        return {"tool_choice": choice, "parallel_tool_calls": False}
    return {"tool_choice": choice}


def read_thinking(value: Any, where: str) -> dict[str, bool]:
    """As templates are told of it. How long the model may think has no effect: templates know no number."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in ("enabled", "adaptive", "disabled"):
        raise BadField(f"'{where}.type' must be enabled, adaptive or disabled", f"{where}.type")
    return {"enable_thinking": kind != "disabled"}


_effort = fields.one_of("low", "medium", "high", "xhigh")


def read_output_config(value: Any, where: str) -> dict[str, Any]:
    """`reasoning_effort` and `response_format`, as far as they are said."""
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object", where)
    made: dict[str, Any] = {}
    if (effort := value.get("effort")) is not None:
        made["reasoning_effort"] = _effort(effort, f"{where}.effort")
    if (format := value.get("format")) is not None:
        if not isinstance(format, dict) or format.get("type") != "json_schema":
            raise BadField(f"'{where}.format.type' must be json_schema", f"{where}.format.type")
        made["response_format"] = fields.schema_format(check_schema(format.get("schema"), f"{where}.format.schema"))
    return made
