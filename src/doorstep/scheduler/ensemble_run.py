"""One request on its way through an ensemble: the tensors there are, the steps under way, the answers. Knows no graph
but the plan it is given.

Where a step's model is decoupled, each of its responses begins a round of its own for whatever comes after it: a step
takes its inputs from one round, and an answer goes out when a round has all outputs.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any

from doorstep.errors import DoorstepError, FailureReason, InvalidArgument
from doorstep.request import InferenceRequest, InferenceResponse, Parameter, cancelled_error
from doorstep.scheduler.ensemble_graph import Binding, BoundStep, Plan, Step
from doorstep.stats import ComputeTally
from doorstep.types import Tensor

if TYPE_CHECKING:
    from doorstep.scheduler.ensemble import EnsembleScheduler

logger = logging.getLogger("doorstep.model")

Marks = tuple[int | str, bool, bool]  # correlation id, first of its sequence, last of it


class EnsembleError(DoorstepError):
    """A step's failure as the ensemble tells it; the step has been named."""


class Round:
    """The tensors that belong together, and how many each step still waits for."""

    __slots__ = ("held", "marks", "missing", "number", "outputs_missing", "uses", "values")

    def __init__(self, plan: Plan, number: int) -> None:
        self.number = number
        self.values: list[Tensor | None] = [None] * len(plan.uses)  # None as well for an optional one left out
        self.uses = list(plan.uses)
        self.missing = list(plan.missing)
        self.outputs_missing = len(plan.outputs)
        self.held = 0  # values that somebody has still to take
        self.marks: dict[int, Marks] | None = None  # of tensors whose response set another sequence than the request's

    def take(self, tensor: int) -> None:
        uses = self.uses
        uses[tensor] -= 1
        if not uses[tensor]:
            self.values[tensor] = None
            self.held -= 1


class StepRequest(InferenceRequest):
    """A step under way: the request to its model, and the sender of that request's responses."""

    __slots__ = ("at_once", "marks", "round", "run", "step")

    def __init__(
        self,
        run: EnsembleRun,
        whole: InferenceRequest,
        step: BoundStep,
        round_: Round,
        inputs: dict[str, Tensor],
        tally: ComputeTally,
        now: int,
    ) -> None:
        # Every field of a request is set here, once, and not by its own constructor first: there is one for each step.
        self.run = run
        self.step = step
        self.round = round_
        self.marks: Marks | None = None
        self.at_once = False
        self.model_name = step.model
        self.model_version = step.version
        self.id = whole.id
        self.inputs = inputs
        self.requested_outputs = step.requested
        self.parameters = whole.parameters
        self.sender = self
        self.received_ns = now
        self.rows = 1
        self.batch_key = None
        self.queued_ns = 0
        self.priority = whole.priority
        self.timeout_us = whole.timeout_us
        self.deadline_ns = 0
        self.correlation_id = whole.correlation_id
        self.sequence_start = whole.sequence_start
        self.sequence_end = whole.sequence_end
        self.cancelled = False
        self.on_cancel = None
        self.stalled = False
        self.on_room = None
        self.slot = None
        self.tally = tally
        self.tenant = whole.tenant
        self.trace = None

    def send(self, response: InferenceResponse, final: bool) -> None:
        if final:
            self.sender = _NOBODY  # it was itself: not left to the garbage collector
        self.run.received(self, response, final)


class _Nobody:
    def send(self, response: InferenceResponse, final: bool) -> None: ...


_NOBODY = _Nobody()


class EnsembleRun:
    """See the module."""

    __slots__ = (
        "_advancing", "_answered", "_binding", "_calls", "_counts", "_over", "_owner", "_plan", "_ready", "_request",
        "_rounds", "_sent", "_start_ns", "_started", "_tally", "_waiting",
    )  # fmt: skip

    def __init__(self, owner: EnsembleScheduler, request: InferenceRequest, plan: Plan) -> None:
        self._owner = owner
        self._request = request
        self._plan = plan
        self._binding: Binding | None = None
        self._start_ns = request.queued_ns
        self._tally = ComputeTally()
        self._rounds: dict[int, Round] = {}
        self._counts: dict[int, int] = {}  # responses of each decoupled step
        self._calls: set[StepRequest] = set()
        self._ready: deque[tuple[int, Round]] = deque()
        self._waiting = 0  # steps that max_inflight_requests holds back
        self._advancing = False
        self._started = False  # a step; the first may share its batch with requests that come in this turn of the loop
        self._sent = False  # at least one response
        self._answered = False  # the final one, or an error
        self._over = False  # answered, and no step is under way

    def start(self, binding: Binding) -> None:
        """Begins every step whose inputs the request brings."""
        self._binding = binding
        for model in binding.distinct:
            model.hold()
        request = self._request
        request.on_cancel = self.cancel
        self._start_ns = self._owner.clock()
        first = self._round(0)
        inputs = request.inputs
        complete = False
        for name, tensor, reshape in self._owner.graph.inputs:
            given = inputs.get(name)
            if given is None and name in self._owner.required:
                continue  # whoever waits for it waits in vain, and the request fails
            if given is not None and reshape is not None:
                given = Tensor(name, given.datatype, reshape(given.array))
            complete |= self._put(first, tensor, given)
        if complete:
            self._emit(first, final=not self._owner.decoupled)
        self._advance()

    # What comes

    def received(self, call: StepRequest, response: InferenceResponse, final: bool) -> None:
        """A response to one of the steps."""
        if final:
            self._calls.discard(call)
            if self._owner.limits is not None:
                self._owner.limits[call.step.index].release()
        if self._answered:
            self._end_if_over()
            return
        if response.error is not None:
            self.fail(response.error, call.step.step)
            return
        complete = None
        if not response.flag_only:
            try:
                complete = self._store(call, response)
            except DoorstepError as error:
                self.fail(error, call.step.step)
                return
        if complete is not None:
            owed = not self._owner.decoupled or not (self._calls or self._ready or self._waiting)
            self._emit(complete, final=owed)
        if not self._advancing:
            self._advance()

    def _store(self, call: StepRequest, response: InferenceResponse) -> Round | None:
        """Puts what the step gave where others look for it. Returns the round whose outputs are now all there."""
        step = call.step
        round_ = call.round
        if step.streams:
            number = self._counts.get(step.index, 0)
            self._counts[step.index] = number + 1
            round_ = self._round(number)
        marks = call.marks
        if response.parameters:
            marks = _marks_of(response.parameters, self._request, marks)
        if marks is not None:
            round_.marks = {**(round_.marks or {}), **{tensor: marks for _, tensor in step.outputs}}
        given = response.outputs
        complete = False
        for name, tensor in step.outputs:
            for value in given:
                if value.name == name:
                    break
            else:  # it counts as given to steps that can do without
                complete |= self._put(round_, tensor, None)
                continue
            complete |= self._put(round_, tensor, value)
        return round_ if complete else None

    def _put(self, round_: Round, tensor: int, value: Tensor | None) -> bool:
        """True where this was the last of the round's outputs."""
        plan = self._plan
        takers = plan.consumers[tensor]
        uses = plan.uses[tensor]
        if not uses:
            return False
        round_.values[tensor] = value
        round_.held += 1
        for step in takers:
            round_.missing[step] -= 1
            if not round_.missing[step]:
                self._ready.append((step, round_))
        if uses > len(takers):
            round_.outputs_missing -= 1
            return not round_.outputs_missing
        return False

    def _round(self, number: int) -> Round:
        found = self._rounds.get(number)
        if found is None:
            found = self._rounds[number] = Round(self._plan, number)
        return found

    # What goes

    def _advance(self) -> None:
        """Sends the steps that are ready. Those that are answered at once make others ready, without recursion."""
        self._advancing = True
        limits = self._owner.limits
        while self._ready and not self._answered:
            step, round_ = self._ready.popleft()
            if limits is None or limits[step].admit(self, step, round_):
                self._begin(step, round_)
            else:
                self._waiting += 1
                self._stall()
        self._advancing = False
        if not self._calls and not self._waiting:
            self._finish()

    def admitted(self, step: int, round_: Round) -> None:
        """It is the turn of a step that waited."""
        self._waiting -= 1
        if not self._waiting and not self._request.stalled:
            self._resume(self._request)
        self._begin(step, round_)
        if not self._advancing and not self._calls:
            self._advance()

    def _begin(self, index: int, round_: Round) -> None:
        binding, whole, owner = self._binding, self._request, self._owner
        assert binding is not None
        step = binding.steps[index]
        inputs: dict[str, Tensor] = {}
        values = round_.values
        value: Tensor | None = None
        for name, tensor, convert in step.inputs:
            value = values[tensor]
            if value is not None:
                array = value.array if convert is None else convert(value.array)
                inputs[name] = value = Tensor(name, value.datatype, array)
        request = StepRequest(self, whole, step, round_, inputs, self._tally, owner.clock())
        request.at_once = owner.is_alone and self._started
        self._started = True
        if round_.marks and (marks := self._marks_for(step, round_)) is not None:
            request.marks = marks
            request.correlation_id, request.sequence_start, request.sequence_end = marks
        uses = round_.uses
        for tensor in step.taken:
            uses[tensor] -= 1
            if not uses[tensor]:
                values[tensor] = None
                round_.held -= 1
        if not round_.held:
            self._rounds.pop(round_.number, None)
        if whole.trace is not None:
            request.trace = whole.trace.child(request)
        self._calls.add(request)
        try:
            if len(inputs) != 1 or value is None:
                step.infer(request)
            elif value.array.shape == step.shape and value.datatype is step.datatype:
                request.rows = step.rows
                step.enqueue(request)
            else:
                step.infer(request)
                if len(step.inputs) == 1:
                    step.shape, step.datatype, step.rows = value.array.shape, value.datatype, request.rows
        except DoorstepError as error:
            self._calls.discard(request)
            if request.trace is not None:
                request.sender.release()  # type: ignore[attr-defined]  # the trace stands before the request
            request.sender = _NOBODY
            if owner.limits is not None:
                owner.limits[index].release()
            self.fail(error, step.step)

    def _marks_for(self, step: BoundStep, round_: Round) -> Marks | None:
        """The sequence that the step's inputs belong to, where a response has set it."""
        found: Marks | None = None
        for _, tensor, _ in step.inputs:
            marks = (round_.marks or {}).get(tensor)
            if found is not None and marks not in (None, found):
                logger.warning("ensemble '%s': inputs of %r belong to different sequences", self._owner.name, step.step)
            found = found or marks
        return found

    def _let_go(self, round_: Round) -> None:
        """Long streams have many rounds."""
        if not round_.held:
            self._rounds.pop(round_.number, None)

    def _emit(self, round_: Round, *, final: bool) -> None:
        """Answers with the outputs of a round."""
        binding = self._binding
        assert binding is not None
        outputs = []
        marks: Marks | None = None
        for name, tensor, convert in binding.outputs:
            value = round_.values[tensor]
            if value is not None:
                outputs.append(Tensor(name, value.datatype, value.array if convert is None else convert(value.array)))
            if round_.marks:
                marks = round_.marks.get(tensor, marks)
            round_.take(tensor)
        self._let_go(round_)
        request = self._request
        correlation_id, start, end = marks or (request.correlation_id, request.sequence_start, request.sequence_end)
        # Every answer of an ensemble says where in its sequence it is, as Triton's do.
        parameters: dict[str, Parameter] = {
            "sequence_id": correlation_id,
            "sequence_start": start,
            "sequence_end": end,
        }
        owner = self._owner
        self._sent = True
        self._send(InferenceResponse(owner.name, owner.version, request.id, outputs, parameters=parameters), final)
        if request.stalled and not final:
            request.on_room = self._resume
            self._stall()

    # Back-pressure: a step that streams pauses while the client, or a step that is at its limit, cannot keep up

    def _stall(self) -> None:
        binding = self._binding
        if binding is not None:
            for call in self._calls:
                if call.step.streams:
                    call.stalled = True

    def _resume(self, request: InferenceRequest) -> None:
        if not self._waiting:
            for call in tuple(self._calls):
                call.room()

    # Ends

    def _finish(self) -> None:
        """Nothing is under way, and nothing more can be."""
        if not self._answered:
            owner, request = self._owner, self._request
            if owner.decoupled or self._sent:
                self._send(InferenceResponse(owner.name, owner.version, request.id, flag_only=True), True)
            else:
                text = "unexpected deadlock, at least one output is not set while no more ensemble steps can be made"
                self.fail(InvalidArgument(f"[request id: {request.id or '<id_unknown>'}] {text}"), None)
                return
        self._end_if_over()

    def fail(self, error: DoorstepError, step: Step | None) -> None:
        """Answers with Triton's words for the failure of a step. What else is under way is told to stop."""
        if self._answered:
            self._end_if_over()
            return
        text = f"in ensemble '{self._owner.name}', {error.message}"
        if step is not None and not isinstance(error, EnsembleError):
            text += f" ({step!r})"
        told = EnsembleError(text, code=error.code)
        owner = self._owner
        self._send(InferenceResponse(owner.name, owner.version, self._request.id, error=told), True)
        self._stop_steps()

    def cancel(self, request: InferenceRequest) -> None:
        """Answers at once; the steps under way are cancelled, and none is begun."""
        owner = self._owner
        error = cancelled_error()
        self._send(InferenceResponse(owner.name, owner.version, request.id, error=error), True)
        self._stop_steps()

    def _stop_steps(self) -> None:
        self._ready.clear()
        if self._waiting and self._owner.limits is not None:
            for limit in self._owner.limits:
                self._waiting -= limit.forget(self)
        for call in tuple(self._calls):
            call.cancel()
        self._end_if_over()

    def _send(self, response: InferenceResponse, final: bool) -> None:
        request = self._request
        if final:
            self._answered = True
            request.on_cancel = None
            self._record(response.error)
        request.sender.send(response, final)

    def _record(self, error: DoorstepError | None) -> None:
        request, stats, tally = self._request, self._owner.stats, self._tally
        total_ns = self._owner.clock() - request.received_ns
        if error is not None:
            # Why a step failed is counted with the step's model, as in Triton.
            reason = error.reason if error.reason is FailureReason.CANCELED else FailureReason.OTHER
            stats.record_failure(total_ns, reason)
            return
        rows = request.rows if self._owner.batches else 1
        stats.record_batch(max(rows, 1), tally.input_ns, tally.infer_ns, tally.output_ns)
        waited = [(total_ns, self._start_ns - request.queued_ns)]
        stats.record_successes(waited, tally.input_ns, tally.infer_ns, tally.output_ns)
        if request.tally is not None:
            request.tally.add(tally.input_ns, tally.infer_ns, tally.output_ns)

    def _end_if_over(self) -> None:
        """Lets go of the models when the last step has ended, too."""
        if self._over or self._calls or self._waiting or not self._answered or self._advancing:
            return
        self._over = True
        owner, binding = self._owner, self._binding
        self._binding = None
        self._rounds.clear()
        if binding is not None:
            for model in binding.distinct:
                model.release()
        owner.ended()


def _marks_of(parameters: dict[str, Parameter], request: InferenceRequest, marks: Marks | None) -> Marks | None:
    """The sequence that a response says its outputs belong to, where it does."""
    if not parameters.keys() & {"sequence_id", "sequence_start", "sequence_end"}:
        return marks
    correlation_id: Any = parameters.get("sequence_id", marks[0] if marks is not None else request.correlation_id)
    if isinstance(correlation_id, (bool, float)):
        raise InvalidArgument(
            "expected parameter 'sequence_id' to be TRITONSERVER_PARAMETER_INT or TRITONSERVER_PARAMETER_STRING"
        )
    flags = []
    for name in ("sequence_start", "sequence_end"):
        value = parameters.get(name, False)
        if not isinstance(value, bool):
            raise InvalidArgument(f"expect parameter '{name}' to be TRITONSERVER_PARAMETER_BOOL")
        flags.append(value)
    return correlation_id, flags[0], flags[1]
