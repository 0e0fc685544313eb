"""The responses of one request that differ in nothing but one tensor's bytes are put together once. Pure.

A model that streams says the same thing over and over: its name, the request's id, an output's name and shape. Only
what follows is new, and the lengths before it, where it is longer or shorter than the last.
"""

from __future__ import annotations

from doorstep.protocols.kserve.grpc_encode import RAW, STREAMED, final_flag, opening, output
from doorstep.protocols.kserve.protobuf_wire import varint
from doorstep.protocols.kserve.tensor_bytes import tensor_bytes
from doorstep.request import InferenceResponse
from doorstep.types import DataType
from doorstep.wire.grpc_codec import prefix

LARGEST = 4096  # bytes of a tensor; a larger one is not copied
_KEPT = 256  # lengths


class ResponseTemplate:
    """Of one decoupled request. Touched only from the event loop."""

    __slots__ = ("_beginnings", "_datatype", "_head", "_name", "_opening", "_shape")

    def __init__(self, response: InferenceResponse) -> None:
        """What `response` says of itself holds for all of the request's."""
        self._opening = opening(response.model_name, response.model_version, response.id)
        self._name = ""
        self._datatype: DataType | None = None
        self._shape: tuple[int, ...] = ()
        self._head = b""
        self._beginnings: dict[int, bytes] = {}  # length of the tensor's bytes → all that stands before them

    def frame(self, response: InferenceResponse) -> bytes | None:
        """The whole gRPC message, its length in front; None for a response that is not of the simple kind."""
        if len(response.outputs) != 1 or response.parameters or response.error is not None:
            return None
        tensor = response.outputs[0]
        array = tensor.array
        if array.nbytes > LARGEST:
            return None
        if array.shape != self._shape or tensor.name != self._name or tensor.datatype is not self._datatype:
            self._name, self._datatype, self._shape = tensor.name, tensor.datatype, array.shape
            self._head = self._opening + final_flag(False) + output(tensor.name, tensor.datatype, array.shape)
            self._beginnings.clear()
        try:
            data = tensor_bytes(tensor)
        except Exception:  # said by whoever encodes it at leisure
            return None
        size = len(data)
        beginning = self._beginnings.get(size)
        if beginning is None:
            beginning = self._begin(size)
        return beginning + data

    def _begin(self, size: int) -> bytes:
        inner = self._head + RAW + varint(size)
        outer = STREAMED + varint(len(inner) + size) + inner
        if len(self._beginnings) >= _KEPT:
            self._beginnings.clear()
        made = self._beginnings[size] = prefix(len(outer) + size) + outer
        return made
