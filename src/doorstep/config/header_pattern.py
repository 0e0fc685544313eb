"""--http-header-forward-pattern: a regular expression as RE2, Triton's, reads it, made into one of Python's. Pure.

Python's patterns can take for ever where RE2's cannot. What RE2 does not know, and a repetition inside a repetition,
the plainest way to get there, are refused when the server starts.
"""

from __future__ import annotations

import re
from typing import Any

from doorstep.errors import InvalidArgument

_parser: Any = re._parser  # type: ignore[attr-defined]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """`pattern` as RE2 would read it, with `(?i)` before it. Raises InvalidArgument for what RE2, or we, refuse."""
    flags = re.IGNORECASE
    text = pattern
    while text.startswith(("(?i)", "(?-i)")):
        flags = re.IGNORECASE if text.startswith("(?i)") else re.RegexFlag(0)
        text = text.partition(")")[2]
    try:
        compiled = re.compile(text, flags)
        parsed = _parser.parse(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidArgument(f"'{pattern}' is not a regular expression: {error}") from None
    _check(pattern, parsed, repeated=False)
    return compiled


_REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})
_NOT_IN_RE2 = {
    "GROUPREF": "a back reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ASSERT": "a look ahead or behind",
    "ASSERT_NOT": "a look ahead or behind",
    "ATOMIC_GROUP": "an atomic group",
}


def _check(pattern: str, parsed: Any, *, repeated: bool) -> None:
    for operator, argument in parsed:
        name = str(operator)
        if name in _NOT_IN_RE2:
            raise InvalidArgument(f"'{pattern}' has {_NOT_IN_RE2[name]}, which RE2, Triton's, does not know")
        inside = repeated
        if name in _REPEATS:
            if repeated and argument[1] > 1:
                raise InvalidArgument(
                    f"'{pattern}' has a repetition inside a repetition, which can take for ever to match; "
                    "write it without one"
                )
            inside = repeated or argument[1] > 1
        for part in _parts(argument):
            _check(pattern, part, repeated=inside)


def _parts(argument: Any) -> list[Any]:
    """The patterns inside an operator's argument."""
    if isinstance(argument, _parser.SubPattern):
        return [argument]
    if isinstance(argument, (tuple, list)):
        return [part for item in argument for part in _parts(item)]
    return []
