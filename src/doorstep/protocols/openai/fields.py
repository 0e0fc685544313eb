"""What a body may say: each field with its check, and nothing else gets to an engine. Pure; knows no engine.

Engines are native code that was written to trust its caller; so every field is named here, with its type and range, and
what is not named is refused (security-minded readers: CVE-2025-48942, CVE-2025-62426, CVE-2026-21869, CVE-2026-34756).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from doorstep.protocols.openai.errors import BadField
from doorstep.protocols.openai.schema import check_schema

MOST_CHOICES = 8
MOST_STOPS = 16
LONGEST_STOP = 256
MOST_BIASES = 300
MOST_TOP_LOGPROBS = 20
MOST_TOOLS = 128
MOST_TOOL_BYTES = 512 * 1024  # of all tools together
MOST_TOKENS = 10_000_000
LONGEST_DESCRIPTION = 64 * 1024
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}").fullmatch

Check = Callable[[Any, str], Any]  # (value, where) → what the engine gets; raises BadField


def integer(least: int, most: int) -> Check:
    def check(value: Any, where: str) -> int:
        if type(value) is not int:
            raise BadField(f"'{where}' must be an integer", where, "invalid_type")
        if not least <= value <= most:
            raise BadField(f"'{where}' must be between {least} and {most}, and is {value}", where, "invalid_value")
        return value

    return check


def number(least: float, most: float) -> Check:
    def check(value: Any, where: str) -> float:
        if type(value) not in (int, float):
            raise BadField(f"'{where}' must be a number", where, "invalid_type")
        if not math.isfinite(value) or not least <= value <= most:
            raise BadField(f"'{where}' must be between {least:g} and {most:g}, and is {value}", where, "invalid_value")
        return float(value)

    return check


def boolean(value: Any, where: str) -> bool:
    if type(value) is not bool:
        raise BadField(f"'{where}' must be true or false", where, "invalid_type")
    return value


def text(longest: int = 1 << 30) -> Check:
    def check(value: Any, where: str) -> str:
        if type(value) is not str:
            raise BadField(f"'{where}' must be a string", where, "invalid_type")
        if len(value) > longest:
            raise BadField(f"'{where}' is longer than {longest} characters", where, "string_above_max_length")
        return value

    return check


def one_of(*choices: str) -> Check:
    def check(value: Any, where: str) -> str:
        if value not in choices:
            raise BadField(f"'{where}' must be one of {', '.join(choices)}", where, "invalid_value")
        return str(value)

    return check


def anything(value: Any, where: str) -> None:
    """Accepted, and without effect here: it says what somebody else is to do with the answer."""


def refused(why: str) -> Check:
    def check(value: Any, where: str) -> Any:
        raise BadField(f"'{where}' is not supported: {why}", where, "unsupported_parameter")

    return check


def unless_harmless(harmless: Callable[[Any], bool], why: str) -> Check:
    """For what is refused but in the value that means nothing."""
    no = refused(why)

    def check(value: Any, where: str) -> None:
        if not harmless(value):
            no(value, where)

    return check


def stops(value: Any, where: str) -> list[str]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(stop, str) for stop in given):
        raise BadField(f"'{where}' must be a string or a list of strings", where, "invalid_type")
    if len(given) > MOST_STOPS:
        raise BadField(f"'{where}' may have {MOST_STOPS} strings at most", where, "array_above_max_length")
    if any(not stop or len(stop) > LONGEST_STOP for stop in given):
        raise BadField(f"'{where}' has an empty string, or one of over {LONGEST_STOP} characters", where)
    return given


def biases(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object of token ids and biases", where, "invalid_type")
    if len(value) > MOST_BIASES:
        raise BadField(f"'{where}' may have {MOST_BIASES} entries at most", where, "object_above_max_properties")
    found = {}
    for token, bias in value.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise BadField(f"'{where}' has the key '{token[:20]}', which is no token id", where, "invalid_value")
        found[token] = number(-100, 100)(bias, f"{where}.{token}")
    return found


def response_format(value: Any, where: str) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind == "json_schema":
        wanted = value.get("json_schema")
        if not isinstance(wanted, dict):
            raise BadField(f"'{where}.json_schema' must be an object", f"{where}.json_schema", "missing")
        return {
            "type": "json_schema",
            "json_schema": {"schema": check_schema(wanted.get("schema", {}), f"{where}.json_schema.schema")},
        }
    raise BadField(f"'{where}.type' must be text, json_object or json_schema", f"{where}.type", "invalid_value")


def structured_outputs(value: Any, where: str) -> dict[str, Any]:
    """vLLM's extension, as far as every engine can: {"json": schema}."""
    if isinstance(value, dict) and list(value) == ["json"]:
        return schema_format(check_schema(value["json"], f"{where}.json"))
    raise BadField(f"'{where}' must be an object with 'json', a schema, and nothing else", where, "invalid_value")


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def template_kwargs(value: Any, where: str) -> dict[str, Any]:
    """What a chat template may be told; not anything, as templates are programs."""
    allowed = {
        "enable_thinking": boolean,
        "thinking": boolean,
        "reasoning_effort": one_of("none", "low", "medium", "high"),
    }
    if not isinstance(value, dict):
        raise BadField(f"'{where}' must be an object", where, "invalid_type")
    for key in value:
        if key not in allowed:
            raise BadField(f"'{where}' may have {', '.join(allowed)}, not '{key[:40]}'", where, "invalid_value")
    return {key: allowed[key](given, f"{where}.{key}") for key, given in value.items()}


def tool_list(read: Check) -> Check:
    """Of a list of tools, each of which `read` makes as engines are told of it; None for an empty one."""

    def check(value: Any, where: str) -> list[dict[str, Any]] | None:
        if not isinstance(value, list) or len(value) > MOST_TOOLS:
            raise BadField(f"'{where}' must be a list of at most {MOST_TOOLS} tools", where, "invalid_type")
        made = []
        left = MOST_TOOL_BYTES
        for i, tool in enumerate(value):
            made.append(read(tool, f"{where}[{i}]"))
            left -= len(orjson.dumps(made[-1]))
            if left < 0:
                raise BadField(f"'{where}' is larger than {MOST_TOOL_BYTES} bytes", where, "schema_too_large")
        return made or None

    return check


def _tool(value: Any, where: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict):
        raise BadField(f'\'{where}\' must be {{"type": "function", "function": {{…}}}}', where, "invalid_value")
    return function_tool(function, f"{where}.function")


def function_tool(function: Mapping[str, Any], where: str, schema: str = "parameters") -> dict[str, Any]:
    """A tool as engines are told of it; APIs differ in what is around a function, and in the name of its schema."""
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME(name):
        raise BadField(f"'{where}.name' must be 1 to 64 letters, digits, '_', '-' or '.'", f"{where}.name")
    made: dict[str, Any] = {"name": name}
    if function.get("description") is not None:
        made["description"] = text(LONGEST_DESCRIPTION)(function["description"], f"{where}.description")
    if function.get(schema) is not None:
        made["parameters"] = check_schema(function[schema], f"{where}.{schema}")
    return {"type": "function", "function": made}


tools = tool_list(_tool)


def tool_choice(value: Any, where: str) -> Any:
    if value in ("none", "auto", "required"):
        return value
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return {"type": "function", "function": {"name": function["name"]}}
    raise BadField(f"'{where}' must be none, auto, required or a function by name", where, "invalid_value")


# What every generation may say.
SAMPLING: Mapping[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "max_tokens": integer(1, MOST_TOKENS),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": stops,
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": biases,
    # Extensions, by vLLM's names
    "top_k": integer(-1, 1_000_000),
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 10),
    "ignore_eos": boolean,
}
# Of the request itself; the front reads them, the engine does not.
OUTER: Mapping[str, Check] = {
    "model": text(512),
    "n": integer(1, MOST_CHOICES),
    "stream": boolean,
    "priority": integer(0, 2**31),
}
WITHOUT_EFFECT: Mapping[str, Check] = dict.fromkeys(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "prompt_cache_options", "prediction", "verbosity"), anything
)  # fmt: skip


def read(body: Mapping[str, Any], checks: Mapping[str, Check]) -> dict[str, Any]:
    """The fields of `body`, checked; those that are null, or without effect, are left out. Raises BadField."""
    found: dict[str, Any] = {}
    for name, value in body.items():
        check = checks.get(name)
        if check is None:
            raise BadField(f"Unrecognized request argument supplied: {name[:100]}", name[:100], "unknown_parameter")
        if value is None:
            continue
        checked = check(value, name)
        if checked is not None:
            found[name] = checked
    return found


def document(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """The JSON object in a body. Raises BadField."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadField(f"the body is not JSON: {error}", None, "invalid_json") from None
    if not isinstance(said, dict):
        raise BadField("the body must be a JSON object", None, "invalid_json")
    return said
