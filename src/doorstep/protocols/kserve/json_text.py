"""Reads JSON as Triton does: NaN and Infinity are numbers, and errors are in rapidjson's words. Knows no model."""

from __future__ import annotations

import json
import re
from typing import Any

import orjson

from doorstep.errors import Internal, InvalidArgument

MAX_DEPTH = 100  # what Triton allows; below what the parsers bear
TOO_DEEP = f"JSON nesting depth exceeds maximum allowed limit ({MAX_DEPTH})"

# A string that is not closed goes on to the end, and nothing is tried twice: the time is linear for any text.
_STRINGS_AND_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_EXPLAINED_BYTES = 65_536  # a longer text that does not parse gets a plain answer

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_AFTER_MEMBER = "'}' after an object member."
_AFTER_ELEMENT = "']' after an array element."
_RAPIDJSON = {
    "Expecting value": "Invalid value.",
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Illegal trailing comma before end of object": "Missing a name for object member.",
    "Illegal trailing comma before end of array": "Invalid value.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Extra data": "The document root must not be followed by other values.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
    "Invalid control character at": "Invalid encoding in string.",
    "Invalid \\escape": "Invalid escape character in string.",
    "Invalid \\uXXXX escape": "Incorrect hex digit after \\u escape in string.",
}


def loads(text: bytes) -> Any:
    """The value of a request's JSON. Raises Internal where it does not parse, InvalidArgument where it is too deep."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return _second_reading(text, error)


def _second_reading(text: bytes, error: orjson.JSONDecodeError) -> Any:
    if text.count(b"[") + text.count(b"{") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise InvalidArgument(TOO_DEEP) from None
    if text.startswith(_BYTE_ORDER_MARK):
        return loads(text[len(_BYTE_ORDER_MARK) :])
    if b"NaN" in text or b"Infinity" in text:
        try:
            return json.loads(text.decode())
        except (ValueError, RecursionError):
            pass
    raise Internal(f"failed to parse the request JSON buffer: {_explain(text, error)}") from None


def _explain(text: bytes, error: orjson.JSONDecodeError) -> str:
    if not text.strip():
        return f"The document is empty. at {len(text)}"
    what, position = "", error.pos
    if len(text) <= _EXPLAINED_BYTES:
        try:
            json.loads(text.decode())
        except UnicodeDecodeError as found:
            what, position = "Invalid encoding in string.", found.start
        except json.JSONDecodeError as found:
            position = found.pos
            what = _RAPIDJSON.get(found.msg.removesuffix(":"), "")
            if found.msg.startswith("Expecting ',' delimiter"):
                inside_object = _innermost(text, position) == ord("{")
                what = f"Missing a comma or {_AFTER_MEMBER if inside_object else _AFTER_ELEMENT}"
            elif found.msg.startswith("Expecting value"):
                position += _begun_literal(text, position)
            elif found.msg.startswith("Invalid control") and text[position : position + 1] == b"\0":
                what = _RAPIDJSON["Unterminated string starting at"]
        except (ValueError, RecursionError):
            pass
        else:  # what Python bears and others do not
            number = text[position : position + 1] in b"-0123456789"
            what = "Number too big to be stored in double." if number else "The surrogate pair in string is invalid."
    return f"{what or 'Invalid value.'} at {position}"


def _begun_literal(text: bytes, position: int) -> int:
    """How many bytes at `position` begin null, true or false."""
    word = next((w for w in (b"null", b"true", b"false") if w[:1] == text[position : position + 1]), b"")
    count = 0
    while count < len(word) and text[position + count : position + count + 1] == word[count : count + 1]:
        count += 1
    return count


def depth(text: bytes) -> int:
    """How deep its arrays and objects nest; brackets inside strings do not count."""
    deepest = now = 0
    for match in _STRINGS_AND_BRACKETS.finditer(text):
        first = text[match.start()]
        if first in b"[{":
            now += 1
            deepest = max(deepest, now)
        elif first in b"]}":
            now -= 1
    return deepest


def _innermost(text: bytes, end: int) -> int:
    """The bracket that is open just before `end`."""
    opened: list[int] = []
    for match in _STRINGS_AND_BRACKETS.finditer(text, 0, end):
        first = text[match.start()]
        if first in b"[{":
            opened.append(first)
        elif first in b"]}" and opened:
            opened.pop()
    return opened[-1] if opened else 0
