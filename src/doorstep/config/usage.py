"""The help text of `doorstep serve`, made from the table of options. Parses nothing."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from doorstep.config.option_table import OPTIONS, Kind, Option, Status

_EXIT_CODES = "Exit codes: 0 stopped as asked, 1 could not start, 2 bad options, 3 stopped in haste."


def usage(prog: str = "doorstep serve", width: int = 0) -> str:
    """The help text, grouped; what has no effect only by name."""
    width = width or min(shutil.get_terminal_size().columns, 110)
    lines = [
        f"Usage: {prog} MODELS/ [MODELS/ …] [--option=value …]",
        "",
        "Serves the models in the folders over HTTP and gRPC. Takes tritonserver's options.",
        "A language model needs no repository: name its .gguf file, or its own folder.",
    ]
    for group in dict.fromkeys(option.group for option in OPTIONS):
        shown = [o for o in OPTIONS if o.group == group and o.status is Status.SUPPORTED]
        if shown:
            lines += ["", f"{group}:"]
        for option in shown:
            lines += _help_lines(option, width)
    names = ", ".join(f"--{o.name}" for o in OPTIONS if o.status is Status.WITHOUT_EFFECT)
    wrapped = textwrap.wrap(names, width - 4, break_on_hyphens=False, break_long_words=False)
    lines += ["", "Taken without effect (the log says why):", *(f"  {line}" for line in wrapped)]
    return "\n".join([*lines, "", _EXIT_CODES])


def _help_lines(option: Option, width: int) -> list[str]:
    indent = 34
    value = {
        Kind.FLAG: "",
        Kind.CHOICE: "=" + "|".join(option.choices),
        Kind.BOOL: "=true|false",
        Kind.INTEGER: "=N",
        Kind.NUMBER: "=N",
        Kind.VERBOSITY: "=N",
        Kind.SETTING: "=[B,]KEY=VALUE",
        Kind.RESTRICTION: "=APIS:H=VALUE",
        Kind.PATTERN: "=REGEX",
        Kind.RANGE: "=FIRST-LAST",
        Kind.CACHE: "=CACHE,KEY=VALUE",
        Kind.POLICY: "=P,KEY=VALUE",
        Kind.RESOURCE: "=NAME:N[:DEVICE]",
    }.get(option.kind, "=TEXT")
    default = "" if option.default in ("", None) or option.kind is Kind.FLAG else f" [{_shown(option.default)}]"
    left = f"  --{option.name}{value}"
    text = textwrap.wrap(option.help + default, max(width - indent, 30), break_on_hyphens=False)
    if len(left) < indent:
        return [left.ljust(indent) + text[0], *(" " * indent + line for line in text[1:])]
    return [left, *(" " * indent + line for line in text)]


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)
