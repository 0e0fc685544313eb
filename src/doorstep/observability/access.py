"""The access log: one line per answer. Off unless asked for, and then nothing is asked of a request.

The wire calls the hook when an answer is complete; where there is none, it costs one comparison. A line says who asked,
for what, what came of it, how many bytes came and went, how long it took, and the ids it can be found by.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from doorstep.observability.logging import ACCESS_LOGGER
from doorstep.request import InferenceRequest
from doorstep.wire.context import AccessHook
from doorstep.wire.exchange import Exchange
from doorstep.wire.request_id import request_id

_LONGEST_PATH = 2048


class AccessLine:
    """What a line says. `str` is for people, `fields` for programs."""

    __slots__ = (
        "bytes_in", "bytes_out", "grpc_status", "http_version", "id", "method", "model", "path", "peer", "seconds",
        "status", "version",
    )  # fmt: skip

    def __init__(self, exchange: Exchange, status: int, bytes_out: int, grpc_status: int | None, now_ns: int) -> None:
        self.peer = exchange.connection.peer
        self.http_version = exchange.connection.http_version
        self.method = exchange.method
        self.path = exchange.path[:_LONGEST_PATH]
        self.status = status
        self.grpc_status = grpc_status
        self.bytes_in = getattr(exchange, "received", None) or len(exchange.body)  # streamed bodies are not kept
        self.bytes_out = bytes_out
        self.seconds = (now_ns - exchange.received_ns) / 1e9
        request, params = exchange.state, exchange.params
        if isinstance(request, InferenceRequest):
            self.id = request.id
            self.model, self.version = request.model_name, request.model_version
        else:
            self.id = ""
            self.model, self.version = params.get("name", ""), params.get("version", "")
        self.id = self.id or request_id(exchange.headers).decode("ascii")

    def __str__(self) -> str:
        grpc = "" if self.grpc_status is None else f" grpc={self.grpc_status}"
        model = f" model={_word(self.model)}" if self.model else ""
        version = f" version={_word(self.version)}" if self.version else ""
        identity = f" id={_word(self.id)}" if self.id else ""
        return (
            f'{self.peer} "{self.method} {_quoted(self.path)} HTTP/{self.http_version}" {self.status}{grpc} '
            f"in={self.bytes_in} out={self.bytes_out} {self.seconds * 1e3:.3f}ms{model}{version}{identity}"
        )

    def fields(self) -> dict[str, Any]:
        """Without what is not known."""
        fields: dict[str, Any] = {
            "message": f"{self.method} {self.path} {self.status}",
            "peer": self.peer,
            "method": self.method,
            "path": self.path,
            "http_version": self.http_version,
            "status": self.status,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "duration_ms": round(self.seconds * 1e3, 3),
        }
        known = {"grpc_status": self.grpc_status, "model": self.model, "version": self.version, "request_id": self.id}
        return fields | {name: value for name, value in known.items() if value not in (None, "")}


def access_hook(clock: Callable[[], int] = time.monotonic_ns) -> AccessHook:
    """What the wire calls with every complete answer: (exchange, HTTP status, bytes of body sent, gRPC status)."""
    logger = logging.getLogger(ACCESS_LOGGER)
    handle = logger.handle

    def log_access(exchange: Exchange, status: int, sent: int, grpc_status: int | None) -> None:
        line = AccessLine(exchange, status, sent, grpc_status, clock())
        # The record is made here, because `logger.info` would look for the caller's file and line every time.
        handle(logging.LogRecord(ACCESS_LOGGER, logging.INFO, __file__, 0, line, (), None))

    return log_access


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"') if '"' in text or "\\" in text else text


def _word(text: str) -> str:
    """One word, whatever the client put into it."""
    return text if text.replace("-", "").replace("_", "").replace(".", "").isalnum() else f'"{_quoted(text)}"'
