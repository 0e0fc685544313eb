"""Requests that differ from an earlier one in nothing but their tensor's bytes are not parsed again. Pure.

A client in a loop sends the same message over and over, but for the raw tensor at its end. Everything before that, the
tensor's tag and length among it, decides what the message says (a parser of protobuf has read no further by then), so
those bytes are the key, and what was parsed from them is kept. Requests with an id, parameters, BYTES, or several
tensors are parsed every time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from doorstep.protocols.kserve.protobuf_wire import split_field
from doorstep.protocols.kserve.wanted import Wanted
from doorstep.request import InferenceRequest
from doorstep.types import Array, DataType

LARGEST = 32_768  # bytes of a message; larger ones are split anyway
_KEPT = 256
_RAW_INPUT_CONTENTS = 7

_ndarray = np.ndarray


class Template:
    """What all messages with the same beginning say."""

    __slots__ = ("_dtype", "_shape", "datatype", "input_name", "model_name", "model_version", "offset",
                 "requested_outputs", "wanted")  # fmt: skip

    def __init__(self, request: InferenceRequest, wanted: Wanted, offset: int) -> None:
        (tensor,) = request.inputs.values()
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.requested_outputs = request.requested_outputs
        self.wanted = wanted
        self.input_name = tensor.name
        self.datatype: DataType = tensor.datatype
        self.offset = offset  # where the tensor's bytes begin
        self._shape = tensor.array.shape
        self._dtype = tensor.datatype.numpy

    def array(self, message: bytes) -> Array:
        """A view on the tensor in `message`, which `find` has found to be one of this template's."""
        return _ndarray(self._shape, self._dtype, message, self.offset)


class Templates:
    """Touched only from the event loop."""

    __slots__ = ("_by_head", "_offsets")

    def __init__(self) -> None:
        self._by_head: dict[bytes, Template] = {}
        self._offsets: dict[int, int] = {}  # length of a message → where its tensor began, the last time

    def find(self, message: bytes) -> Template | None:
        offset = self._offsets.get(len(message))
        return None if offset is None else self._by_head.get(message[:offset])

    def learn(self, message: bytes, parsed: Any, request: InferenceRequest, wanted: Wanted) -> None:
        """Remembers a message that `decode_infer` has accepted, if it is of the simple kind."""
        if (
            len(message) > LARGEST
            or request.id
            or parsed.parameters
            or len(parsed.raw_input_contents) != 1
            or len(request.inputs) != 1
        ):
            return
        (tensor,) = request.inputs.values()
        size = len(parsed.raw_input_contents[0])
        if not size or tensor.datatype.itemsize == 0 or tensor.array.nbytes != size or parsed.inputs[0].parameters:
            return
        parts = split_field(message, _RAW_INPUT_CONTENTS)
        if parts is None or not message.startswith(parts[0]):
            return  # something comes after the tensor
        offset = len(message) - size
        if len(self._by_head) >= _KEPT or len(self._offsets) >= _KEPT:
            self._by_head.clear()
            self._offsets.clear()
        self._offsets[len(message)] = offset
        self._by_head[message[:offset]] = Template(request, wanted, offset)
