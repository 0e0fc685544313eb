"""InferenceResponse → the flat JSON of a generate call. Pure.

Every key stands at the top: what the response says of itself, its parameters, its outputs; in the order of their
names, as Triton writes them. An output of one element is that element, any other a flat list.
"""

from __future__ import annotations

import orjson

from doorstep.errors import DoorstepError
from doorstep.protocols.kserve.http_encode import json_data
from doorstep.request import InferenceResponse

EVENT, END = b"data: ", b"\n\n"  # before and after each object of a stream of server-sent events

_dumps = orjson.dumps


def encode_generate(response: InferenceResponse) -> bytes:
    """Raises DoorstepError for what cannot be said in JSON."""
    fields = {"model_name": _dumps(response.model_name), "model_version": _dumps(response.model_version)}
    if response.id:
        fields["id"] = _dumps(response.id)
    if response.parameters:
        for key, value in response.parameters.items():
            fields.setdefault(key, _dumps(value))
    for tensor in response.outputs:
        if tensor.name not in fields:
            data = json_data(tensor)
            fields[tensor.name] = data[1:-1] if tensor.array.size == 1 else data
    return b"{%b}" % b",".join([b"%b:%b" % (_dumps(key), fields[key]) for key in sorted(fields)])


def encode_error(error: DoorstepError) -> bytes:
    return _dumps({"error": error.message})
