"""The one internal representation of a request, its responses, and the batch they run in. Knows no protocol.

Life of a request: a protocol decodes it, `InferenceServer.infer` validates it, a scheduler queues it, a worker runs it
in a `Batch`, and its `ResponseSender` gets one response (or several, the last one final). Times are
`time.monotonic_ns()`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, Protocol

from doorstep.errors import Cancelled, DoorstepError
from doorstep.stats import ComputeTally
from doorstep.types import Tensor

Parameter = bool | int | float | str


class ResponseSender(Protocol):
    """Where a request's responses go. Called on the event loop thread only."""

    def send(self, response: InferenceResponse, final: bool) -> None:
        """Takes one response; `final` is true exactly once, with the last. Never raises."""


class InferenceRequest:
    """One request. Touched only from the event loop, but for `inputs`, which a worker reads while it runs the batch."""

    __slots__ = (
        "batch_key",
        "cancelled",
        "correlation_id",
        "deadline_ns",
        "id",
        "inputs",
        "model_name",
        "model_version",
        "on_cancel",
        "on_room",
        "parameters",
        "priority",
        "queued_ns",
        "received_ns",
        "requested_outputs",
        "rows",
        "sender",
        "sequence_end",
        "sequence_start",
        "slot",
        "stalled",
        "tally",
        "tenant",
        "timeout_us",
        "trace",
    )

    at_once = False  # a queue that is empty need not wait for others to share the batch: none will come

    def __init__(
        self,
        model_name: str,
        inputs: dict[str, Tensor],
        sender: ResponseSender,
        *,
        model_version: str = "",
        id: str = "",
        requested_outputs: tuple[str, ...] = (),
        parameters: dict[str, Parameter] | None = None,
        received_ns: int = 0,
    ) -> None:
        self.model_name = model_name
        self.model_version = model_version  # as asked for; "" means the newest, or what the version policy prefers
        self.id = id
        self.inputs = inputs
        self.requested_outputs = requested_outputs  # empty: all of the model's outputs
        self.parameters = parameters  # custom parameters, handed to the backend
        self.sender = sender
        self.received_ns = received_ns or time.monotonic_ns()
        self.rows = 1  # what it counts in a batch: its first dimension, or 1 where the model does not batch
        self.batch_key: object = None  # only requests with equal keys can be stacked
        self.queued_ns = 0  # when a scheduler took it
        self.priority = 0  # 0: the model's default
        self.timeout_us = 0  # 0: the model's default
        self.deadline_ns = 0  # 0: none; after it nobody waits for the answer (grpc-timeout), and it need not run
        self.correlation_id: int | str = 0  # 0 and "": not part of a sequence
        self.sequence_start = False
        self.sequence_end = False
        self.cancelled = False
        self.on_cancel: Callable[[InferenceRequest], None] | None = None  # set by whoever holds it and can stop early
        # Back-pressure for those that get many responses. A sender whose client reads too slowly sets `stalled`; when
        # there is room again it clears it and calls `room`, and whoever runs the model lets it go on.
        self.stalled = False
        self.on_room: Callable[[InferenceRequest], None] | None = None
        self.slot: Any = None  # the scheduler's note: the place of its sequence, its level in the queue
        self.tenant = ""  # whose it is, where queues are fair between clients
        self.tally: ComputeTally | None = None  # of the ensemble it is a step of: counts what it cost
        self.trace: Any = None  # a trace.Trace while somebody wants to know what became of it

    def cancel(self) -> None:
        """Nobody wants the answer any more. Queues skip it; a running model is asked to stop where it can be."""
        if not self.cancelled:
            self.cancelled = True
            if self.on_cancel is not None:
                self.on_cancel(self)

    def ask_to_stop(self) -> None:
        """Whoever waits still takes what comes. A model in a process of its own may see it, and go on all the same;
        anywhere else the request is cancelled."""
        holder = getattr(self.on_cancel, "__self__", None)
        ask = getattr(holder, "ask_to_stop", None)
        if ask is None:
            self.cancel()
        else:
            ask(self)

    def room(self) -> None:
        """The client has read what it was sent: the next responses may come."""
        if self.stalled:
            self.stalled = False
            if self.on_room is not None:
                self.on_room(self)

    def __repr__(self) -> str:
        version = f":{self.model_version}" if self.model_version else ""
        state = " cancelled" if self.cancelled else ""
        return f"<InferenceRequest {self.id or '<id_unknown>'} for {self.model_name}{version}{state}>"


class InferenceResponse:
    """One response: outputs, or an error. `model_version` is the version that answered.

    `flag_only` marks one that is nothing but the news that no more comes: the model had said all before. It is sent as
    the final one; a model may also answer with a response that has no outputs, and that one is not `flag_only`.
    """

    __slots__ = ("error", "flag_only", "id", "model_name", "model_version", "outputs", "parameters")

    def __init__(
        self,
        model_name: str,
        model_version: str,
        id: str,
        outputs: Sequence[Tensor] = (),
        error: DoorstepError | None = None,
        *,
        parameters: dict[str, Parameter] | None = None,
        flag_only: bool = False,
    ) -> None:
        self.model_name = model_name
        self.model_version = model_version
        self.id = id
        self.outputs = outputs
        self.error = error
        self.parameters = parameters
        self.flag_only = flag_only

    def __repr__(self) -> str:
        what = f"error {self.error.code.value}" if self.error else f"{len(self.outputs)} outputs"
        return f"<InferenceResponse {self.id or '<id_unknown>'} of {self.model_name}:{self.model_version} {what}>"


class Outputs(list[Tensor]):
    """The outputs of one response that has parameters too. Where there are none, any sequence of tensors will do."""

    __slots__ = ("parameters",)

    def __init__(self, tensors: Iterable[Tensor] = (), parameters: dict[str, Parameter] | None = None) -> None:
        super().__init__(tensors)
        self.parameters = parameters


class Verdict(Enum):
    """A result that is neither outputs nor an error."""

    LATER = "later"  # answered through `Batch.emit`: some responses may have gone, others come after the batch is done
    RESCHEDULE = "reschedule"  # the model wants to see the request again, in a later batch


LATER = Verdict.LATER
RESCHEDULE = Verdict.RESCHEDULE

Result = Sequence[Tensor] | DoorstepError | Verdict | None
Emit = Callable[["InferenceRequest", Sequence[Tensor] | DoorstepError | None, bool], None]


class Batch:
    """Requests that run together, and what came of each.

    The scheduler makes it; on the way to a worker it belongs to the worker; with `done` it comes back. `results[i]` is
    for `requests[i]`: its outputs, its own error, a verdict, or None while it has neither. An exception out of
    `execute` fails those that have no result yet.

    A request whose result is LATER gets its responses one by one: `emit(request, outputs, final)`, from any thread the
    worker allows, during `execute` or long after. `outputs` None says only that no more comes, and an error is always
    final. Whoever gives LATER owes exactly one final response.
    """

    __slots__ = (
        "compute_end_ns",
        "compute_start_ns",
        "emit",
        "input_end_ns",
        "output_start_ns",
        "padding",
        "requests",
        "results",
        "rows",
        "worker",
    )

    def __init__(self, requests: list[InferenceRequest], rows: int) -> None:
        self.requests = requests
        self.rows = rows  # the sum of the requests' rows
        self.padding = 0  # how many of them are nobody's
        self.results: list[Result] = [None] * len(requests)
        self.worker: Any = None  # the scheduler's note of where it runs
        self.emit: Emit = _nobody_listens
        self.compute_start_ns = 0  # the worker took it
        self.input_end_ns = 0  # inputs are gathered; the model starts
        self.output_start_ns = 0  # the model is done; outputs are being scattered
        self.compute_end_ns = 0

    def fail(self, error: DoorstepError) -> None:
        """Gives `error` to every request that has no result yet."""
        self.results = [error if result is None else result for result in self.results]


def _nobody_listens(request: InferenceRequest, outputs: Sequence[Tensor] | DoorstepError | None, final: bool) -> None:
    """Warm-up, and batches in tests: what comes later is not waited for."""


def error_response(request: InferenceRequest, error: DoorstepError, version: str = "") -> InferenceResponse:
    return InferenceResponse(request.model_name, version or request.model_version, request.id, error=error)


def cancelled_error() -> Cancelled:
    return Cancelled("request has been cancelled")
