"""Answers in JSON as a grammar of llguidance, for engines that have it built in. Knows no engine.

llama.cpp's own grammars are made from a schema as well, but one that is made to hurt takes exponential time at each
token, on the thread that generates for everybody. llguidance bounds what it does, and says what it cannot do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import llguidance
import orjson

from doorstep.errors import InvalidArgument

# An answer cannot be white space for ever. Compact: as most JSON on one line is written.
_FREE = {"whitespace_pattern": r"[\n ]{0,16}"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LONGEST_REASON = 300
_COSTLY = frozenset(
    ("$ref", "pattern", "patternProperties", "format", "minLength", "maxLength", "minItems", "maxItems", "minimum",
     "maximum", "exclusiveMinimum", "exclusiveMaximum")
)  # fmt: skip
_MOST_ALTERNATIVES = 32


def json_grammar(schema: Mapping[str, Any], *, compact: bool = False) -> str:
    """`compact`: on one line. Raises InvalidArgument for a schema that is none, that nothing fits, or that cannot be
    enforced."""
    text = orjson.dumps({**schema, "x-guidance": _COMPACT if compact else _FREE}).decode()
    grammar = f"%llguidance {{}}\nstart: %json {text}"
    error = llguidance.LLMatcher.validate_grammar(grammar)
    if error:
        reason = error.partition("\n")[0].partition("failed to compile JSON schema: ")
        raise InvalidArgument(f"the JSON schema cannot be used: {(reason[2] or reason[0])[:_LONGEST_REASON]}")
    return grammar


def is_plain(schema: Any) -> bool:
    """Whether an engine may make a grammar of its own of it, which costs little then: no references, no patterns, no
    counts, few alternatives."""
    alternatives = 0
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            if not _COSTLY.isdisjoint(node):
                return False
            alternatives += sum(
                len(node[key]) for key in ("anyOf", "oneOf", "allOf") if isinstance(node.get(key), list)
            )
            names = node.get("properties")
            left += [value for key, value in node.items() if key != "properties"]
            left += names.values() if isinstance(names, dict) else []
    return alternatives <= _MOST_ALTERNATIVES
