"""What a response cache offers, and what it keeps. Knows no model and no scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from doorstep.request import Outputs, Parameter
from doorstep.types import BYTES, Tensor

OVERHEAD_BYTES = 512  # of an entry, beside its tensors: objects, names, the key


class Entry:
    """The outputs of one response, of their own: nothing else holds their memory, and nobody can change it."""

    __slots__ = ("outputs", "parameters", "size")

    def __init__(self, outputs: Sequence[Tensor], parameters: Mapping[str, Parameter] | None, size: int) -> None:
        self.outputs = outputs
        self.parameters = parameters
        self.size = size  # bytes, all told

    def result(self) -> Sequence[Tensor]:
        """What a scheduler would have got from the model."""
        return self.outputs if self.parameters is None else Outputs(self.outputs, dict(self.parameters))


def copied_entry(outputs: Sequence[Tensor], parameters: Mapping[str, Parameter] | None) -> Entry:
    """An entry of a response's tensors, which may be views on memory of somebody else's."""
    kept = []
    for tensor in outputs:
        array = np.array(tensor.array, order="C")  # always a copy
        array.flags.writeable = False
        kept.append(Tensor(tensor.name, tensor.datatype, array))
    return Entry(tuple(kept), dict(parameters) if parameters else None, size_of(outputs))


def size_of(outputs: Sequence[Tensor]) -> int:
    size = OVERHEAD_BYTES
    for tensor in outputs:
        size += tensor.array.nbytes + 2 * len(tensor.name)
        if tensor.datatype is BYTES:
            size += sum(33 + len(element) for element in tensor.array.ravel().tolist())
    return size


class CacheNumbers:
    """What a cache has done. Written on the event loop only."""

    __slots__ = ("evictions", "hits", "insert_ns", "lookup_ns", "lookups", "misses", "refused")

    def __init__(self) -> None:
        self.lookups = self.hits = self.misses = self.evictions = self.refused = 0
        self.lookup_ns = self.insert_ns = 0


class ResponseCache(Protocol):
    """Touched only from the event loop. Never raises: a cache that cannot answer has not got it."""

    name: str
    shared: bool  # with other servers, and it outlives this one: keys must mean the same to all of them
    at_once: bool  # `get` answers; otherwise only `find` does
    numbers: CacheNumbers

    def get(self, key: bytes) -> Entry | None: ...

    def find(self, key: bytes, then: Callable[[Entry | None], None]) -> None:
        """Calls `then` with the entry, or None, later."""

    def put(self, key: bytes, entry: Entry) -> bool:
        """Keeps the entry, if it can. False where it had one of that key already."""

    def usage(self) -> tuple[int, float] | None:
        """Entries, and the share of its size that is in use; None where that is not the server's to know."""

    async def close(self) -> None: ...
