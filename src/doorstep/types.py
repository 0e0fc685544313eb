"""Datatypes and tensors. Knows no protocol, no model and no thread.

Names and sizes are the V2 protocol's; `TYPE_*` names are config.pbtxt's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class DataType:
    """One of the V2 protocol's datatypes. Compare with `is`: there is one object of each."""

    name: str  # on the wire: FP32, BYTES …
    config_name: str  # in config.pbtxt: TYPE_FP32, TYPE_STRING …
    config_number: int  # inference.DataType in model_config.proto
    numpy: np.dtype[Any]
    itemsize: int  # bytes per element; 0 for BYTES, whose elements differ

    def __repr__(self) -> str:
        return self.name


def _make(name: str, number: int, numpy: Any, config_name: str | None = None) -> DataType:
    dtype = np.dtype(numpy)
    return DataType(name, config_name or f"TYPE_{name}", number, dtype, 0 if dtype.hasobject else dtype.itemsize)


BOOL = _make("BOOL", 1, np.bool_)
UINT8 = _make("UINT8", 2, "<u1")
UINT16 = _make("UINT16", 3, "<u2")
UINT32 = _make("UINT32", 4, "<u4")
UINT64 = _make("UINT64", 5, "<u8")
INT8 = _make("INT8", 6, "<i1")
INT16 = _make("INT16", 7, "<i2")
INT32 = _make("INT32", 8, "<i4")
INT64 = _make("INT64", 9, "<i8")
FP16 = _make("FP16", 10, "<f2")
FP32 = _make("FP32", 11, "<f4")
FP64 = _make("FP64", 12, "<f8")
BYTES = _make("BYTES", 13, np.object_, "TYPE_STRING")
BF16 = _make("BF16", 14, ml_dtypes.bfloat16)

ALL_DATATYPES = (BOOL, UINT8, UINT16, UINT32, UINT64, INT8, INT16, INT32, INT64, FP16, FP32, FP64, BYTES, BF16)
DTYPES: dict[str, DataType] = {d.name: d for d in ALL_DATATYPES}
BY_CONFIG_NAME: dict[str, DataType] = {d.config_name: d for d in ALL_DATATYPES}
BY_CONFIG_NUMBER: dict[int, DataType] = {d.config_number: d for d in ALL_DATATYPES}
_BY_NUMPY: dict[np.dtype[Any], DataType] = {d.numpy: d for d in ALL_DATATYPES}


def datatype_of(array: Array) -> DataType:
    """The datatype of a numpy array. Strings of any kind (object, U, S) are BYTES. Raises KeyError for the rest."""
    found = _BY_NUMPY.get(array.dtype)
    if found is not None:
        return found
    if array.dtype.kind in "USO":
        return BYTES
    return _BY_NUMPY[array.dtype.newbyteorder("<")]


def object_array(values: Sequence[object], shape: Sequence[int]) -> Array:
    """`values` as a BYTES tensor's array; numpy by itself would look into them for more dimensions."""
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array.reshape(tuple(shape))


class Tensor:
    """A named array. BYTES tensors are object arrays whose elements are `bytes`.

    The array may be a read-only view on a request's body, so whoever changes elements copies first.
    """

    __slots__ = ("array", "datatype", "name")

    def __init__(self, name: str, datatype: DataType, array: Array) -> None:
        self.name = name
        self.datatype = datatype
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __repr__(self) -> str:
        return f"<Tensor {self.name} {self.datatype} {list(self.array.shape)}>"
