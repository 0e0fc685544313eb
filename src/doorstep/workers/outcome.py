"""What became of a request, as it crosses between the server and a worker process. Knows no socket and no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from doorstep.errors import DoorstepError, ErrorCode, FailureReason
from doorstep.request import Outputs, Result, Verdict
from doorstep.types import Tensor
from doorstep.workers.frames import Layout, read_tensors

LONGEST_MESSAGE = 16384


def error_meta(error: DoorstepError) -> dict[str, str]:
    return {"code": error.code.value, "reason": error.reason.value, "message": error.message[:LONGEST_MESSAGE]}


def read_error(meta: Mapping[str, str]) -> DoorstepError:
    """Raises KeyError, TypeError or ValueError for what is no error."""
    return DoorstepError(str(meta["message"]), code=ErrorCode(meta["code"]), reason=FailureReason(meta["reason"]))


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def outputs_meta(outputs: Sequence[Tensor], layout: Layout) -> Any:
    """A list of tensors, or one with parameters."""
    entries = layout.add(outputs)
    if type(outputs) is Outputs and outputs.parameters:
        return {"outputs": entries, "parameters": outputs.parameters}
    return entries


def read_result(meta: Any, memory: Any) -> Result:
    """Raises ProtocolError, KeyError, TypeError or ValueError for what is none."""
    if type(meta) is list:
        return read_tensors(meta, memory)
    if type(meta) is str:
        return Verdict(meta)
    if "outputs" in meta:
        return Outputs(read_tensors(meta["outputs"], memory), meta["parameters"])
    return read_error(meta)
