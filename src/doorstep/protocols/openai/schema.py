"""Bounds for JSON schemas that clients send: engines compile them, which takes time that clients choose. Pure.

While an engine compiles one, its other requests may stand still; where it makes a grammar of it, one that nothing fits
may take all memory there is. OpenAI's own bounds are much the same (guide "Structured outputs").
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from doorstep.protocols.openai.errors import BadField

MOST_BYTES = 64 * 1024
MOST_DEPTH = 64
MOST_NODES = 5000
LONGEST_PATTERN = 512
MOST_PATTERNS = 16 * LONGEST_PATTERN  # characters of all patterns together
MOST_REPEATS = 2000  # of items, characters, or what a pattern repeats
MOST_VALUES = 1000  # of all enumerations together
MOST_OPTIONAL = 500  # properties of one object that may be left out
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")
_WIDE = re.compile(r"\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|(\\.)|([^\x00-\x7f])", re.DOTALL)


def check_schema(schema: Any, where: str) -> Any:
    """The schema itself. Raises BadField for one that is none, or beyond the bounds."""
    if not isinstance(schema, dict):
        raise BadField(f"'{where}' must be a JSON schema, an object", where, "invalid_type")
    if _size(schema) > MOST_BYTES:
        raise BadField(f"'{where}' is larger than {MOST_BYTES} bytes", where, "schema_too_large")
    nodes = values = patterns = 0
    left: list[tuple[Any, int]] = [(schema, 1)]
    while left:
        node, depth = left.pop()
        nodes += 1
        if depth > MOST_DEPTH or nodes > MOST_NODES:
            limits = f"{MOST_DEPTH} levels and {MOST_NODES} parts"
            raise BadField(f"'{where}' is deeper or larger than {limits}", where, "schema_too_large")
        if isinstance(node, dict):
            patterns += sum(map(len, _patterns(node)))
            if patterns > MOST_PATTERNS:
                why = f"has patterns of over {MOST_PATTERNS} characters together"
                raise BadField(f"'{where}' {why}", where, "schema_too_large")
            _check_node(node, where)
            values += len(node["enum"]) if isinstance(node.get("enum"), list) else 0
            if values > MOST_VALUES:
                raise BadField(f"'{where}' enumerates over {MOST_VALUES} values", where, "schema_too_large")
            left += [(child, depth + 1) for child in node.values() if isinstance(child, dict | list)]
        else:
            left += [(child, depth + 1) for child in node if isinstance(child, dict | list)]
    return schema


def _size(schema: dict[str, Any]) -> int:
    try:
        return len(orjson.dumps(schema))
    except orjson.JSONEncodeError:  # deeper than it goes
        return MOST_BYTES + 1


def _patterns(node: dict[str, Any]) -> list[str]:
    own, of_names = node.get("pattern"), node.get("patternProperties")
    return [*filter(_is_text, (own,)), *(of_names if isinstance(of_names, dict) else ())]


def _check_node(node: dict[str, Any], where: str) -> None:
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise BadField(f"'{where}' refers to '{reference[:80]}': only references into itself (#/…) are followed", where)
    for key in _COUNTS:
        count = node.get(key)
        if isinstance(count, int | float) and not 0 <= count <= MOST_REPEATS:
            raise BadField(f"'{where}' has a {key} of {count}; {MOST_REPEATS} at most", where, "schema_too_large")
    for kind in ("Items", "Length", "Properties"):
        least, most = node.get(f"min{kind}"), node.get(f"max{kind}")
        if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
            raise BadField(f"'{where}' has a min{kind} of {least} and a max{kind} of {most}: nothing fits", where)
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict) and len(properties) > MOST_OPTIONAL:
        needed = set(filter(_is_text, required)) if isinstance(required, list) else set()
        if len(properties.keys() - needed) > MOST_OPTIONAL:
            raise BadField(f"'{where}' has over {MOST_OPTIONAL} properties that are not required", where,
                           "schema_too_large")  # fmt: skip
    for pattern in _patterns(node):
        _check_pattern(pattern, where)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _check_pattern(pattern: str, where: str) -> None:
    if len(pattern) > LONGEST_PATTERN:
        raise BadField(f"'{where}' has a pattern of over {LONGEST_PATTERN} characters", where, "schema_too_large")
    product = 1
    for least, most in _REPEATS.findall(pattern):
        product *= max(int((least or "0")[:9]), int((most or "0")[:9]), 1)
    if product > MOST_REPEATS:
        raise BadField(
            f"'{where}' has a pattern that repeats more than {MOST_REPEATS} times", where, "schema_too_large"
        )
    try:
        re.compile(_WIDE.sub(_narrow, pattern).encode("latin-1"))
    except (re.error, OverflowError, RecursionError) as error:
        raise BadField(f"'{where}' has a pattern that is no regular expression: {error}", where) from None


def _narrow(found: re.Match[str]) -> str:
    """A character that a byte cannot be, as the last one that can: a class of wide ones takes `re` milliseconds."""
    if found[3] is not None:  # any other escape
        return found[3] if found[3].isascii() else "\\xff"
    code = int(found[1] or found[2], 16) if found[4] is None else ord(found[4])
    return f"\\x{min(code, 255):02x}"
