"""Which requests and responses are too much work for the event loop. Knows no wire format.

Binary tensors are views and cost nothing; it is text, and BYTES, whose elements are looked at one by one. A million of
them take a second or so, in which nobody else would be answered: they are dealt with in a thread instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from doorstep.config.model import ModelConfig
from doorstep.types import BYTES, Tensor

TEXT_BYTES = 1 << 20  # of JSON, or of a body with BYTES tensors
ELEMENTS = 1 << 16  # of an output that is written element by element


def is_long_request(text_size: int, body_size: int, config: ModelConfig) -> bool:
    return text_size > TEXT_BYTES or (body_size > TEXT_BYTES and config.takes_bytes)


def is_long_response(outputs: Iterable[Tensor], *, binary: bool) -> bool:
    """`binary`: numbers go out as they are."""
    for tensor in outputs:  # noqa: SIM110 (a generator costs more than the look)
        if tensor.array.size > ELEMENTS and not (binary and tensor.datatype is not BYTES):
            return True
    return False


class Outcome:
    """A call that runs aside, and what came of it; `result` is to be asked once.

    Futures, and those that asyncio makes of them, hold each other until the garbage collector comes by, and with an
    error all that its frames hold: a million numbers of a body that was none. So they are given nothing to hold."""

    __slots__ = ("_call", "_error", "_value")

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call: Callable[[], Any] | None = call
        self._value: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """In the thread."""
        call, self._call = self._call, None
        assert call is not None
        try:
            self._value = call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """What it gave. Raises what it raised."""
        if self._call is not None:  # the loop ends, and it never ran
            raise asyncio.CancelledError
        value, self._value = self._value, None
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
            return value
        finally:
            del error


def aside(then: Callable[[Outcome], None], function: Callable[..., Any], *arguments: Any) -> None:
    """Runs `function` in a thread, and `then` with what came of it on the loop."""
    outcome = Outcome(partial(function, *arguments))
    work = asyncio.get_running_loop().run_in_executor(None, outcome.run)
    work.add_done_callback(lambda _: then(outcome))
