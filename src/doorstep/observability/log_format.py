"""How a log record becomes one line: for people, as JSON, or as tritonserver writes it. Writes nothing anywhere.

Whatever came from a client may stand in a record, so no format lets it begin a line of its own or steer a terminal.
"""

from __future__ import annotations

import json
import logging
import os
import time
from typing import Any

import orjson

LONGEST_MESSAGE = 16_384  # characters; what a line may cost in memory while it waits to be written
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Control characters, Unicode's line ends, and what turns the direction of writing: as Python writes them in a string.
_SHOWN = {n: repr(chr(n))[1:-1] for n in (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))}
_SHOWN_IN_JSON = {n: f"\\u{n:04x}" for n in _SHOWN}
_LETTERS = {logging.DEBUG: "V", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E", logging.CRITICAL: "E"}
_NAMES = {logging.DEBUG: "verbose", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}


def one_line(text: str) -> str:
    """`text` with everything that could end a line or steer a terminal made visible."""
    return text if text.isprintable() else text.translate(_SHOWN)


def _shorten(text: str) -> str:
    more = len(text) - LONGEST_MESSAGE
    return text if more <= 0 else f"{text[:LONGEST_MESSAGE]}… ({more} more characters)"


def _traceback(record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(record.exc_text or logging.Formatter().formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return _shorten("\n".join(parts))


class _LineFormatter(logging.Formatter):
    """One line; a traceback follows on lines that begin with a bar, as no record's first line does."""

    def __init__(self) -> None:
        super().__init__()
        self._second = -1  # what `_stamp` is for. Guarded by the handler's lock
        self._stamp = ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._stamp = second, self.stamp(second)
        line = self.line(record, self._stamp, _shorten(record.getMessage().rstrip("\n")))
        if trace := _traceback(record):
            line += "".join(f"\n  | {one_line(part)}" for part in trace.split("\n"))
        return line

    def stamp(self, second: int) -> str:
        raise NotImplementedError

    def line(self, record: logging.LogRecord, stamp: str, message: str) -> str:
        raise NotImplementedError


class TextFormatter(_LineFormatter):
    """`2026-11-22 17:08:22.180 INFO successfully loaded 'resnet' version 1`, in local time: for people."""

    def stamp(self, second: int) -> str:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))

    def line(self, record: logging.LogRecord, stamp: str, message: str) -> str:
        origin = "" if record.name.split(".")[0] == "doorstep" else f"{record.name}: "
        return f"{stamp}.{int(record.msecs):03d} {record.levelname} {origin}{one_line(message)}"


class TritonFormatter(_LineFormatter):
    """`I1122 17:08:22.180638 4711 repository.py:88] "loading: resnet:1"`, in UTC: triton common, logging.cc."""

    def stamp(self, second: int) -> str:
        return time.strftime("%m%d %H:%M:%S", time.gmtime(second))

    def line(self, record: logging.LogRecord, stamp: str, message: str) -> str:
        letter = _LETTERS.get(record.levelno, "I")
        microsecond = int(record.created % 1 * 1_000_000)
        return f"{letter}{stamp}.{microsecond:06d} {self.tail(record, message)}"

    def tail(self, record: logging.LogRecord, message: str) -> str:
        return f"{os.getpid()} {record.filename}:{record.lineno}] {one_line(json.dumps(message, ensure_ascii=False))}"


class TritonIsoFormatter(TritonFormatter):
    """`2026-11-22T17:08:22Z I 4711 repository.py:88] "loading: resnet:1"`."""

    def stamp(self, second: int) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))

    def line(self, record: logging.LogRecord, stamp: str, message: str) -> str:
        return f"{stamp} {_LETTERS.get(record.levelno, 'I')} {self.tail(record, message)}"


class JsonFormatter(logging.Formatter):
    """One object per line: `ts`, `level`, `logger`, `message`, then whatever else the event says about itself."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(int(record.created)))
        line: dict[str, Any] = {
            "ts": f"{stamp}.{int(record.created % 1 * 1_000_000):06d}Z",
            "level": _NAMES.get(record.levelno, record.levelname.lower()),
            "logger": record.name,
        }
        fields = getattr(record.msg, "fields", None)  # a message that is its fields, as an access line is
        if fields is not None:
            line.update(fields())
        else:
            line["message"] = _shorten(record.getMessage().rstrip("\n"))
        line.update({name: value for name, value in vars(record).items() if name not in _STANDARD})
        if trace := _traceback(record):
            line["exception"] = trace
        try:
            text = orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
        except (TypeError, ValueError):  # a lone surrogate, say
            text = json.dumps(line, default=str)
        return text if text.isprintable() else text.translate(_SHOWN_IN_JSON)


FORMATTERS: dict[str, type[logging.Formatter]] = {
    "text": TextFormatter,
    "json": JsonFormatter,
    "default": TritonFormatter,
    "ISO8601": TritonIsoFormatter,
}
