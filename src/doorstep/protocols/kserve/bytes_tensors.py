"""BYTES tensors on the wire: each element is its length, four bytes little-endian, then itself. Knows no message."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from struct import Struct

from doorstep.types import BYTES, Array, Tensor, object_array
from doorstep.validation import MOST_DIMENSIONS, UnfitTensor
from doorstep.wire.exchange import Buffer

_LENGTH = Struct("<I")
_pack, _unpack_from = _LENGTH.pack, _LENGTH.unpack_from


def decode_bytes(name: str, shape: Sequence[int], data: Buffer) -> Tensor:
    """The tensor that `data` holds; an UnfitTensor where its elements are not as many as `shape` says, or are cut off.

    Texts: core, infer_request.cc: ValidateBytesInputs.
    """
    wanted = _count(shape)
    view = memoryview(data)
    size = len(view)
    elements: list[bytes] = []
    append = elements.append
    problem = ""
    offset = 0
    while offset < size:
        if size - offset < 4:
            problem = (
                "{prefix}incomplete string length indicator for inference input '{name}' for model '{model}', "
                f"expecting 4 bytes but only {size - offset} bytes available. Please make sure the string length "
                "indicator is in one buffer."
            )
            break
        if len(elements) == wanted:
            problem = too_many_elements(wanted)
            break
        length: int = _unpack_from(view, offset)[0]
        offset += 4
        end = offset + length
        if end > size:
            problem = (
                "incomplete string data for inference input '{name}', expecting string of length "
                f"{length} but only {size - offset} bytes available"
            )
            break
        append(bytes(view[offset:end]))
        offset = end
    if problem or len(elements) != wanted:
        return UnfitTensor(name, BYTES, shape, size, problem or too_few_elements(wanted, len(elements)))
    return _tensor(name, shape, elements)


def _count(shape: Sequence[int]) -> int:
    """How many elements; -1 for a shape that no array can have."""
    return prod(shape) if len(shape) <= MOST_DIMENSIONS and all(dim >= 0 for dim in shape) else -1


def _tensor(name: str, shape: Sequence[int], elements: Sequence[bytes]) -> Tensor:
    try:
        return Tensor(name, BYTES, object_array(elements, shape))
    except ValueError:  # more dimensions than an array can have
        return UnfitTensor(name, BYTES, shape, 0)


def too_many_elements(wanted: int) -> str:
    return (
        f"{{prefix}}unexpected number of string elements {wanted + 1} for inference input '{{name}}' for model "
        f"'{{model}}', expecting {wanted}"
    )


def too_few_elements(wanted: int, got: int) -> str:
    return (
        f"{{prefix}}expected {wanted} string elements for inference input '{{name}}' for model '{{model}}', got {got}"
    )


def tensor_of_elements(name: str, shape: Sequence[int], elements: Sequence[bytes]) -> Tensor:
    """The tensor of elements that came one by one; an UnfitTensor where `shape` says another number of them."""
    wanted = _count(shape)
    if len(elements) == wanted:
        return _tensor(name, shape, elements)
    problem = too_many_elements(wanted) if len(elements) > wanted >= 0 else too_few_elements(wanted, len(elements))
    return UnfitTensor(name, BYTES, shape, sum(map(len, elements)) + 4 * len(elements), problem)


def element_bytes(element: object) -> bytes:
    """An element as a backend may leave it: bytes, or text, or anything that has a text."""
    if isinstance(element, bytes):
        return bytes(element)
    return str(element).encode()


def flat_elements(array: Array) -> list[bytes]:
    """The elements in row-major order, all as bytes."""
    elements: list[object] = array.ravel().tolist()
    return [e if type(e) is bytes else element_bytes(e) for e in elements]


def encode_elements(elements: Iterable[bytes]) -> bytes:
    pieces: list[bytes] = []
    for element in elements:
        pieces += (_pack(len(element)), element)
    return b"".join(pieces)


def encode_bytes(array: Array) -> bytes:
    return encode_elements(flat_elements(array))
