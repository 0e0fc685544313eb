"""The one error family. Knows no protocol: each protocol translates `ErrorCode` once, in one table.

Texts follow Triton's wherever a client or a test may match on them (docs/compatibility.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class ErrorCode(Enum):
    """Triton's error codes (tritonserver.h, TRITONSERVER_Error_Code)."""

    UNKNOWN = "UNKNOWN"
    INTERNAL = "INTERNAL"
    NOT_FOUND = "NOT_FOUND"
    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    UNSUPPORTED = "UNSUPPORTED"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    CANCELLED = "CANCELLED"


class FailureReason(Enum):
    """Why a request failed, as the label `reason` of nv_inference_request_failure says it."""

    REJECTED = "REJECTED"  # the scheduler refused it: queue full, timeout expired
    CANCELED = "CANCELED"  # the client left, or asked to cancel
    BACKEND = "BACKEND"  # the model or its backend failed
    OTHER = "OTHER"


class DoorstepError(Exception):
    """Whatever went wrong, in words for the person who must mend it."""

    code = ErrorCode.INTERNAL
    reason = FailureReason.OTHER

    def __init__(self, message: str, *, code: ErrorCode | None = None, reason: FailureReason | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code
        if reason is not None:
            self.reason = reason

    @property
    def message(self) -> str:
        return str(self.args[0])


class InvalidArgument(DoorstepError):
    code = ErrorCode.INVALID_ARG


class NotFound(DoorstepError):
    code = ErrorCode.NOT_FOUND


class Unavailable(DoorstepError):
    code = ErrorCode.UNAVAILABLE


class Unsupported(DoorstepError):
    code = ErrorCode.UNSUPPORTED


class AlreadyExists(DoorstepError):
    code = ErrorCode.ALREADY_EXISTS


class Internal(DoorstepError):
    code = ErrorCode.INTERNAL


class Cancelled(DoorstepError):
    code = ErrorCode.CANCELLED
    reason = FailureReason.CANCELED


class QueueRejected(DoorstepError):
    """The scheduler would not take, or could not keep, a request: full queue, expired timeout, stopping."""

    code = ErrorCode.UNAVAILABLE
    reason = FailureReason.REJECTED


class BackendError(DoorstepError):
    """The model or the library that runs it failed."""

    code = ErrorCode.INTERNAL
    reason = FailureReason.BACKEND


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with a model's configuration or files."""

    where: str  # file, or file:line:column, or field path such as `input[0].dims`
    what: str
    fix: str = ""  # what to do about it; empty where `what` already says so

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.fix})" if self.fix else "")


class ConfigError(DoorstepError):
    """A model's configuration is unusable; lists every problem found, not only the first."""

    code = ErrorCode.INVALID_ARG

    def __init__(self, model: str, problems: Sequence[Problem]) -> None:
        self.model = model
        self.problems = tuple(problems)
        super().__init__("; ".join(str(p) for p in problems))
