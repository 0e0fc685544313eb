"""Where two servers' answers differ, and which of those differences are meant. Knows no server.

A difference is a case's identifier and the part of the answer that differs: `outcome` (answered, closed, crashed …),
`status`, `content-type`, `headers` (the others), `error` (its text), `body` (the rest); over gRPC `status` is the code
and `error` the details.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from .wire import Answer

TABLE = Path(__file__).with_name("differences.toml")
PARTS = ("outcome", "status", "content-type", "headers", "error", "body")
_PATTERNS = ("error", "content-type")  # in a row these are regular expressions
_OUTCOMES = ("crash", "closed", "silent", "protocol")


@dataclass(frozen=True, slots=True)
class Row:
    """Some differences that are meant, and why."""

    title: str
    cases: tuple[str, ...]  # identifiers, with * and ? as in file names
    parts: tuple[str, ...]
    reason: str  # ends in docs/compatibility.md
    group: str  # the section there
    doorstep: dict[str, Any] = field(default_factory=dict)  # what Doorstep then says, by part
    triton: dict[str, Any] = field(default_factory=dict)  # only where Triton says this, by part

    def covers(self, case: str, part: str, triton: Answer) -> bool:
        return (
            part in self.parts
            and any(_matches(case, pattern) for pattern in self.cases)
            and not _otherwise(self.triton, triton)
        )


@lru_cache(None)
def _matches(case: str, pattern: str) -> bool:
    return fnmatchcase(case, pattern.replace("[", "[[]"))  # brackets are part of names here, not sets


def load_table() -> list[Row]:
    return [
        Row(
            title=row["title"],
            cases=tuple(row["cases"]),
            parts=tuple(row["parts"]),
            reason=" ".join(row["reason"].split()),
            group=group["title"],
            doorstep=row.get("doorstep", {}),
            triton=row.get("triton", {}),
        )
        for group in tomllib.loads(TABLE.read_text())["group"]
        for row in group["difference"]
    ]


def split(answer: Answer) -> dict[str, Any]:
    """An answer in its parts."""
    outcome = next((o for o in _OUTCOMES if o in answer), "answered")
    if "code" in answer:
        found = {"status": answer["code"], "error": answer["details"], "body": answer["messages"]}
    else:
        body = {k: v for k, v in answer.items() if k not in ("status", "headers", *_OUTCOMES)}
        error = body["json"].get("error") if isinstance(body.get("json"), dict) else None
        if error is not None:
            body = {}
        headers = dict(answer.get("headers", {}))
        found = {
            "status": answer.get("status"),
            "content-type": headers.pop("content-type", ""),
            "headers": headers,
            "error": error,
            "body": body,
        }
    return {**dict.fromkeys(PARTS), "outcome": outcome, **found}


def same(a: Any, b: Any) -> bool:
    """Whether two parts are equal, and NaN equal to itself."""
    return bool(_plain(a) == _plain(b))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {k: _plain(v) for k, v in value.items()}
        case list():
            return [_plain(v) for v in value]
        case float() if value != value:
            return "NaN"
        case _:
            return value


def differences(doorstep: dict[str, Answer], triton: dict[str, Answer]) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(case, part) → (Doorstep's, Triton's) wherever they differ."""
    assert doorstep.keys() == triton.keys(), sorted(doorstep.keys() ^ triton.keys())
    found = {}
    for case, answer in doorstep.items():
        ours, theirs = split(answer), split(triton[case])
        if ours["outcome"] != theirs["outcome"]:
            found[case, "outcome"] = (answer, triton[case])
            continue  # nothing else can be compared
        for part in PARTS[1:]:
            if not same(ours[part], theirs[part]):
                found[case, part] = (ours[part], theirs[part])
    return found


def problems(doorstep: dict[str, Answer], triton: dict[str, Answer], rows: list[Row]) -> list[str]:
    """What is wrong: differences no row covers, rows that cover none, and answers other than a row promises."""
    found = differences(doorstep, triton)
    wrong = [
        f"{case}: {part} differs\n{_explain(ours, theirs)}"
        for (case, part), (ours, theirs) in found.items()
        if not any(row.covers(case, part, triton[case]) for row in rows)
    ]
    for row in rows:
        covered = [(case, part) for case, part in found if row.covers(case, part, triton[case])]
        wrong += [
            f"row '{row.title}': {pattern!r} covers no difference any more"
            for pattern in row.cases
            if not any(_matches(case, pattern) for case, _ in covered)
        ]
        wrong += [
            f"row '{row.title}': {part} never differs" for part in row.parts if all(part != p for _, p in covered)
        ]
        for case in dict.fromkeys(case for case, _ in covered):
            wrong += [
                f"row '{row.title}': {case}: {part} should be {expected!r}, is {said!r}"
                for part, expected, said in _otherwise(row.doorstep, doorstep[case])
            ]
    return wrong


def _otherwise(expected: dict[str, Any], answer: Answer) -> list[tuple[str, Any, Any]]:
    """(part, expected, said) wherever an answer is not what a row expects of it."""
    said = split(answer)
    return [
        (part, value, said[part])
        for part, value in expected.items()
        if not (
            re.fullmatch(value, said[part] or "", re.DOTALL) is not None
            if part in _PATTERNS
            else same(said[part], value)
        )
    ]


def _explain(ours: Any, theirs: Any) -> str:
    return "\n".join(
        f"    {where or 'all'}:\n        Doorstep: {a!r}\n        Triton:   {b!r}"
        for where, a, b in _apart(ours, theirs, "")
    )


_MISSING = "(not there)"


def _apart(a: Any, b: Any, where: str) -> list[tuple[str, Any, Any]]:
    """The places, as paths, at which two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        parts = [_apart(a.get(k, _MISSING), b.get(k, _MISSING), f"{where}.{k}") for k in keys]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        parts = [_apart(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return [] if _plain(a) == _plain(b) else [(where, a, b)]
    return [place for part in parts for place in part]
