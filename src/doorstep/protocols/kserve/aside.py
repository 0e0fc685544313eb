"""Which requests and responses are too much work for the event loop. Knows no wire format.

Binary tensors are views and cost nothing; it is text, and BYTES, whose elements are looked at one by one. A million of
them take a second or so, in which nobody else would be answered: they are dealt with in a thread instead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
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
    """What came of a function that ran aside; `result` is to be asked once.

    A future would keep its error, whose traceback keeps the frame that asks, which keeps the future: all that was read
    of a body that is none would stay until the garbage collector comes by."""

    __slots__ = ("_future",)

    def __init__(self, future: asyncio.Future[Any]) -> None:
        self._future: asyncio.Future[Any] | None = future

    def result(self) -> Any:
        """What it gave. Raises what it raised."""
        future, self._future = self._future, None
        assert future is not None
        try:
            return future.result()
        finally:
            del future


def aside(then: Callable[[Outcome], None], function: Callable[..., Any], *arguments: Any) -> None:
    """Runs `function` in a thread, and `then` with what came of it on the loop."""
    work = asyncio.get_running_loop().run_in_executor(None, function, *arguments)
    work.add_done_callback(lambda future: then(Outcome(future)))
