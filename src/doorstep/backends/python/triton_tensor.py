"""`pb_utils.Tensor`: a named array in main memory, from and to numpy and DLPack. Knows no request."""

from __future__ import annotations

from typing import Any

import numpy as np

from doorstep.backends.python import dlpack
from doorstep.backends.python.triton_arguments import text_of
from doorstep.backends.python.triton_errors import TritonModelException
from doorstep.types import BF16, BYTES, Array, datatype_of
from doorstep.types import Tensor as ServerTensor


class Tensor:
    """A named array. BF16 only travels as DLPack: numpy has no such type of its own."""

    __slots__ = ("_array", "_name", "_type")

    def __init__(self, name: str, array: Array) -> None:
        if not isinstance(array, np.ndarray):
            raise TypeError("Tensor(name, numpy_array): a str and a numpy array are expected")
        if type(name) is not str:
            name = text_of(name, "Tensor: name")
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if array.dtype.kind in "SO":
            self._type = BYTES
        else:
            try:
                self._type = datatype_of(array)
            except KeyError:
                raise TritonModelException("NumPy dtype is not supported.") from None
            if self._type is BYTES:  # an array of str: Triton takes object and bytes arrays only
                raise TritonModelException("NumPy dtype is not supported.")
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        if self._type is BF16:
            raise TritonModelException(
                "Tensor dtype is BF16 and cannot be converted to NumPy. Use to_dlpack() and from_dlpack() instead."
            )
        return self._array

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def triton_dtype(self) -> int:
        return self._type.config_number

    def is_cpu(self) -> bool:
        return True

    def to_dlpack(self) -> Any:
        if self._type is BYTES:
            raise TritonModelException("DLPack does not have support for string tensors.")
        return dlpack.capsule_of(self._array)

    def __dlpack__(self, stream: Any = None, **_: Any) -> Any:
        return self.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (dlpack.CPU, 0)

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if type(tensor).__name__ == "PyCapsule":
            return Tensor(name, dlpack.array_of(tensor))
        if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
            raise TritonModelException(
                "Provided tensor is not supported. Tensor must be a DLPack capsule         or have `__dlpack__` and "
                "`__dlpack_device__` attributes"
            )
        device = tensor.__dlpack_device__()[0]
        if device not in (dlpack.CPU, dlpack.CUDA_HOST):
            raise dlpack.refuse_device(device)
        return Tensor(name, dlpack.array_of(tensor.__dlpack__(stream=None)))

    def __repr__(self) -> str:
        return f"<pb_utils.Tensor {self._name} {self._type} {self.shape()}>"


def from_server(tensor: ServerTensor) -> Tensor:
    """The same array under the model's word for it."""
    made = Tensor.__new__(Tensor)
    made._name = tensor.name
    made._type = tensor.datatype
    made._array = tensor.array
    return made


def bytes_array(array: Array) -> Array:
    """A BYTES array as the rest of the server knows it: of `bytes`. (numpy drops zero bytes at the end of an S.)"""
    return array if array.dtype.kind == "O" else array.astype(object)


def to_server(tensor: Tensor) -> ServerTensor:
    array = bytes_array(tensor._array) if tensor._type is BYTES else tensor._array
    return ServerTensor(tensor._name, tensor._type, array)
