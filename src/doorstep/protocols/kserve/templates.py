"""Requests that differ from an earlier one in nothing but their tensor's bytes are not parsed again. Pure.

A client in a loop sends the same request over and over, but for the binary tensor at its end. What stands before that
decides what the request says; so those bytes are the key, and what was parsed from them is kept. Requests with an id,
parameters, BYTES, or several tensors are parsed every time.
"""

from __future__ import annotations

import numpy as np

from doorstep.protocols.kserve.wanted import Wanted
from doorstep.request import InferenceRequest
from doorstep.types import Tensor
from doorstep.wire.exchange import Buffer

KEPT = 256  # templates of one endpoint; then it begins anew

_ndarray = np.ndarray


class Template:
    """What all requests with the same beginning say."""

    __slots__ = ("_datatype", "_dtype", "_shape", "input_name", "requested_outputs", "size", "wanted")

    def __init__(self, request: InferenceRequest, wanted: Wanted) -> None:
        (tensor,) = request.inputs.values()
        self.requested_outputs = request.requested_outputs
        self.wanted = wanted
        self.input_name = tensor.name
        self.size: int = tensor.array.nbytes  # of the tensor
        self._datatype = tensor.datatype
        self._shape = tensor.array.shape
        self._dtype = tensor.datatype.numpy

    def tensor(self, buffer: Buffer, offset: int) -> Tensor:
        """A view on the `size` bytes from `offset` on."""
        return Tensor(self.input_name, self._datatype, _ndarray(self._shape, self._dtype, buffer, offset))


def is_simple(request: InferenceRequest) -> bool:
    """Whether a decoded request says nothing that a template does not keep."""
    if (
        request.id
        or request.parameters
        or request.priority
        or request.timeout_us
        or request.correlation_id
        or request.sequence_start
        or request.sequence_end
        or len(request.inputs) != 1
    ):
        return False
    (tensor,) = request.inputs.values()
    return tensor.datatype.itemsize > 0 and tensor.array.nbytes > 0
