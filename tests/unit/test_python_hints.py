"""Type hints as tensors: what may be written, and what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, List, Optional, Union  # noqa: UP035 (people still write them)

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from doorstep.backends.python.hints import HintError, parse_hint, to_array, to_value
from doorstep.errors import BackendError, InvalidArgument
from doorstep.types import BYTES, DTYPES, FP32, INT8, INT64

MATRIX = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@pytest.mark.parametrize(
    ("hint", "datatype", "dims", "batched"),
    [
        (str, "BYTES", (1,), None),
        (bytes, "BYTES", (1,), None),
        (int, "INT64", (1,), None),
        (float, "FP64", (1,), None),
        (bool, "BOOL", (1,), None),
        (list[str], "BYTES", (-1,), (1,)),
        (List[str], "BYTES", (-1,), (1,)),  # noqa: UP006
        (Sequence[int], "INT64", (-1,), (1,)),
        (list[list[float]], "FP64", (-1, -1), (-1,)),
        (npt.NDArray[np.float32], "FP32", (-1,), (-1,)),
        (npt.NDArray[np.uint8], "UINT8", (-1,), (-1,)),
        (npt.NDArray[np.bool_], "BOOL", (-1,), (-1,)),
        (npt.NDArray[np.str_], "BYTES", (-1,), (-1,)),
        (npt.NDArray[np.object_], "BYTES", (-1,), (-1,)),
        (npt.NDArray[ml_dtypes.bfloat16], "BF16", (-1,), (-1,)),
        (MATRIX, "FP32", (-1, -1), (-1,)),
        (Annotated[npt.NDArray[np.float32], (3, -1)], "FP32", (3, -1), (3, -1)),
        (Annotated[np.ndarray, "FP16", [2, 2]], "FP16", (2, 2), (2, 2)),
        (Annotated[list[float], "FP32"], "FP32", (-1,), (1,)),
        (Annotated[int, "INT8", "a remark"], "INT8", (1,), None),
        (np.ndarray, None, (-1,), (-1,)),
        (npt.NDArray[Any], None, (-1,), (-1,)),
        (Optional[list[str]], "BYTES", (-1,), (1,)),  # noqa: UP045
        (list[int] | None, "INT64", (-1,), (1,)),
    ],
)
def test_hints_say_datatype_and_shape(hint, datatype, dims, batched):
    parsed = parse_hint(hint)
    assert (parsed.datatype and parsed.datatype.name, parsed.dims(batched=False)) == (datatype, dims)
    if batched is not None:
        assert parsed.dims(batched=True) == batched


@pytest.mark.parametrize(
    "hint",
    [
        *(list, dict[str, int], set[int], object, Any, complex, None, "text", int | str, tuple[int, str]),
        *(Union[int, str, None], npt.NDArray[np.complex64], npt.NDArray[np.datetime64]),  # noqa: UP007
        *(Annotated[npt.NDArray[np.float32], "INT8"], Annotated[np.ndarray, (0,)], Annotated[np.ndarray, ()]),
        *(Annotated[str, "FP32"], list[dict[str, int]]),
    ],
    ids=str,
)
def test_what_is_no_tensor_is_refused(hint):
    with pytest.raises(HintError):
        parse_hint(hint)


def strings(*values: bytes) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


@pytest.mark.parametrize(
    ("hint", "array", "value"),
    [
        (str, strings("ü".encode()), "ü"),
        (bytes, strings(b"\xff"), b"\xff"),
        (int, np.array([3], np.int8), 3),
        (float, np.array([0.5], np.float32), 0.5),
        (bool, np.array([True]), True),
        (list[str], strings(b"a", b"b"), ["a", "b"]),
        (list[str], strings(b"a", b"b").reshape(2, 1), ["a", "b"]),
        (list[list[int]], np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (list[float], np.zeros(0), []),
    ],
)
def test_arrays_become_what_is_hinted(hint, array, value):
    datatype = BYTES if array.dtype == object else next(d for d in DTYPES.values() if d.numpy == array.dtype)
    got = to_value(parse_hint(hint), "x", datatype)(array)
    assert got == value
    assert type(got) is type(value)


def test_an_input_of_another_rank_or_encoding_is_the_clients_fault():
    with pytest.raises(InvalidArgument, match=r"input 'x' has shape \[2, 2\], but the model takes list\[int\]"):
        to_value(parse_hint(list[int]), "x", INT64)(np.zeros((2, 2), np.int64))
    with pytest.raises(InvalidArgument, match="input 'x' holds bytes that are not UTF-8"):
        to_value(parse_hint(npt.NDArray[np.str_]), "x", BYTES)(strings(b"\xff"))


@pytest.mark.parametrize(
    ("hint", "datatype", "value", "expected"),
    [
        (list[int], INT8, [1, np.int64(2)], [1, 2]),
        (list[float], FP32, (1, 2.5), [1, 2.5]),
        (list[float], FP32, np.array([1.5]), [1.5]),
        (list[str], BYTES, ["ü", np.str_("a")], ["ü".encode(), b"a"]),
        (list[str], BYTES, np.array(["a", "b"]), [b"a", b"b"]),
        (list[bytes], BYTES, [b"a\0", bytearray(b"b")], [b"a\0", b"b"]),
        (str, BYTES, "x", b"x"),
        (int, INT64, np.int32(4), 4),
        (list[list[int]], INT64, [[], []], [[], []]),
        (npt.NDArray[np.float32], FP32, [1, 2], [1, 2]),
        (npt.NDArray[np.float32], FP32, np.float32(2), 2),
        (npt.NDArray[np.str_], BYTES, np.array([["a"], ["ü"]]), [[b"a"], ["ü".encode()]]),
    ],
)
def test_values_become_the_outputs_array(hint, datatype, value, expected):
    array = to_array(parse_hint(hint), "y", datatype, value)
    assert array.dtype == datatype.numpy
    assert array.tolist() == expected


@pytest.mark.parametrize(
    ("hint", "datatype", "value", "message"),
    [
        (list[int], INT8, [300], "output 'y' cannot be INT8: "),
        (list[str], BYTES, [1], "output 'y': expected list[str], got one with an int in it"),
        (list[str], BYTES, "abc", "output 'y': expected list[str], got a str"),
        (list[bytes], BYTES, ["a"], "output 'y': expected list[bytes], got one with a str in it"),
        (float, FP32, [1.0], "output 'y': expected float, got a list"),
        (float, FP32, "1.0", "output 'y': expected float, got a str"),
        (npt.NDArray[np.float32], FP32, "abc", "output 'y': expected np.NDArray"),
        (npt.NDArray[np.float32], FP32, np.zeros(1), "output 'y' is an array of float64; expected float32 (return it"),
        (npt.NDArray[np.float32], FP32, ["a"], "output 'y' cannot be FP32: "),
        (npt.NDArray[np.str_], BYTES, np.zeros(1), "output 'y': expected strings or bytes, got an array of float64"),
        (npt.NDArray[np.object_], BYTES, np.array([1], object), "output 'y': expected strings or bytes, got an array"),
    ],
)
def test_a_value_that_does_not_fit_is_named(hint, datatype, value, message):
    with pytest.raises(BackendError) as error:
        to_array(parse_hint(hint), "y", datatype, value)
    assert error.value.message.startswith(message) or message.endswith("NDArray")
