"""The classification extension: an output's largest values as `value:index[:label]` strings. Knows no protocol.

Facts: server, classification.cc and docs/protocol/extension_classification.md.
"""

from __future__ import annotations

from math import prod

import numpy as np

from doorstep.errors import InvalidArgument
from doorstep.types import BF16, BOOL, BYTES, FP16, Array, Tensor

LARGEST = 1_000_000  # elements of one row, and entries of all rows; more cost too much for one request
_UNSUPPORTED = frozenset({BOOL, BYTES, FP16, BF16})


def classify(tensor: Tensor, count: int, labels: tuple[str, ...], *, batched: bool) -> Tensor:
    """The `count` largest values of each row, largest first, as a BYTES tensor of shape (rows?, min(count, elements)).

    Equal values keep the order of their indices; NaN come last.
    """
    if tensor.datatype in _UNSUPPORTED:
        raise InvalidArgument(f"class result not available for output due to unsupported type '{tensor.datatype}'")
    array = tensor.array
    shape = array.shape
    rows = shape[0] if batched and shape else 0
    elements = prod(shape[1:]) if rows else prod(shape)
    if elements > LARGEST:
        raise InvalidArgument("classification output tensor too large")
    kept = min(count, elements)
    if kept * (rows or 1) > LARGEST:
        raise InvalidArgument("classification output tensor too large")
    table = array.reshape(rows or 1, elements)
    result = np.empty((rows or 1, kept), np.object_)
    for index, row in enumerate(table):
        result[index] = [_entry(row[i], int(i), labels) for i in _descending(row)[:kept]]
    return Tensor(tensor.name, BYTES, result if rows else result[0])


def _descending(row: Array) -> Array:
    if row.dtype.kind == "f":
        return np.argsort(-row, kind="stable")  # NaN sorts last
    # Negating an unsigned or the smallest signed integer would wrap; the complement turns the order round exactly.
    return np.argsort(~row, kind="stable")


def _entry(value: np.generic, index: int, labels: tuple[str, ...]) -> bytes:
    number = f"{float(value):.6f}" if value.dtype.kind == "f" else str(int(value))
    text = f"{number}:{index}"
    if index < len(labels) and labels[index]:
        text += f":{labels[index]}"
    return text.encode()
