"""How a record of traces is written in Triton's trace files (server, tracer.cc). Writes nothing anywhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from doorstep.trace import HTTP, RESPONSE_COMPLETE, Event, Record, TensorEvent, Trace
from doorstep.types import BF16, BOOL, BYTES, FP16, FP32, FP64, Tensor


def record_text(record: Record) -> str:
    """The objects of one record, without the array they belong in. "" if nothing was stamped.

    Children come before their parents, and the events of one trace one by one, as Triton writes them."""
    parts: list[str] = []
    for trace in reversed(record.traces):
        parts.extend(_objects(record, trace))
    return ",".join(parts)


def _objects(record: Record, trace: Trace) -> Iterator[str]:
    root = trace.parent is None
    waiting = [event for event in trace.events if event[0] in ("REQUEST_START", "QUEUE_START")]
    rest = trace.events[len(waiting) :]
    over_http = root and record.front is HTTP
    # Over HTTP the events of the front stand where they happen, over gRPC all of them at the end.
    complete = [event for event in record.sending if event[0] == RESPONSE_COMPLETE] if over_http else []
    if over_http:
        yield from _stamps(trace, record.arrival)
    if trace.events:
        yield _description(trace)
    yield from _stamps(trace, waiting)
    for kept in trace.tensors:
        yield _tensor_object(trace, kept)
    yield from _stamps(trace, (*complete, *rest))
    if over_http:
        yield from _stamps(trace, record.sending[len(complete) :])
    elif root:
        yield from _stamps(trace, (*record.arrival, *record.sending))


def _description(trace: Trace) -> str:
    fields: dict[str, Any] = {"id": trace.id, "model_name": trace.model_name}
    fields["model_version"] = int(trace.model_version) if trace.model_version.isdecimal() else -1
    if trace.request_id:
        fields["request_id"] = trace.request_id
    if trace.parent_id:
        fields["parent_id"] = trace.parent_id
    return json.dumps(fields, separators=(",", ":"))


def _stamps(trace: Trace, events: Iterable[Event]) -> Iterator[str]:
    for name, ns in events:
        yield f'{{"id":{trace.id},"timestamps":[{{"name":"{name}","ns":{ns}}}]}}'


def _tensor_object(trace: Trace, event: TensorEvent) -> str:
    tensor = event.tensor
    fields = {
        "name": tensor.name,
        "data": tensor_data(tensor),
        "shape": ",".join(map(str, tensor.shape)),
        "dtype": tensor.datatype.name,
    }
    text = json.dumps(fields, separators=(",", ":"))
    return f'{{"id":{trace.id},"activity":"{event.activity}","tensor":{text}}}'


def tensor_data(tensor: Tensor) -> str:
    """The elements, separated by commas: numbers as C++ prints them, BYTES in quotes; nothing of 16-bit floats."""
    array = tensor.array.reshape(-1)
    datatype = tensor.datatype
    if datatype is BYTES:
        return ",".join(f'"{_text(element)}"' for element in array.tolist())
    if datatype in (FP16, BF16):
        return ""
    if datatype in (FP32, FP64):
        return ",".join(f"{number:g}" for number in array.tolist())
    if datatype is BOOL:
        return ",".join("1" if element else "0" for element in array.tolist())
    return ",".join(map(str, array.tolist()))


def _text(element: Any) -> str:
    return element.decode("utf-8", "backslashreplace") if isinstance(element, bytes) else str(element)
