"""--http-header-forward-pattern: a regular expression as RE2, Triton's, reads it. Pure.

Python parses it, but does not match it: its matcher can take for ever where RE2's cannot. Here a part of a pattern
makes of the places where it may begin those where it may end, all at once, so the time grows with the text and the
pattern, whatever is in them. What RE2 does not know is refused when the server starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from typing import Any

from doorstep.errors import InvalidArgument

_parser: Any = re._parser  # type: ignore[attr-defined]
_compiler: Any = re._compiler  # type: ignore[attr-defined]

Places = Set[int]
_Part = Callable[[str, Places], Places]  # (text, where it may begin) → where it may end

MOST_REPEATED = 1000  # RE2's


class HeaderPattern:
    """A pattern to look for."""

    __slots__ = ("_part", "text")

    def __init__(self, text: str, part: _Part) -> None:
        self.text = text
        self._part = part

    def search(self, text: str) -> bool:
        """Whether it is anywhere in `text`."""
        return bool(self._part(text, set(range(len(text) + 1))))

    def __repr__(self) -> str:
        return f"<HeaderPattern {self.text}>"


def compile_pattern(pattern: str) -> HeaderPattern:
    """`pattern` as RE2 would read it, with `(?i)` before it. Raises InvalidArgument for what RE2 refuses."""
    flags = re.IGNORECASE
    text = pattern
    while text.startswith(("(?i)", "(?-i)")):
        flags = re.IGNORECASE if text.startswith("(?i)") else re.RegexFlag(0)
        text = text.partition(")")[2]
    try:
        re.compile(text, flags)
        parsed = _parser.parse(text, flags)
        return HeaderPattern(pattern, _sequence(pattern, parsed, parsed.state.flags))
    except (re.error, OverflowError, RecursionError) as error:
        raise InvalidArgument(f"'{pattern}' is not a regular expression: {error}") from None


_NOT_IN_RE2 = {
    "GROUPREF": "a back reference",
    "GROUPREF_EXISTS": "a condition on a group",
    "ASSERT": "a look ahead or behind",
    "ASSERT_NOT": "a look ahead or behind",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repetition",
}


def _sequence(pattern: str, parsed: Any, flags: int) -> _Part:
    parts = [_part(pattern, item, flags) for item in parsed]

    def ends(text: str, places: Places) -> Places:
        for part in parts:
            if not places:
                break
            places = part(text, places)
        return places

    return ends


def _part(pattern: str, item: tuple[Any, Any], flags: int) -> _Part:
    name, argument = str(item[0]), item[1]
    if name in _NOT_IN_RE2:
        raise InvalidArgument(f"'{pattern}' has {_NOT_IN_RE2[name]}, which RE2, Triton's, does not know")
    if name == "SUBPATTERN":
        _, added, removed, inner = argument
        return _sequence(pattern, inner, (flags | added) & ~removed)
    if name == "BRANCH":
        return _any_of([_sequence(pattern, branch, flags) for branch in argument[1]])
    if name in ("MAX_REPEAT", "MIN_REPEAT"):  # as long as one only wants to know whether, they are the same
        least, most, inner = argument
        endless = most == _parser.MAXREPEAT
        if least > MOST_REPEATED or (most > MOST_REPEATED and not endless):
            raise InvalidArgument(f"'{pattern}' repeats more than {MOST_REPEATED} times, which RE2, Triton's, refuses")
        return _repeated(_sequence(pattern, inner, flags), least, None if endless else most)
    return _single(item, flags)


def _any_of(branches: list[_Part]) -> _Part:
    return lambda text, places: {end for branch in branches for end in branch(text, places)}


def _repeated(part: _Part, least: int, most: int | None) -> _Part:
    def ends(text: str, places: Places) -> Places:
        for _ in range(least):
            before, places = places, part(text, places)
            if not places or places == before:
                break
        found = set(places)
        count = least
        while places and (most is None or count < most):
            places = set(part(text, places)) - found
            found |= places
            count += 1
        return found

    return ends


def _single(item: tuple[Any, Any], flags: int) -> _Part:
    """One character, or a place between two: Python matches that, and cannot take long over it."""
    state = _parser.State()
    state.flags = flags
    state.str = ""
    one: re.Pattern[str] = _compiler.compile(_parser.SubPattern(state, [item]), flags)

    def ends(text: str, places: Places) -> Places:
        return {match.end() for match in (one.match(text, place) for place in places) if match is not None}

    return ends
