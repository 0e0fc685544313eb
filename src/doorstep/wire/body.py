"""A large request body of known length, received straight into the memory it stays in. Knows no HTTP.

The buffer is asked for whole but not touched before bytes arrive, so that a client that only promises a large body
costs address space, not memory. What has arrived counts against the listener's `arriving_bytes`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from doorstep.wire.exchange import Buffer

if TYPE_CHECKING:
    from doorstep.wire.http1_reader import RequestReader

LARGE_BYTES = 65_536  # bodies from this size on are received this way


class LargeBody(asyncio.BufferedProtocol):
    """Stands in for its connection on the transport until the body is whole. Touched only from the event loop."""

    __slots__ = ("_connection", "_room", "view")

    def __init__(self, connection: RequestReader, length: int, first: list[bytes]) -> None:
        self._connection = connection
        self.view = np.empty(length, np.uint8).data  # not zeroed: nobody sees it before it is full
        self._room = self.view
        for piece in first:
            self.put(piece)

    @property
    def missing(self) -> int:
        return len(self._room)

    def put(self, data: Buffer) -> None:
        """Bytes that came before the transport was switched over; no more than are missing."""
        size = len(data)
        self._room[:size] = data
        self._room = self._room[size:]

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._room

    def buffer_updated(self, nbytes: int) -> None:
        self._room = self._room[nbytes:]
        self._connection.large_body_grew(self, nbytes)

    def eof_received(self) -> None:
        self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        self._connection.resume_writing()
