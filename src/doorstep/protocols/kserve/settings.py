"""Trace and log settings as clients write them, over HTTP and gRPC, made into changes. Changes nothing itself.

(docs/protocol/extension_trace.md, extension_logging.md; texts: server, http_server.cc and grpc_server.cc)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from doorstep.errors import DoorstepError, Internal, InvalidArgument, Unavailable, Unsupported

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

Changes = dict[str, Any]

TRACE_FILE_FIXED = "trace file location can not be updated through network protocol"
LOG_FILE_FIXED = "log file location can not be updated through network protocol"
_INT32 = (-(2**31), 2**31 - 1)
_UINT32_MAX = 2**32 - 1
_NUMBER = re.compile(r"\s*([+-]?\d+)")  # what C++ takes for one: digits, whatever follows them
_LOG_SWITCHES = ("log_info", "log_warning", "log_error")


def check_model(server: InferenceServer, name: str) -> None:
    """Settings are those of a model that can be served. Raises InvalidArgument."""
    try:
        ready = server.model_ready(name)
    except DoorstepError:
        ready = False
    if not ready:
        raise InvalidArgument(f"Request for unknown model : {name}")


# Trace settings


def trace_changes_of_json(document: Mapping[str, Any]) -> Changes:
    """What the body of a POST asks for. null clears a field. Raises DoorstepError."""
    if "trace_file" in document:
        raise Unsupported(TRACE_FILE_FIXED)
    changes: Changes = {}
    if "trace_level" in document:
        levels = document["trace_level"]
        if levels is None:
            changes["level"] = None
        elif type(levels) is not list:
            raise Internal("attempt to access JSON non-array as array")
        else:
            _add_level(changes, [_json_string(level) for level in levels])
    for name, field in (("trace_rate", "rate"), ("trace_count", "count"), ("log_frequency", "log_frequency")):
        if name in document:
            value = document[name]
            changes[field] = None if value is None else _number(name, _json_string(value), colon="got:")
    return changes


def trace_changes_of_message(settings: Mapping[str, Any]) -> Changes:
    """What TraceSettingRequest.settings asks for. A field without a value is cleared. Raises DoorstepError."""
    if "trace_file" in settings:
        raise Unsupported(TRACE_FILE_FIXED)
    changes: Changes = {}
    if "trace_level" in settings:
        levels = list(settings["trace_level"].value)
        if levels:
            _add_level(changes, levels)
        else:
            changes["level"] = None
    for name, field in (("trace_rate", "rate"), ("trace_count", "count"), ("log_frequency", "log_frequency")):
        if name in settings:
            values = settings[name].value
            if len(values) > 1:
                raise InvalidArgument(f"expect only 1 value for '{name}'")
            changes[field] = _number(name, values[0], colon="got: ") if values else None
    return changes


def _json_string(value: Any) -> str:
    if type(value) is not str:
        raise Internal("attempt to access JSON non-string as string")
    return value


def _add_level(changes: Changes, levels: Sequence[str]) -> None:
    """Names that are no level say nothing."""
    if "OFF" in levels and len(levels) > 1:
        raise InvalidArgument("Expect only one trace level 'OFF' is specified")
    known = frozenset(levels) & {"TIMESTAMPS", "TENSORS"}
    if known or "OFF" in levels:
        changes["level"] = known


def _number(name: str, text: str, *, colon: str) -> int:
    """`colon`: what stands before the value where a count is too small; the two protocols differ."""
    match = _NUMBER.match(text)
    if match is None:
        raise InvalidArgument(f"Unable to parse '{name}', got: {text}")
    number = int(match[1])
    least, most = (-1, _INT32[1]) if name == "trace_count" else (0, _UINT32_MAX)
    if not _INT32[0] <= number <= _INT32[1]:
        raise InvalidArgument(f"Unable to parse '{name}', value is out of range [ {least}, {most} ], got: {text}")
    if name != "trace_count":
        return number % (_UINT32_MAX + 1)  # as an unsigned number
    if number < -1:
        raise InvalidArgument(f"Unable to parse '{name}'. Expecting value >= -1, {colon}{text}")
    return number


# Log settings


def log_changes_of_json(document: Mapping[str, Any]) -> Changes:
    """What the body of a POST asks for. null asks for nothing. Raises DoorstepError."""
    given = {name: value for name, value in document.items() if value is not None}
    if "log_file" in given:
        raise Unsupported(LOG_FILE_FIXED)
    changes: Changes = {}
    for name in _LOG_SWITCHES:
        if name in given:
            if type(given[name]) is not bool:
                raise Internal("attempt to access JSON non-boolean as boolean")
            changes[name] = given[name]
    if "log_verbose_level" in given:
        level = given["log_verbose_level"]
        if type(level) is not int or level < 0:
            raise Internal("attempt to access JSON non-unsigned-integer as unsigned-integer")
        changes["log_verbose_level"] = min(level, _INT32[1])
    if "log_format" in given:
        text = _json_string(given["log_format"])
        if text not in ("default", "ISO8601"):
            raise Unavailable(f"invalid argument for --log_format, got: {text}")
        changes["log_format"] = text
    return changes


def log_changes_of_message(settings: Mapping[str, Any]) -> Changes:
    """What LogSettingsRequest.settings asks for. Raises DoorstepError."""
    if "log_file" in settings:
        raise Unsupported(LOG_FILE_FIXED)
    changes: Changes = {}
    expected = {
        **dict.fromkeys(_LOG_SWITCHES, ("bool_param", "boolean")),
        "log_verbose_level": ("uint32_param", "int32"),
        "log_format": ("string_param", "string"),
    }
    for name, (choice, word) in expected.items():
        if name in settings:
            if settings[name].WhichOneof("parameter_choice") != choice:
                raise InvalidArgument(f"expect {word} for '{name}'")
            changes[name] = getattr(settings[name], choice)
    text = changes.get("log_format", "default")
    if text not in ("default", "ISO8601"):
        raise InvalidArgument(f"invalid argument for log_format, got: {text}")
    return changes
