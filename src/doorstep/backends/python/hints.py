"""What a type hint says of a tensor, and the way between the tensor's array and the hinted Python value.

Knows no model, config or batch.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np

from doorstep.errors import BackendError, InvalidArgument
from doorstep.types import BOOL, BYTES, DTYPES, FP64, INT64, Array, DataType

ELEMENTS: dict[type, DataType] = {str: BYTES, bytes: BYTES, int: INT64, float: FP64, bool: BOOL}
_KINDS = {str: "SO", bytes: "SO", int: "iu", float: "fV", bool: "b"}  # numpy's kinds a config may choose instead
_ALLOWED: dict[type, tuple[type, ...]] = {  # what an element of an output may be
    str: (str, np.str_),
    bytes: (bytes, np.bytes_, bytearray),
    int: (int, np.integer),
    float: (float, int, np.floating, np.integer),
    bool: (bool, np.bool_),
}
SUPPORTED = (
    "str, bytes, int, float, bool, list[…] of these, or a numpy array such as npt.NDArray[np.float32], "
    'where Annotated[…, (3, 224, 224)] says its shape and Annotated[…, "FP16"] its datatype'
)


class HintError(Exception):
    """A hint that names no tensor; the text says why and what to write instead."""


@dataclass(frozen=True, slots=True)
class Hint:
    text: str  # as in the source
    form: Literal["scalar", "list", "array"]
    element: type | None  # of a scalar or list: str, bytes, int, float, bool; of an array: str, or None
    datatype: DataType | None  # None: an array of any datatype; the config must say
    rank: int | None  # dimensions of the value, 0 for a scalar; None: not said
    row_dims: tuple[int, ...] | None = None  # the shape of one row, where Annotated says it
    optional: bool = False

    def dims(self, *, batched: bool) -> tuple[int, ...]:
        """For config.pbtxt: without the batch dimension."""
        if self.row_dims is not None:
            return self.row_dims
        rank = self.rank
        if rank is None:
            return (-1,)
        if rank - batched <= 0:
            return (1,)  # one value per request, or per row
        return (-1,) * (rank - batched)

    def fits(self, datatype: DataType) -> bool:
        """Whether a tensor of that datatype can be handed over as this hint says."""
        if self.form == "array":
            return self.datatype is None or self.datatype is datatype
        assert self.element is not None
        return datatype.numpy.kind in _KINDS[self.element]


def parse_hint(annotation: Any) -> Hint:
    """Raises HintError."""
    text = _text(annotation)
    optional = False
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        rest = [arg for arg in get_args(annotation) if arg is not type(None)]
        if len(rest) != 1 or len(rest) == len(get_args(annotation)):
            raise HintError(f"{text} may be several types; write one of {SUPPORTED}")
        optional = True
        annotation = rest[0]
        origin = get_origin(annotation)
    extras: tuple[Any, ...] = ()
    if origin is Annotated:
        annotation, *rest = get_args(annotation)
        extras = tuple(rest)
        origin = get_origin(annotation)
    hint = _plain(annotation, origin, text)
    datatype, row_dims = _extras(extras, text)
    if datatype is not None and not hint.fits(datatype):
        raise HintError(f"{text} says both {hint.datatype} and {datatype}")
    return Hint(
        text, hint.form, hint.element, datatype or hint.datatype, hint.rank, row_dims or hint.row_dims, optional
    )


def _plain(annotation: Any, origin: Any, text: str) -> Hint:
    if annotation in ELEMENTS:
        return Hint(text, "scalar", annotation, ELEMENTS[annotation], 0)
    if annotation is np.ndarray:
        return Hint(text, "array", None, None, None)
    if origin is np.ndarray:
        shape, dtype = (*get_args(annotation), np.dtype[Any])[:2]
        datatype, element = _array_datatype(dtype, text)
        rank, dims = _array_shape(shape)
        return Hint(text, "array", element, datatype, rank, dims)
    rank = 0
    inner = annotation
    while get_origin(inner) in (list, Sequence):
        rank += 1
        (inner,) = get_args(inner)
    if rank and inner in ELEMENTS:
        return Hint(text, "list", inner, ELEMENTS[inner], rank)
    raise HintError(f"{text} is no tensor; write {SUPPORTED}")


def _array_datatype(dtype: Any, text: str) -> tuple[DataType | None, type | None]:
    (scalar,) = get_args(dtype) or (Any,)
    if scalar is Any or not isinstance(scalar, type):
        return None, None  # or a type variable, or a union
    if scalar in (np.generic, np.number, np.floating, np.integer):
        return None, None
    if issubclass(scalar, np.str_ | str):
        return BYTES, str
    if issubclass(scalar, np.bytes_ | bytes | np.object_):
        return BYTES, None
    wanted = np.dtype(scalar)
    for datatype in DTYPES.values():
        if datatype.numpy == wanted:
            return datatype, None
    raise HintError(f"{text}: no datatype of the protocol is {wanted} (there are {', '.join(DTYPES)})")


def _array_shape(shape: Any) -> tuple[int | None, tuple[int, ...] | None]:
    sizes = get_args(shape)
    if get_origin(shape) is not tuple or Ellipsis in sizes or not sizes:
        return None, None
    return len(sizes), None


def _extras(extras: tuple[Any, ...], text: str) -> tuple[DataType | None, tuple[int, ...] | None]:
    datatype = None
    dims = None
    for extra in extras:
        if isinstance(extra, str) and extra in DTYPES:
            datatype = DTYPES[extra]
        elif isinstance(extra, tuple | list) and all(type(size) is int for size in extra):
            dims = tuple(extra)
            if not dims or any(size < -1 or size == 0 for size in dims):
                raise HintError(f"{text}: a shape is one or more sizes above 0, or -1 for any")
    return datatype, dims


def _text(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("numpy.", "np.")


# From the wire to model code

ToValue = Callable[[Array], Any]


def to_value(hint: Hint, name: str, datatype: DataType) -> ToValue:
    """A function from the tensor's array (as the backend sees it) to what model code gets."""
    text = hint.element is str
    if hint.form == "array":
        return (lambda array: _decoded_array(name, array)) if text and datatype is BYTES else _same

    rank = hint.rank or 0

    def values(array: Array) -> Any:
        if array.ndim == rank + 1 and array.shape[-1] == 1:
            array = array.reshape(array.shape[:-1])  # dims: [1] stands for one value
        if array.ndim != rank:
            raise InvalidArgument(f"input '{name}' has shape {list(array.shape)}, but the model takes {hint.text}")
        value = array.tolist()
        return _decoded(name, value) if text else value

    return values


def _same(array: Array) -> Array:
    return array


def _decoded(name: str, value: Any) -> Any:
    if type(value) is list:
        return [_decoded(name, item) for item in value]
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"input '{name}' holds bytes that are not UTF-8: {error}") from None


def _decoded_array(name: str, array: Array) -> Array:
    result = np.empty(array.size, np.object_)
    result[:] = _decoded(name, array.ravel().tolist())
    return result.astype(np.str_).reshape(array.shape)


# From model code to the wire


def to_array(hint: Hint, name: str, datatype: DataType, value: Any) -> Array:
    """The output's array. Raises BackendError, which names output, what was expected and what came."""
    if hint.form == "array":
        return _from_array(hint, name, datatype, value)
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.dtype.kind != "S" else value.astype(np.object_).tolist()
    elif hint.form == "scalar":
        if isinstance(value, list | tuple):
            raise _wrong(name, hint, _one(type(value)))
    elif not isinstance(value, list | tuple):
        raise _wrong(name, hint, _returned(type(value)))
    assert hint.element is not None
    flat, shape = _flatten(name, hint, value)
    allowed = _ALLOWED[hint.element]
    for kind in set(map(type, flat)):
        if not issubclass(kind, allowed) or (kind is bool and hint.element is not bool):
            raise _wrong(name, hint, f"one with {_one(kind)} in it" if shape else _returned(kind))
    if datatype is BYTES:
        array = np.empty(len(flat), np.object_)
        array[:] = [item.encode() if isinstance(item, str) else bytes(item) for item in flat]
        return array.reshape(shape)
    try:
        return np.array(flat, datatype.numpy).reshape(shape)
    except (OverflowError, ValueError, TypeError) as error:
        raise BackendError(f"output '{name}' cannot be {datatype}: {error}") from None


def _from_array(hint: Hint, name: str, datatype: DataType, value: Any) -> Array:
    if not isinstance(value, np.ndarray):
        if not isinstance(value, list | tuple | np.generic):
            raise _wrong(name, hint, _returned(type(value)))
        try:
            value = np.asarray(value, None if datatype is BYTES else datatype.numpy)
        except (OverflowError, ValueError, TypeError) as error:
            raise BackendError(f"output '{name}' cannot be {datatype}: {error}") from None
    if datatype is BYTES:
        if value.dtype.kind not in "SUO":
            raise _wrong(name, hint, f"an array of {value.dtype}", "strings or bytes")
        flat = value.ravel().tolist()
        for kind in set(map(type, flat)):
            if not issubclass(kind, str | bytes):
                raise _wrong(name, hint, f"an array with {_one(kind)} in it", "strings or bytes")
        array = np.empty(len(flat), np.object_)
        array[:] = [item.encode() if isinstance(item, str) else item for item in flat]
        return array.reshape(value.shape)
    assert isinstance(value, np.ndarray)
    if value.dtype != datatype.numpy:
        raise BackendError(
            f"output '{name}' is an array of {value.dtype}; expected {datatype.numpy} "
            f"(return it with .astype(np.{datatype.numpy}))"
        )
    return value


def _flatten(name: str, hint: Hint, value: Any) -> tuple[list[Any], tuple[int, ...]]:
    """All elements of nested lists, and their shape."""
    shape: list[int] = []
    level = [value]
    for _ in range(hint.rank or 0):
        if not all(isinstance(item, list | tuple) for item in level):
            wrong = next(item for item in level if not isinstance(item, list | tuple))
            raise _wrong(name, hint, f"one with {_one(type(wrong))} where a list belongs")
        sizes = {len(item) for item in level}
        if len(sizes) > 1:
            raise _wrong(name, hint, f"lists of different lengths ({', '.join(map(str, sorted(sizes)))})")
        shape.append(sizes.pop() if sizes else 0)
        level = [inner for item in level for inner in item]
    return level, tuple(shape)


def _wrong(name: str, hint: Hint, got: str, expected: str = "") -> BackendError:
    return BackendError(f"output '{name}': expected {expected or hint.text}, got {got}")


def _returned(kind: type) -> str:
    return _one(kind) + (" (does predict `return` it?)" if kind is type(None) else "")


def _one(kind: type) -> str:
    if kind is type(None):
        return "None"
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def resolve(function: Any, module: Any) -> dict[str, Any]:
    """The annotations of a function, with those written as text evaluated. Raises HintError."""
    try:
        return typing.get_type_hints(function, vars(module), include_extras=True)
    except Exception as error:
        raise HintError(f"the type hints cannot be read: {type(error).__name__}: {error}") from None
