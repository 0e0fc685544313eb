"""Python values to tensors as a model's metadata asks for them. Knows no connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from doorstep.errors import InvalidArgument
from doorstep.types import BYTES, DTYPES, Array, DataType, Tensor

Metadata = Mapping[str, Any]  # the answer to GET /v2/models/NAME


def to_tensors(metadata: Metadata, values: Mapping[str, Any]) -> list[Tensor]:
    """One tensor per value, in the model's order. Raises InvalidArgument, naming the inputs there are."""
    specs = {spec["name"]: spec for spec in metadata["inputs"]}
    strangers = [name for name in values if name not in specs]
    if strangers:
        raise InvalidArgument(f"model '{metadata['name']}' has no input '{strangers[0]}'; {describe_inputs(metadata)}")
    if not values:
        raise InvalidArgument(f"no inputs given for model '{metadata['name']}'; {describe_inputs(metadata)}")
    return [
        to_tensor(name, DTYPES[spec["datatype"]], [int(dim) for dim in spec["shape"]], values[name])
        for name, spec in specs.items()
        if name in values
    ]


def describe_inputs(metadata: Metadata) -> str:
    """`its inputs are: text BYTES [-1, 1]`."""
    inputs = [f"{spec['name']} {spec['datatype']} {[int(dim) for dim in spec['shape']]}" for spec in metadata["inputs"]]
    return f"its input{'s are' if len(inputs) > 1 else ' is'}: {', '.join(inputs) or 'none'}"


def to_tensor(name: str, datatype: DataType, shape: Sequence[int], value: Any) -> Tensor:
    """`value` as the model wants it: the right datatype, and the dimensions of size 1 it lacks (one row of a batch)."""
    array = _to_bytes_array(name, value) if datatype is BYTES else _to_numbers(name, datatype, value)
    return Tensor(name, datatype, _fit(name, array, shape))


def _to_numbers(name: str, datatype: DataType, value: Any) -> Array:
    given = isinstance(value, np.ndarray | np.generic)
    try:
        array = value if given else np.asarray(value)
        if array.dtype == datatype.numpy:
            return np.asarray(array)
        if not _may_become(array.dtype, datatype.numpy):
            raise InvalidArgument(f"input '{name}' takes {datatype}, but the value given is {array.dtype}")
        if not given:
            return np.asarray(value, datatype.numpy)  # checks the range of integers
        cast = np.asarray(array).astype(datatype.numpy)
        if array.dtype.kind in "iu" and datatype.numpy.kind in "iu" and not np.array_equal(cast, array):
            raise InvalidArgument(f"input '{name}': a number given does not fit into {datatype}")
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidArgument(f"input '{name}' cannot be made {datatype}: {error}") from None
    return cast


def _may_become(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Integers may become any number, floats only floats, truth values only themselves. Sizes are not looked at."""
    real = "fV"  # V: bfloat16, which numpy has no kind for
    return (
        have.kind == want.kind
        or (have.kind in "iu" and want.kind in "iu" + real)
        or have.kind + want.kind in ("fV", "Vf")
    )


def _to_bytes_array(name: str, value: Any) -> Array:
    if isinstance(value, str | bytes | bytearray | memoryview):
        flat, shape = [value], ()
    else:
        array = value if isinstance(value, np.ndarray) else _object_array(value)
        flat, shape = array.ravel().tolist(), array.shape
    found = np.empty(len(flat), np.object_)
    for position, element in enumerate(flat):
        if isinstance(element, str):
            found[position] = element.encode()
        elif isinstance(element, bytes | bytearray | memoryview):
            found[position] = bytes(element)
        else:
            raise InvalidArgument(
                f"input '{name}' takes text or bytes, but was given {type(element).__name__} {element!r:.40}"
            )
    return found.reshape(shape)


def _object_array(value: Any) -> Array:
    """Nested lists to an array of objects; numpy alone would take a `bytes` for a sequence of numbers."""
    shape = []
    level = value
    while isinstance(level, list | tuple):
        shape.append(len(level))
        if not level:
            break
        level = level[0]
    flat: list[Any] = [value]
    for _ in shape:
        flat = [item for items in flat for item in (items if isinstance(items, list | tuple) else [items])]
    array = np.empty(len(flat), np.object_)
    array[:] = flat
    try:
        return array.reshape(shape)
    except ValueError:
        raise InvalidArgument(f"lists of different lengths cannot be one tensor: {value!r:.60}") from None


def _fit(name: str, array: Array, shape: Sequence[int]) -> Array:
    """Adds dimensions of size 1 in front, or behind, where the model has more. The rest is the server's to judge."""
    lacking = len(shape) - array.ndim
    if lacking <= 0:
        return array
    ones = (1,) * lacking
    for candidate in (ones + array.shape, array.shape + ones):
        if all(want in (-1, have) for want, have in zip(shape, candidate, strict=True)):
            return array.reshape(candidate)
    raise InvalidArgument(
        f"input '{name}' has shape {list(shape)} (-1: any size), but the value given has {list(array.shape)}"
    )
