"""DLPack capsules from and to numpy arrays, without a copy. Knows no model.

numpy has both, but gives no read-only array (and inputs are), knows no BF16, and takes what is not contiguous.
The layout is that of dlpack.h, version 0, which every library speaks.
"""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np

from doorstep.backends.python.triton_errors import TritonModelException
from doorstep.types import Array

CPU = 1
CUDA = 2
CUDA_HOST = 3  # main memory, pinned
_NAME = b"dltensor"
_USED = b"used_dltensor"
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # numpy's kind → DLDataTypeCode
_BFLOAT = 4
_BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))
# The same two by address: in a destructor the capsule has no reference left, and must not get one.
_is_valid_at = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_pointer_at = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))

_given: dict[int, tuple[Any, ...]] = {}  # address of a _Managed → what must live as long as it


@_Deleter  # type: ignore[untyped-decorator]
def _delete(address: int) -> None:
    _given.pop(address, None)


@_Destructor  # type: ignore[untyped-decorator]
def _destroy(capsule: int) -> None:
    """A capsule that nobody took over."""
    if _is_valid_at(capsule, _NAME):
        _given.pop(_pointer_at(capsule, _NAME), None)


def capsule_of(array: Array) -> Any:
    """A capsule of the array's memory, which lives until whoever takes the capsule is done with it."""
    array = np.ascontiguousarray(array) if not array.flags.c_contiguous else array
    code = _BFLOAT if array.dtype == _BFLOAT16 else _CODES.get(array.dtype.kind)
    if code is None:
        raise TritonModelException(f"DLPack does not have support for arrays of {array.dtype}.")
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    managed = _Managed()
    tensor = managed.tensor
    tensor.data = array.ctypes.data
    tensor.device_type = CPU
    tensor.ndim = array.ndim
    tensor.code = code
    tensor.bits = array.dtype.itemsize * 8
    tensor.lanes = 1
    tensor.shape = shape
    managed.deleter = ctypes.cast(_delete, ctypes.c_void_p)
    address = ctypes.addressof(managed)
    _given[address] = (managed, shape, array)
    return _new(address, _NAME, ctypes.cast(_destroy, ctypes.c_void_p))


class _Owner:
    """Gives a capsule's memory back when the last array on it is gone."""

    __slots__ = ("__weakref__", "_address", "_deleter")

    def __init__(self, managed: _Managed, address: int) -> None:
        self._address = address
        self._deleter = managed.deleter

    def __del__(self) -> None:
        if self._deleter:
            _Deleter(self._deleter)(self._address)


def array_of(capsule: Any) -> Array:
    """The array in a capsule, which is used up. Raises TritonModelException."""
    if not _is_valid(capsule, _NAME):
        raise TritonModelException("the DLPack capsule is no tensor, or has been used before")
    address = _pointer(capsule, _NAME)
    managed = _Managed.from_address(address)
    tensor = managed.tensor
    if tensor.device_type not in (CPU, CUDA_HOST):
        raise refuse_device(tensor.device_type)
    dtype = _dtype(tensor)
    shape = [tensor.shape[i] for i in range(tensor.ndim)]
    if tensor.strides and not _is_contiguous(shape, [tensor.strides[i] for i in range(tensor.ndim)]):
        raise TritonModelException(
            "DLPack tensor is not contiguous. Only contiguous DLPack tensors that are stored in C-Order are supported."
        )
    _rename(capsule, _USED)
    owner = _Owner(managed, address)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    memory: Any = (ctypes.c_char * size).from_address(tensor.data + tensor.byte_offset)
    memory._owner = owner
    array: Array = np.frombuffer(memory, dtype).reshape(shape)
    return array


def refuse_device(device_type: int) -> TritonModelException:
    if device_type == CUDA:
        return TritonModelException(
            "DLPack capsule passed pointer to memory allocated on GPU device,           when GPU is not available"
        )
    return TritonModelException(f"DLDevice type {device_type} is not support by Python backend.")


def _dtype(tensor: _Tensor) -> np.dtype[Any]:
    kinds = {0: "i", 1: "u", 2: "f"}
    if tensor.lanes == 1:
        if tensor.code == _BFLOAT and tensor.bits == 16:
            return _BFLOAT16
        if tensor.code == 6 and tensor.bits == 8:
            return np.dtype(np.bool_)
        if tensor.code in kinds and tensor.bits in (8, 16, 32, 64) and (tensor.code, tensor.bits) != (2, 8):
            return np.dtype(f"<{kinds[tensor.code]}{tensor.bits // 8}")
    raise TritonModelException("DLPack tensor type is not supported.")


def _is_contiguous(shape: list[int], strides: list[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
