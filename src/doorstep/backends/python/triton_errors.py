"""The errors of `triton_python_backend_utils`, and between them and the server's. Knows nothing else."""

from __future__ import annotations

from doorstep.backends.python.triton_arguments import text_of
from doorstep.errors import DoorstepError, ErrorCode, FailureReason


class TritonModelException(Exception):
    """What the API raises when it is used wrongly."""


class ExecuteError(TritonModelException):
    """What execute returned cannot be: said to clients without the name of the exception, as Triton does."""


class TritonError:
    """An error for a response: a text and a code."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7

    __slots__ = ("_code", "_message")

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if code not in CODES:
            raise TypeError(f"TritonError: {code!r} is no error code")
        self._message = text_of(message, "TritonError: message")
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code

    def __repr__(self) -> str:
        return f"<TritonError {CODES[self._code].value}: {self._message}>"


CODES = {
    TritonError.UNKNOWN: ErrorCode.UNKNOWN,
    TritonError.INTERNAL: ErrorCode.INTERNAL,
    TritonError.NOT_FOUND: ErrorCode.NOT_FOUND,
    TritonError.INVALID_ARG: ErrorCode.INVALID_ARG,
    TritonError.UNAVAILABLE: ErrorCode.UNAVAILABLE,
    TritonError.UNSUPPORTED: ErrorCode.UNSUPPORTED,
    TritonError.ALREADY_EXISTS: ErrorCode.ALREADY_EXISTS,
    TritonError.CANCELLED: ErrorCode.CANCELLED,
}
_NUMBERS = {code: number for number, code in CODES.items()}


def to_server(error: TritonError) -> DoorstepError:
    """What the client gets for an error that a model answered with."""
    return DoorstepError(error.message(), code=CODES[error.code()], reason=FailureReason.BACKEND)


def from_server(error: DoorstepError) -> TritonError:
    """What a model gets for an error that another model, or the server, answered with."""
    return TritonError(error.message, _NUMBERS[error.code])
