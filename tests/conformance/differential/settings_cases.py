"""Trace and log settings: read, changed, cleared, wrong, over HTTP and gRPC, one after the other. Knows no server."""

from __future__ import annotations

import json
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from .wire import GrpcCase, HttpCase

# The file is never written to, and the format is one that both servers have.
OPTIONS = (
    "--trace-config=level=TIMESTAMPS",
    "--trace-config=rate=1000000",
    "--trace-config=triton,file=/dev/null",
    "--log-format=default",
)
CASES: list[HttpCase | GrpcCase] = []

_ALL, _ONE, _LOG = "/v2/trace/setting", "/v2/models/multi/trace/setting", "/v2/logging"


def _http(path: str, *bodies: Any) -> None:
    """Each body is posted; None is a GET."""
    for body in bodies:
        number = len(CASES)
        if body is None:
            CASES.append(HttpCase(f"{number}: GET {path}", "GET", path))
        else:
            text = body if isinstance(body, bytes) else json.dumps(body).encode()
            CASES.append(HttpCase(f"{number}: {path} {text.decode()}", "POST", path, (), text))


def _trace(name: str = "", *values: str, model: str = "") -> None:
    message = pb.TraceSettingRequest(model_name=model)
    if name:
        message.settings[name].value.extend(values)
    CASES.append(GrpcCase(f"{len(CASES)}: TraceSetting {model} {name} {' '.join(values)}", "TraceSetting", (message,)))


def _log(name: str = "", **value: Any) -> None:
    message = pb.LogSettingsRequest()
    if name:
        message.settings[name].CopyFrom(pb.LogSettingsRequest.SettingValue(**value))
    shown = " ".join(f"{kind} {what}" for kind, what in value.items())
    CASES.append(GrpcCase(f"{len(CASES)}: LogSettings {name} {shown}", "LogSettings", (message,)))


_http(_ALL, None, {}, b"{", b"[]", {"trace_file": "x"}, {"trace_file": None}, {"trace_mode": "opentelemetry"})
_http(_ONE, None, {})
_http("/v2/models/nope/trace/setting", None, {}, {"trace_rate": "1"})
_http(_ALL, *({"trace_level": level} for level in ("OFF", [1], ["OFF", "TENSORS"], ["NOPE"], [], ["MAX"])))
for _name in ("trace_rate", "trace_count", "log_frequency"):
    _http(_ALL, *({_name: value} for value in (1, "x", "", "99999999999", "-99999999999", "7abc", "12", None)))
_http(_ALL, {"trace_rate": "-1"}, {"trace_rate": "0"}, {"trace_rate": "1000000"}, {"trace_count": "-2"}, {"unknown": 1})
# A model's own fields, the global ones beneath them, and what is cleared.
_http(_ONE, {"trace_rate": "9000000", "trace_level": ["TENSORS", "TIMESTAMPS"]})
_http(_ALL, {"trace_count": "6", "trace_rate": "8000000"})
_http(_ONE, None, {"trace_rate": None}, {"trace_level": None}, None)
_http(_ALL, {"trace_rate": None, "trace_count": None}, {"trace_level": ["OFF"], "trace_rate": "0"})
_http(_ONE, {"trace_level": ["TIMESTAMPS"]}, {"trace_level": ["TIMESTAMPS"], "trace_rate": "1000000"})
_http(_ALL, {"trace_rate": None, "trace_level": None})
_http(_LOG, None, {}, b"{", {"log_file": "x"}, {"log_file": None}, {"unknown": 1})
_http(_LOG, *({"log_info": value} for value in (1, "true", None, False, True)))
_http(_LOG, {"log_warning": "x"}, {"log_error": 2}, {"log_error": False}, {"log_error": True})
_http(_LOG, *({"log_verbose_level": value} for value in (-1, "1", 1.5, True, 2, 0)))
_http(_LOG, *({"log_format": value} for value in ("x", 1, "ISO8601", "default")))
_trace()
_trace("trace_file", "x")
_trace("unknown", "1")
_trace(model="nope")
for _levels in (("OFF", "TENSORS"), ("NOPE",), ("TENSORS",), ("OFF",), ()):
    _trace("trace_level", *_levels)
for _name in ("trace_rate", "trace_count", "log_frequency"):
    for _values in (("x",), ("1", "2"), ("99999999999",), ("1000000",), ()):
        _trace(_name, *_values)
_trace("trace_count", "-2")
_trace("trace_rate", "0")
_trace("trace_rate", "3000000", model="multi")
_trace("trace_rate", model="multi")
_log()
_log("log_file", string_param="x")
_log("unknown", bool_param=True)
for _name in ("log_info", "log_warning", "log_error"):
    for _value in ({"string_param": "x"}, {"uint32_param": 1}, {}, {"bool_param": False}, {"bool_param": True}):
        _log(_name, **_value)
for _value in ({"string_param": "1"}, {"bool_param": True}, {"uint32_param": 2}, {"uint32_param": 0}):
    _log("log_verbose_level", **_value)
for _value in ({"bool_param": True}, {"string_param": "x"}, {"string_param": "ISO8601"}, {"string_param": "default"}):
    _log("log_format", **_value)
