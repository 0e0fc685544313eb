"""gRPC messages in and out of a body: five bytes of flag and length before each. Knows no stream and no compression."""

from __future__ import annotations

from struct import Struct

from doorstep.wire.exchange import Buffer
from doorstep.wire.http2_exchange import landing

PREFIX = Struct(">BI")  # compressed or not, length
_ROOMY = 16_384  # messages from this size on, not yet whole, get a buffer of their own

_unpack = PREFIX.unpack_from
_pack = PREFIX.pack


class MessageTooLarge(ValueError):
    """A message longer than the limit; nothing of it has been kept."""


class BadFlag(ValueError):
    """The byte before a message's length is neither 0 nor 1."""


def prefix(size: int, compressed: bool = False) -> bytes:
    return _pack(compressed, size)


class MessageReader:
    """Messages out of a body that comes in pieces, however they are cut."""

    __slots__ = ("_flag", "_limit", "_partial", "_whole", "room")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._partial = b""  # the beginning of a small message, or of a prefix
        self._whole: memoryview | None = None  # a large message that is arriving
        self._flag = 0
        self.room: memoryview | None = None  # the part of it that is missing; whoever fills it calls `filled`

    @property
    def between(self) -> bool:
        """No message has begun and not ended."""
        return not self._partial and self._whole is None

    def feed(self, data: bytes) -> list[tuple[int, Buffer]]:
        """The messages that are complete now, with their flags. Only when `room` is None.

        Raises MessageTooLarge and BadFlag; no more can be read after that."""
        if self._partial:
            data = self._partial + data
            self._partial = b""
        size = len(data)
        position = 0
        messages: list[tuple[int, Buffer]] = []
        while size - position >= 5:
            flag, length = _unpack(data, position)
            if flag > 1:
                raise BadFlag(f"the flag before a message is {flag}, expected 0 or 1")
            if length > self._limit:
                raise MessageTooLarge(f"Received message larger than max ({length} vs. {self._limit})")
            start = position + 5
            end = start + length
            if end > size:
                if length >= _ROOMY:
                    self._flag = flag
                    self._whole = whole = landing(length)
                    whole[: size - start] = memoryview(data)[start:]
                    self.room = whole[size - start :]
                    return messages
                break
            messages.append((flag, data[start:end] if length < _ROOMY else memoryview(data)[start:end]))
            position = end
        if position < size:
            self._partial = data[position:] if position else data
        return messages

    def filled(self) -> tuple[int, Buffer]:
        """The message whose `room` is full now."""
        whole = self._whole
        assert whole is not None
        self._whole = self.room = None
        return self._flag, whole
