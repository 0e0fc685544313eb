"""A record of traces as OpenTelemetry spans, in OTLP's JSON encoding. Sends nothing.

Spans, their names, events and attributes are Triton's (server, tracer.cc): `InferRequest` for what a client sent, under
it one span per model that the request came to, and under that `compute`. A language model's has one more, by
OpenTelemetry's own names: `chat <model>`. (opentelemetry-proto, trace.proto; semantic conventions, gen-ai)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from doorstep.trace import Event, Record, Trace, new_span_id

SCOPE = "triton-server"  # what Triton's tracer is called
_SERVER_KIND = 2
_INTERNAL_KIND = 1
_COMPUTE = ("COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")

Span = dict[str, Any]


def spans_of(record: Record) -> list[Span]:
    assert record.span is not None
    spans = []
    for trace in record.traces:
        if trace.parent is None:
            spans.append(_root(record))
        spans.extend(_model_spans(record, trace))
    return spans


def _root(record: Record) -> Span:
    context = record.span
    assert context is not None
    events = [*record.arrival, *record.sending]
    times = [ns for _, ns in (*events, *record.traces[0].events)]
    span = _span(record, "InferRequest", context.root_span_id, context.parent_span_id, times, events)
    if context.tracestate:
        span["traceState"] = context.tracestate
    return span


def _model_spans(record: Record, trace: Trace) -> Iterable[Span]:
    if not trace.model_name:
        return
    assert record.span is not None
    own = [event for event in trace.events if event[0] not in _COMPUTE]
    compute = [event for event in trace.events if event[0] in _COMPUTE]
    parent = trace.parent.span_id if trace.parent is not None else record.span.root_span_id
    span = _span(record, trace.model_name, trace.span_id, parent, [ns for _, ns in trace.events], own)
    attributes: dict[str, Any] = {
        "triton.model_name": trace.model_name,
        "triton.model_version": int(trace.model_version) if trace.model_version.isdecimal() else -1,
        "triton.trace_id": trace.id,
        "triton.trace_parent_id": trace.parent_id,
    }
    if trace.request_id:
        attributes["triton.request_id"] = trace.request_id
    span["attributes"] = attributes_of(attributes)
    yield span
    if compute:
        yield _span(record, "compute", new_span_id(), trace.span_id, [ns for _, ns in compute], compute)
    if trace.generation:
        said = trace.generation
        name = f"{said['gen_ai.operation.name']} {said['gen_ai.request.model']}"
        generation = _span(record, name, new_span_id(), trace.span_id, [ns for _, ns in compute or trace.events], ())
        generation["kind"] = _INTERNAL_KIND  # the model runs here
        generation["attributes"] = attributes_of(said)
        yield generation


def _span(record: Record, name: str, span_id: str, parent: str, times: Sequence[int], events: Iterable[Event]) -> Span:
    assert record.span is not None
    origin = record.origin
    span: Span = {
        "traceId": record.span.trace_id,
        "spanId": span_id,
        "name": name,
        "kind": _SERVER_KIND,
        "startTimeUnixNano": str(origin + min(times, default=0)),
        "endTimeUnixNano": str(origin + max(times, default=0)),
        "events": [{"timeUnixNano": str(origin + ns), "name": event} for event, ns in events],
    }
    if parent:
        span["parentSpanId"] = parent
    return span


def attributes_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of texts, numbers, and lists of them."""
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Any) -> dict[str, Any]:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            return {"intValue": str(value)}
        case float():
            return {"doubleValue": value}
        case list():
            return {"arrayValue": {"values": [_value(one) for one in value]}}
        case _:
            return {"stringValue": str(value)}


def export_request(spans: Sequence[Span], resource: Mapping[str, str]) -> dict[str, Any]:
    """The body of a POST: ExportTraceServiceRequest."""
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": attributes_of(resource)},
                "scopeSpans": [{"scope": {"name": SCOPE}, "spans": list(spans)}],
            }
        ]
    }
