"""How OpenAI's API says errors, and Anthropic's: one table each. Knows no endpoint."""

from __future__ import annotations

from typing import Any

import orjson

from doorstep.backends.llm.engine import CONTEXT_LENGTH
from doorstep.errors import DoorstepError, ErrorCode, InvalidArgument, NotFound, QueueRejected
from doorstep.scheduler.queue import TIMEOUT_EXPIRED

# code → status, type. Only what may pass by itself is a 5xx: clients try those again.
STATUS: dict[ErrorCode, tuple[int, str]] = {
    ErrorCode.INVALID_ARG: (400, "invalid_request_error"),
    ErrorCode.UNSUPPORTED: (400, "invalid_request_error"),
    ErrorCode.NOT_FOUND: (404, "invalid_request_error"),
    ErrorCode.ALREADY_EXISTS: (400, "invalid_request_error"),
    ErrorCode.UNAVAILABLE: (503, "server_error"),
    ErrorCode.CANCELLED: (499, "server_error"),
    ErrorCode.INTERNAL: (500, "server_error"),
    ErrorCode.UNKNOWN: (500, "server_error"),
}
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class BadField(InvalidArgument):
    """Something in the body; `param` says where, in JSON's words: messages[0].content."""

    def __init__(self, message: str, param: str | None = None, api_code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.api_code = api_code


class UnknownModel(NotFound):
    def __init__(self, name: str) -> None:
        super().__init__(f"The model '{name}' does not exist. GET /v1/models lists those that do.")


class Deadline(DoorstepError):
    """The time that the client gave is over."""

    code = ErrorCode.UNAVAILABLE

    def __init__(self) -> None:
        super().__init__("the request's deadline (x-request-timeout-ms) has passed")


def status_of(error: DoorstepError) -> int:
    if isinstance(error, Deadline) or error.message == TIMEOUT_EXPIRED:
        return 504
    return STATUS[error.code][0]


def _api_code(error: DoorstepError, status: int) -> str | None:
    if isinstance(error, BadField):
        return error.api_code
    if isinstance(error, UnknownModel):
        return "model_not_found"
    if error.message.startswith(CONTEXT_LENGTH):
        return "context_length_exceeded"
    return {503: "overloaded" if isinstance(error, QueueRejected) else "unavailable", 504: "timeout"}.get(status)


def error_object(error: DoorstepError, prompt: str = "messages") -> dict[str, Any]:
    """`prompt`: the field that a prompt is in, where that is too long."""
    status = status_of(error)
    param = error.param if isinstance(error, BadField) else None
    if error.message.startswith(CONTEXT_LENGTH):
        param = prompt
    if isinstance(error, UnknownModel):
        param = "model"
    kind = STATUS[error.code][1]
    return {"message": error.message, "type": kind, "param": param, "code": _api_code(error, status)}


def error_body(error: DoorstepError) -> bytes:
    return _dumped({"error": error_object(error)})


def anthropic_error(error: DoorstepError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(status_of(error), "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def anthropic_body(error: DoorstepError) -> bytes:
    return _dumped(anthropic_error(error))


def _dumped(document: dict[str, Any]) -> bytes:
    """Lone surrogates, which JSON cannot carry, become question marks."""
    try:
        return orjson.dumps(document)
    except TypeError:
        document["error"]["message"] = document["error"]["message"].encode("utf-8", "replace").decode()
        return orjson.dumps(document)
