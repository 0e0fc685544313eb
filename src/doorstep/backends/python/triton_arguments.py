"""What the classes and functions of `pb_utils` take as text and as integers: what pybind11 takes for Triton's.

A `std::string` there may come from `bytes`, and an integer from whatever has `__index__`; model code has grown used to
both. Knows no class of the API.
"""

from __future__ import annotations

from operator import index
from typing import Any


def text_of(value: Any, what: str) -> str:
    """`what` names the argument. Raises TypeError."""
    if type(value) is str:
        return value
    if isinstance(value, bytes | bytearray):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise TypeError(f"{what} is no UTF-8: {bytes(value)!r}") from None
    if isinstance(value, str):  # numpy has one of its own
        return str(value)
    raise TypeError(f"{what} must be a str, not {type(value).__name__}")


def integer_of(value: Any, what: str, least: int, most: int) -> int:
    """Raises TypeError, for a value out of bounds too, as pybind11 does."""
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"{what} must be an int, not {type(value).__name__}") from None
    if not least <= number <= most:
        raise TypeError(f"{what} is {number}; it must be from {least} to {most}")
    return number
