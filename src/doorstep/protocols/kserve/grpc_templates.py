"""Templates of gRPC messages: what stands before one raw tensor, its tag and length included, is the key. Pure.

A parser of protobuf that has read so far has decided all but the tensor's bytes, so messages that begin alike, and are
of one length, mean the same.
"""

from __future__ import annotations

from typing import Any

from doorstep.protocols.kserve.protobuf_wire import split_field
from doorstep.protocols.kserve.templates import KEPT, Template, is_simple
from doorstep.protocols.kserve.wanted import Wanted
from doorstep.request import InferenceRequest

LARGEST = 32_768  # bytes of a message; larger ones are split anyway
_RAW_INPUT_CONTENTS = 7


class MessageTemplate(Template):
    """Touched only from the event loop."""

    __slots__ = ("model_name", "model_version", "offset")

    def __init__(self, request: InferenceRequest, wanted: Wanted, offset: int) -> None:
        super().__init__(request, wanted)
        self.model_name = request.model_name
        self.model_version = request.model_version
        self.offset = offset  # where the tensor's bytes begin


class GrpcTemplates:
    """Touched only from the event loop."""

    __slots__ = ("_by_head", "_offsets")

    def __init__(self) -> None:
        self._by_head: dict[bytes, MessageTemplate] = {}
        self._offsets: dict[int, int] = {}  # length of a message → where its tensor began, the last time

    def find(self, message: bytes) -> MessageTemplate | None:
        offset = self._offsets.get(len(message))
        return None if offset is None else self._by_head.get(message[:offset])

    def learn(self, message: bytes, parsed: Any, request: InferenceRequest, wanted: Wanted) -> None:
        """Remembers a message that `decode_infer` has accepted, if it is of the simple kind."""
        if len(message) > LARGEST or parsed.parameters or len(parsed.raw_input_contents) != 1 or not is_simple(request):
            return
        (tensor,) = request.inputs.values()
        size = len(parsed.raw_input_contents[0])
        if tensor.array.nbytes != size or parsed.inputs[0].parameters:
            return
        parts = split_field(message, _RAW_INPUT_CONTENTS)
        if parts is None or not message.startswith(parts[0]):
            return  # something comes after the tensor
        offset = len(message) - size
        if len(self._by_head) >= KEPT or len(self._offsets) >= KEPT:
            self._by_head.clear()
            self._offsets.clear()
        self._offsets[len(message)] = offset
        self._by_head[message[:offset]] = MessageTemplate(request, wanted, offset)
