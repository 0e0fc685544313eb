"""Writes the table of differences into docs/compatibility.md, between its two markers. Knows no server."""

from __future__ import annotations

from itertools import groupby

from . import ROOT
from .compare import load_table
from .recording import load

FILE = ROOT / "docs" / "compatibility.md"
BEGIN = "<!-- differences: begin (written by tests/conformance/differential, from differences.toml) -->"
END = "<!-- differences: end -->"


def render(text: str) -> str:
    """`text` with what is between the markers made anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n\n" + _tables() + END + after


def _tables() -> str:
    lines = [f"{len(load()):,} requests, {len(load_table())} kinds of difference.", ""]
    for group, rows in groupby(load_table(), key=lambda row: row.group):
        lines += [f"### {group}", "", "| difference | where it shows | why |", "|---|---|---|"]
        lines += [f"| {row.title} | {', '.join(row.parts)} | {row.reason} |" for row in rows]
        lines.append("")
    return "\n".join(lines)
