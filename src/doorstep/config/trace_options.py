"""--trace-config, and the deprecated --trace-*: from strings to `TraceOptions`. Knows no file and no request.

Settings, defaults and what is wrong are Triton's (server, command_line_parser.cc).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from doorstep.errors import InvalidArgument

UINT32_MAX = 2**32 - 1
INT32_MAX = 2**31 - 1
TIMESTAMPS, TENSORS = "TIMESTAMPS", "TENSORS"
TRITON, OPENTELEMETRY = "triton", "opentelemetry"

_LEVELS: dict[str, str] = {
    **dict.fromkeys(("false", "off"), ""),
    **dict.fromkeys(("true", "on", "min", "max", "timestamps"), TIMESTAMPS),
    "tensors": TENSORS,
}
# The batch span processor's, with their defaults; the environment's OTEL_<NAME> comes before those.
_SPAN_PROCESSOR = {"bsp_max_queue_size": 2048, "bsp_schedule_delay": 5000, "bsp_max_export_batch_size": 512}


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """What is traced at start, and where to. The settings endpoint may change all but where."""

    level: frozenset[str] = frozenset()  # of TIMESTAMPS, TENSORS; empty: off
    rate: int = 1000  # every n-th request
    count: int = -1  # traces to take; -1: any number
    mode: str = TRITON
    file: str = ""
    log_frequency: int = 0  # traces per indexed file; 0: one file
    # opentelemetry: what was given of it, in order, and the defaults of the rest, as the settings endpoint shows them
    exporter: Sequence[tuple[str, str]] = field(default_factory=tuple)


def parse_trace_options(given: Mapping[str, Sequence[Any]], notes: list[str]) -> TraceOptions:
    """`given`: the values of each --trace-* option, in order. Raises InvalidArgument; `notes` are for the log."""
    settings: dict[str, list[tuple[str, str]]] = {"": [], TRITON: [], OPENTELEMETRY: []}
    for text in given.get("trace-config", ()):
        mode, key, value = _split(text)
        settings[mode].append((key, value))
    own, triton = dict(settings[""]), dict(settings[TRITON])
    levels = [_level(f"--trace-level={text}", text) for text in given.get("trace-level", ())]
    levels += [_level(f"--trace-config=level={text}", text) for key, text in settings[""] if key == "level"]
    mode = _mode(own["mode"]) if "mode" in own else TRITON
    unknown = [f"{key}={own[key]}" for key in own.keys() - {"level", "rate", "count", "mode"}]
    unknown += [f"triton,{key}={triton[key]}" for key in triton.keys() - {"file", "log-frequency"}]
    notes.extend(f"--trace-config={shown} has no effect: there is no such setting" for shown in unknown)
    if mode == OPENTELEMETRY:
        unused = given.keys() & {"trace-file", "trace-log-frequency"}
        notes.extend(f"--{name} has no effect with opentelemetry tracing mode" for name in unused)

    def number(key: str, old: str, among: Mapping[str, str], prefix: str, default: int, least: int, most: int) -> int:
        if key in among:
            return _number(f"--trace-config={prefix}{key}", among[key], least, most)
        return int(given[old][-1]) if old in given else default

    return TraceOptions(
        level=frozenset() if "" in levels else frozenset(levels),
        rate=number("rate", "trace-rate", own, "", 1000, 0, UINT32_MAX),
        count=number("count", "trace-count", own, "", -1, -1, INT32_MAX),
        mode=mode,
        file=triton.get("file", given["trace-file"][-1] if "trace-file" in given else "") if mode == TRITON else "",
        log_frequency=number("log-frequency", "trace-log-frequency", triton, "triton,", 0, 0, UINT32_MAX),
        exporter=_exporter(settings[OPENTELEMETRY]) if mode == OPENTELEMETRY else (),
    )


def _split(text: str) -> tuple[str, str, str]:
    """(mode or "", key, value)"""
    head, equals, value = text.partition("=")
    mode, comma, key = head.partition(",")
    if not comma:
        mode, key = "", head
    elif not mode:
        raise InvalidArgument(
            "No trace mode specified. --trace-config option format is <trace mode>,<setting>=<value> or "
            f"<setting>=<value>. Got {text}"
        )
    else:
        mode = _mode(mode)
    if not equals or not key or not value:
        raise InvalidArgument(f"--trace-config option format is '<trace mode>,<setting>=<value>'. Got {text}")
    return mode, key, value


def _mode(text: str) -> str:
    if text.lower() not in (TRITON, OPENTELEMETRY):
        raise InvalidArgument(
            f'--trace-config: invalid value for trace mode option: {text}. Available options are "triton" and '
            '"opentelemetry"'
        )
    return text.lower()


def _level(shown: str, text: str) -> str:
    try:
        return _LEVELS[text.lower()]
    except KeyError:
        raise InvalidArgument(
            f"{shown}: invalid value for trace level option: {text}; expected OFF, TIMESTAMPS or TENSORS"
        ) from None


def _number(shown: str, text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise InvalidArgument(f"{shown}={text}: expected a whole number from {least} to {most}")
    return number


def _exporter(
    given: Sequence[tuple[str, str]], environment: Callable[[str], str | None] = os.environ.get
) -> tuple[tuple[str, str], ...]:
    settings = []
    for key, value in given:
        if key in _SPAN_PROCESSOR:
            value = str(_number(f"--trace-config=opentelemetry,{key}", value, 1, UINT32_MAX))
        settings.append((key, value))
    known = {key for key, _ in given}
    for key, default in _SPAN_PROCESSOR.items():
        if key not in known:
            name = f"OTEL_{key.upper()}"
            settings.append((key, str(_number(name, environment(name) or str(default), 1, UINT32_MAX))))
    return tuple(settings)
