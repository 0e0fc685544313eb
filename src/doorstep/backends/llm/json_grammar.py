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

# An answer cannot be white space for ever. Compact: as models have seen most JSON written on one line.
_FREE = {"whitespace_pattern": r"[\n ]{0,16}"}
_COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LONGEST_REASON = 300
_UNBOUNDED = frozenset(("pattern", "format", "minLength", "maxLength", "minItems", "maxItems"))


def json_grammar(schema: Mapping[str, Any], *, compact: bool = False) -> str:
    """`compact`: on one line. Raises InvalidArgument for a schema that is none, that nothing fits, or that cannot be enforced."""
    text = orjson.dumps({**schema, "x-guidance": _COMPACT if compact else _FREE}).decode()
    grammar = f"%llguidance {{}}\nstart: %json {text}"
    error = llguidance.LLMatcher.validate_grammar(grammar)
    if error:
        reason = error.partition("\n")[0].partition("failed to compile JSON schema: ")
        raise InvalidArgument(f"the JSON schema cannot be used: {(reason[2] or reason[0])[:_LONGEST_REASON]}")
    return grammar


def for_a_grammar_of_its_own(schema: Any) -> Any:
    """The schema without what makes an engine's own grammars large: for what need not be enforced."""
    if isinstance(schema, dict):
        return {key: for_a_grammar_of_its_own(value) for key, value in schema.items() if key not in _UNBOUNDED}
    if isinstance(schema, list):
        return [for_a_grammar_of_its_own(one) for one in schema]
    return schema
