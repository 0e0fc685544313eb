"""What became of one request, event by event, for those that are sampled. Knows no file, no exporter and no setting.

`request.trace` is None for the others, and while nothing may be sampled `InferenceServer.tracer` is: a request pays one
attribute test for each. A front lets the tracer `begin`; from then on the trace finds its own way: `Model.infer`, the
runner and the sender stamp it, ensembles and models that call models give it children, and when the last of them has
ended the whole record goes to whoever writes it. Names and their order are Triton's (server, tracer.cc).
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from doorstep.request import Batch, InferenceRequest, InferenceResponse, ResponseSender
from doorstep.types import Tensor

Event = tuple[str, int]  # what, and when: time.monotonic_ns()

_ids = itertools.count(1)  # 0 is nobody's: it stands for "no parent"


@dataclass(frozen=True, slots=True)
class Front:
    """What the events of one protocol are called."""

    received: tuple[str, str]
    sent: tuple[str, str]


HTTP = Front(("HTTP_RECV_START", "HTTP_RECV_END"), ("HTTP_SEND_START", "HTTP_SEND_END"))
GRPC = Front(("GRPC_WAITREAD_START", "GRPC_WAITREAD_END"), ("GRPC_SEND_START", "GRPC_SEND_END"))
RESPONSE_COMPLETE = "INFER_RESPONSE_COMPLETE"


class Tracer(Protocol):
    """What fronts ask while anything may be sampled. Called on the event loop only."""

    def begin(self, request: InferenceRequest, front: Front, headers: Mapping[bytes, bytes]) -> None:
        """Decides whether `request` is traced; if so, sets its `trace` and puts itself before its `sender`.

        Once per request, as soon as its model is known. `headers` may carry the caller's W3C trace context."""


class SpanContext:
    """The W3C trace context a record belongs to. Where the caller had none, it begins one."""

    __slots__ = ("flags", "parent_span_id", "root_span_id", "trace_id", "tracestate")

    def __init__(self, trace_id: str = "", parent_span_id: str = "", flags: str = "01", tracestate: str = "") -> None:
        self.trace_id = trace_id or os.urandom(16).hex()
        self.parent_span_id = parent_span_id  # the caller's span; "": there is no caller
        self.root_span_id = new_span_id()
        self.flags = flags
        self.tracestate = tracestate


def new_span_id() -> str:
    return os.urandom(8).hex()


class Record:
    """All traces of one request a client sent: its own, first, and those of the requests that came of it."""

    __slots__ = ("_open", "_write", "arrival", "front", "origin", "sending", "setting", "span", "tensors", "timestamps",
                 "traces")  # fmt: skip

    def __init__(
        self,
        write: Callable[[Record], None],
        setting: Any,
        front: Front,
        *,
        timestamps: bool,
        tensors: bool,
        span: SpanContext | None,
    ) -> None:
        self._write = write
        self._open = 0
        self.setting = setting  # the tracer's own note of the setting that it was sampled under
        self.front = front
        self.timestamps = timestamps
        self.tensors = tensors
        self.span = span  # None: spans are not wanted
        self.origin = time.time_ns() - time.monotonic_ns()  # what makes the events' times those of a calendar
        self.traces: list[Trace] = []
        self.arrival: list[Event] = []  # what the front stamped before and
        self.sending: list[Event] = []  # after the model had it; Triton's files keep them apart

    def arrived(self, start_ns: int) -> None:
        if self.timestamps:
            now = time.monotonic_ns()
            self.arrival = [(self.front.received[0], min(start_ns or now, now)), (self.front.received[1], now)]

    def sent(self, name: str) -> None:
        if self.timestamps:
            self.sending.append((name, time.monotonic_ns()))

    def opened(self, trace: Trace) -> None:
        self.traces.append(trace)
        self._open += 1

    def closed(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._write(self)


@dataclass(frozen=True, slots=True)
class TensorEvent:
    """The content of a tensor, of its own: what it was taken from may have changed since."""

    activity: str
    tensor: Tensor


class Trace:
    """What became of one request in one model. Touched only from the event loop."""

    __slots__ = (
        "_closed",
        "_queued",
        "events",
        "generation",
        "id",
        "model_name",
        "model_version",
        "parent",
        "record",
        "request_id",
        "span_id",
        "tensors",
    )

    def __init__(self, record: Record, parent: Trace | None = None) -> None:
        self.id = next(_ids)
        self.parent = parent
        self.record = record
        self.events: list[Event] = []
        self.tensors: list[TensorEvent] = []
        self.model_name = ""  # "": it never got as far as a model
        self.model_version = ""
        self.request_id = ""
        self.span_id = new_span_id() if record.span is not None else ""
        self.generation: dict[str, Any] = {}  # of a language model: OpenTelemetry's gen_ai attributes
        self._queued = False
        self._closed = False
        record.opened(self)

    @property
    def parent_id(self) -> int:
        return self.parent.id if self.parent is not None else 0

    @property
    def context(self) -> str:
        """What model code may send on with what it calls: W3C headers as JSON; "" where spans are not wanted."""
        span = self.record.span
        if span is None:
            return ""
        context = {"traceparent": f"00-{span.trace_id}-{self.span_id}-{span.flags}"}
        if span.tracestate:
            context["tracestate"] = span.tracestate
        return json.dumps(context, separators=(",", ":"))

    def stamp(self, name: str, ns: int = 0) -> None:
        if self.record.timestamps:
            self.events.append((name, ns or time.monotonic_ns()))

    def started(self, request: InferenceRequest, version: str) -> None:
        """A model of this version has the valid request, and is about to queue it."""
        self.model_name = request.model_name
        self.model_version = version
        self.request_id = request.id
        self.stamp("REQUEST_START")
        if self.record.tensors:
            self._keep("TENSOR_QUEUE_INPUT", request.inputs.values())

    def executed(self, request: InferenceRequest, batch: Batch) -> None:
        """The batch that it ran in has an answer for it."""
        self._queue_start(request)
        start_ns, end_ns = batch.compute_start_ns, batch.compute_end_ns
        if start_ns and end_ns:
            self.stamp("COMPUTE_START", start_ns)
            self.stamp("COMPUTE_INPUT_END", batch.input_end_ns or start_ns)
            self.stamp("COMPUTE_OUTPUT_START", batch.output_start_ns or end_ns)
            self.stamp("COMPUTE_END", end_ns)

    def asked(self, operation: str, model: str, body: Mapping[str, Any]) -> None:
        """A language model is asked to generate, by names of OpenAI's API. Nothing of the text is kept.

        Names are OpenTelemetry's (semantic conventions for generative AI)."""
        said = self.generation
        said["gen_ai.operation.name"] = operation
        said["gen_ai.request.model"] = model
        for name in ("max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed"):
            if name in body:
                said[f"gen_ai.request.{name}"] = body[name]
        if "stop" in body:
            said["gen_ai.request.stop_sequences"] = list(body["stop"])

    def generated(self, finish: str, tokens: Mapping[str, int], seconds: Mapping[str, float]) -> None:
        """It has answered, or given up. `tokens` by input, output and cached; `seconds` of each phase that came."""
        said = self.generation
        said.setdefault("gen_ai.operation.name", "text_completion")
        said.setdefault("gen_ai.request.model", self.model_name)
        said["gen_ai.provider.name"] = "doorstep"
        said["gen_ai.response.model"] = self.model_name
        said["gen_ai.response.finish_reasons"] = [finish]
        said["gen_ai.usage.input_tokens"] = tokens["input"]
        said["gen_ai.usage.output_tokens"] = tokens["output"]
        said["gen_ai.usage.cache_read.input_tokens"] = tokens["cached"]
        said |= {f"gen_ai.latency.{name}": value for name, value in seconds.items()}

    def streamed(self, request: InferenceRequest, start_ns: int, now: int) -> None:
        """It has had its last response, of which there may have been several."""
        self._queue_start(request)
        self.stamp("COMPUTE_START", start_ns)
        self.stamp("COMPUTE_INPUT_END", start_ns)
        self.stamp("COMPUTE_OUTPUT_START", now)
        self.stamp("COMPUTE_END", now)

    @classmethod
    def begun(cls, record: Record, request: InferenceRequest) -> Trace:
        """The first trace of a record: that of the request a client sent."""
        trace = cls(record)
        record.arrived(request.received_ns)
        request.trace = trace
        request.sender = TracedSender(trace, request, request.sender, record.front)
        return trace

    def child(self, request: InferenceRequest) -> Trace:
        """The trace of a request that comes of this one; it stands before the sender of `request` from now on."""
        trace = Trace(self.record, self)
        request.sender = TracedSender(trace, request, request.sender, None)
        return trace

    def answered(self, request: InferenceRequest, response: InferenceResponse) -> None:
        if self.record.tensors:
            self._keep("TENSOR_BACKEND_OUTPUT", response.outputs)

    def ended(self, request: InferenceRequest) -> None:
        """Its last response is about to be sent."""
        if self.model_name:
            self._queue_start(request)
            self.stamp("REQUEST_END")

    def refused(self, request: InferenceRequest) -> None:
        """Its front, or its model, would not take the request."""
        request.trace = None
        self.ended(request)
        self.close()

    def close(self) -> None:
        """Nothing more comes. May be called again."""
        if not self._closed:
            self._closed = True
            self.record.closed()

    def _queue_start(self, request: InferenceRequest) -> None:
        if not self._queued and request.queued_ns:
            self._queued = True
            self.stamp("QUEUE_START", request.queued_ns)

    def _keep(self, activity: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            copy = Tensor(tensor.name, tensor.datatype, np.array(tensor.array))
            self.tensors.append(TensorEvent(activity, copy))


class TraceContext:
    """What a worker process knows of a request's trace: stands for it there, as `request.trace`."""

    __slots__ = ("context",)

    def __init__(self, context: str) -> None:
        self.context = context  # Trace.context


class TracedSender:
    """Stamps what is sent, and sends it on. Touched only from the event loop."""

    __slots__ = ("_front", "_inner", "_request", "_trace")

    def __init__(self, trace: Trace, request: InferenceRequest, inner: ResponseSender, front: Front | None) -> None:
        """`front`: the protocol it goes out by; None: to a model of this server."""
        self._trace = trace
        self._request: InferenceRequest | None = request  # until the end: it holds this one
        self._inner = inner
        self._front = front

    def send(self, response: InferenceResponse, final: bool) -> None:
        trace, front, request = self._trace, self._front, self._request
        if request is None:
            return
        trace.answered(request, response)
        if front is None:
            if final:
                self._end(trace, request)
            self._inner.send(response, final)
            if final:
                trace.close()
            return
        record = trace.record
        silent = response.flag_only  # says only that no more comes: nothing goes out for it
        if not silent and not record.sending:  # of several responses Triton notes the first
            record.sent(RESPONSE_COMPLETE)
        if final:
            self._end(trace, request)
        if not silent:
            record.sent(front.sent[0])
        self._inner.send(response, final)
        if not silent:
            record.sent(front.sent[1])
        if final:
            trace.close()

    def _end(self, trace: Trace, request: InferenceRequest) -> None:
        trace.ended(request)
        self._request = None
        request.trace = None

    def release(self) -> None:
        """The front lets go of the client: the request was not taken."""
        self._give_up("release")

    def refuse(self) -> None:
        """Likewise, with what it had lent."""
        self._give_up("refuse")

    def _give_up(self, how: str) -> None:
        request, self._request = self._request, None
        if request is not None and request.trace is not None:
            request.trace.refused(request)
        inner = getattr(self._inner, how, None)  # a call from inside the server has nothing to let go of
        if inner is not None:
            inner()
