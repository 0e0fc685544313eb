"""What two requests must have in common to have one answer. Pure.

Triton hashes the model, its version, and names and bytes of the inputs (core, cache_manager.cc: Hash), into 64 bits.
Here are also datatypes and shapes, the outputs asked for, and what else a model is told of a request (custom
parameters, sequence): answers may differ by them. The hash is BLAKE2b, 160 bits, which nobody can make collide.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from struct import pack

import numpy as np
import orjson

from doorstep.config.model import ModelConfig
from doorstep.request import InferenceRequest
from doorstep.types import BYTES, DataType, Tensor

LONG_BYTES = 65_536  # more than this takes too long to hash on the event loop: about 70 µs
LONG_ELEMENTS = 1024  # of BYTES, likewise
_HEADS_KEPT = 256


class KeyMaker:
    """The keys of one model version. `content` says what the version, or all of an ensemble, is made of now; None
    while nobody can say, and then there is no key."""

    __slots__ = ("_config", "_content", "_heads", "_outputs", "_start", "_started")

    def __init__(self, config: ModelConfig, version: str, content: Callable[[], bytes | None]) -> None:
        self._config = config
        self._content = content
        self._outputs = frozenset(config.outputs)
        self._start = orjson.dumps(["doorstep-cache-1", config.name, version])
        self._started: tuple[bytes, blake2b] = (b"", blake2b(self._start, digest_size=20))
        self._heads: dict[tuple[str, DataType, tuple[int, ...]], bytes] = {}

    def content(self) -> bytes | None:
        return self._content()

    def is_long(self, request: InferenceRequest) -> bool:
        """Whether hashing it belongs in a thread."""
        size = 0
        for tensor in request.inputs.values():
            if tensor.datatype is BYTES and tensor.array.size > LONG_ELEMENTS:
                return True
            size += tensor.array.nbytes
        return size > LONG_BYTES

    def key(self, request: InferenceRequest, content: bytes) -> bytes:
        """`content` is what `content()` said."""
        if self._started[0] != content:
            self._started = (content, blake2b(self._start + content, digest_size=20))
        state = self._started[1].copy()
        inputs = request.inputs
        for name in sorted(inputs) if len(inputs) > 1 else inputs:
            tensor = inputs[name]
            state.update(self._heads.get((name, tensor.datatype, tensor.array.shape)) or self._head(tensor))
            state.update(_data(tensor))
        rest = self._rest(request)
        if rest:
            state.update(rest)
        return state.digest()

    def _head(self, tensor: Tensor) -> bytes:
        text = orjson.dumps([tensor.name, tensor.datatype.name, tensor.array.shape])
        if len(self._heads) >= _HEADS_KEPT:
            self._heads.clear()
        head = self._heads[tensor.name, tensor.datatype, tensor.array.shape] = pack("<I", len(text)) + text
        return head

    def _rest(self, request: InferenceRequest) -> bytes:
        """Whatever else the answer may depend on. All outputs by name are the same as none."""
        wanted = request.requested_outputs
        outputs = [] if not wanted or self._outputs.issubset(wanted) else sorted(wanted)
        sequence = (
            [request.correlation_id, request.sequence_start, request.sequence_end] if request.correlation_id else []
        )
        if not (outputs or sequence or request.parameters):
            return b""
        return orjson.dumps(["rest", outputs, sequence, request.parameters], option=orjson.OPT_SORT_KEYS)


def _data(tensor: Tensor) -> bytes | memoryview:
    array = tensor.array
    if tensor.datatype is BYTES:
        elements = [e if type(e) is bytes else str(e).encode() for e in array.ravel().tolist()]
        return b"".join([pack("<I", len(e)) + e for e in elements])
    if array.nbytes <= LONG_BYTES:
        return array.tobytes()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
