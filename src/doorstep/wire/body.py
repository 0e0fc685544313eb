"""A large request body of known length, received straight into the memory it stays in. Knows no HTTP.

The buffer is asked for whole but not touched before bytes arrive, so that a client that only promises a large body
costs address space, not memory; and since the first byte in a very large buffer may cost a huge page of 2 MiB, the
beginning of a very large body has to arrive before its buffer is made. What has arrived counts against the listener's
`arriving_bytes`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from doorstep.wire.exchange import Buffer

if TYPE_CHECKING:
    from doorstep.wire.http1_reader import RequestReader

LARGE_BYTES = 65_536  # bodies from this size on are received this way
_VERY_LARGE_BYTES = 4 << 20  # numpy asks for huge pages from here on
_BEGINNING_BYTES = 262_144


class LargeBody(asyncio.BufferedProtocol):
    """Stands in for its connection on the transport until the body is whole. Touched only from the event loop."""

    __slots__ = ("_connection", "_length", "_room", "_view")

    def __init__(self, connection: RequestReader, length: int, first: list[bytes]) -> None:
        self._connection = connection
        self._length = length
        # Not zeroed: nobody sees it before it is full.
        self._view = np.empty(length if length < _VERY_LARGE_BYTES else _BEGINNING_BYTES, np.uint8).data
        self._room = self._view
        for piece in first:
            self.put(piece)

    @property
    def missing(self) -> int:
        return self._length - len(self._view) + len(self._room)

    @property
    def body(self) -> memoryview:
        """The whole body, once nothing is missing."""
        assert not self.missing
        return self._view

    def put(self, data: Buffer) -> None:
        """Bytes that came before the transport was switched over; no more than are missing."""
        rest = memoryview(data)
        while rest:
            size = min(len(rest), len(self._room))
            self._room[:size] = rest[:size]
            rest = rest[size:]
            self._filled(size)

    def _filled(self, size: int) -> None:
        self._room = self._room[size:]
        if not self._room and self.missing:
            beginning = self._view
            self._view = np.empty(self._length, np.uint8).data
            self._view[: len(beginning)] = beginning
            self._room = self._view[len(beginning) :]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._filled(nbytes)
        except MemoryError:
            self._connection.refuse_arriving()
            return
        self._connection.large_body_grew(self, nbytes)

    def eof_received(self) -> None:
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
