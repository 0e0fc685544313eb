"""Patterns of header names: what Python finds is found, what takes it for ever is not, and RE2's limits hold."""

from __future__ import annotations

import random
import re

import pytest

from doorstep.config.header_pattern import compile_pattern
from doorstep.errors import InvalidArgument

ATOMS = ["a", "b", "[ab]", "[^a]", ".", r"\w", "x-", "^", "$", r"\b", "(?i:A)", "(?-i:A)"]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?", "+?", "{2,}"]


def some_pattern(dice: random.Random, depth: int) -> str:
    if depth == 0:
        return dice.choice(ATOMS)
    one, other = some_pattern(dice, depth - 1), some_pattern(dice, depth - 1)
    return dice.choice([one + other, f"({one}|{other})", f"(?:{one}){dice.choice(REPEATS)}", one + "A"])


def test_it_finds_what_python_finds() -> None:
    dice = random.Random(1)
    for _ in range(1500):
        pattern = some_pattern(dice, dice.randrange(5))
        theirs, ours = re.compile(pattern, re.IGNORECASE), compile_pattern(pattern)
        for _ in range(5):
            text = "".join(dice.choice("abcx-AB ") for _ in range(dice.randrange(9)))
            assert ours.search(text) == bool(theirs.search(text)), (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|aa)+$",
        ".*.*.*.*.*=",
        "a*a*a*a*a*a*b",
        "(a+)+b",
        "((a?){1000}){1000}b",
        "(((a{1000}){1000}){1000}){1000}",
        "((((a*)*)*)*)*b",
    ],
)
def test_what_takes_python_for_ever_is_answered(pattern: str) -> None:
    assert not compile_pattern(pattern).search("a" * 127 + "!")


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("x-.*", "X-Tenant", True),
        ("(?-i)x-.*", "X-Tenant", False),
        ("(?i)(?-i)X", "x", False),
        ("^my", "in-my", False),
        ("", "anything", True),
        ("a{2,3}$", "baaa", True),
    ],
)
def test_case_and_places(pattern: str, text: str, found: bool) -> None:
    assert compile_pattern(pattern).search(text) is found


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a)\1", "a back reference"),
        ("(?=a)", "a look ahead"),
        ("(?<!a)b", "a look ahead or behind"),
        ("(?>a)", "an atomic group"),
        ("a++", "a possessive repetition"),
        ("a{1001}", "repeats more than 1000 times"),
        ("(", "is not a regular expression"),
        ("*", "is not a regular expression"),
    ],
)
def test_what_re2_does_not_know_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(says)):
        compile_pattern(pattern)
