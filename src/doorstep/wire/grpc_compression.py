"""Message compression of gRPC: gzip and deflate (zlib-wrapped). Knows no stream.

Unlike HTTP's content-encoding it is per message. What comes out of a message is bounded before it is inflated whole.
"""

from __future__ import annotations

import zlib
from enum import Enum

from doorstep.wire.exchange import Buffer
from doorstep.wire.grpc_codec import MessageTooLarge

ENCODINGS = {b"gzip": 31, b"deflate": 15}  # zlib's window bits
INLINE_BYTES = 32_768  # larger messages are (de)compressed away from the event loop
_PIECE = 1 << 20


class CompressionLevel(Enum):
    """tritonserver's --grpc-infer-response-compression-level, and zlib's levels for it."""

    NONE = 0
    LOW = 1
    MEDIUM = 6
    HIGH = 9


class Corrupt(ValueError):
    """A message that is not what its encoding says."""


def decompress(encoding: bytes, data: Buffer, limit: int) -> Buffer:
    """The message inside. Raises Corrupt, and MessageTooLarge beyond `limit` bytes."""
    inflater = zlib.decompressobj(ENCODINGS[encoding])
    pieces: list[bytes] = []
    room = limit
    rest: Buffer = data
    try:
        while not inflater.eof:
            piece = inflater.decompress(rest, min(room + 1, _PIECE))
            if len(piece) > room:
                raise MessageTooLarge(f"Received message larger than max (more than {limit} when decompressed)")
            room -= len(piece)
            pieces.append(piece)
            rest = inflater.unconsumed_tail
            if not rest and not piece and not inflater.eof:
                raise Corrupt(f"the {encoding.decode()} data of a message ends early")
    except zlib.error as error:
        raise Corrupt(f"a message is not {encoding.decode()} data: {error}") from None
    if inflater.unused_data:
        raise Corrupt(f"bytes follow the {encoding.decode()} data of a message")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def compress(encoding: bytes, level: CompressionLevel, buffers: tuple[Buffer, ...]) -> bytes:
    deflater = zlib.compressobj(level.value, wbits=ENCODINGS[encoding])
    return b"".join([*map(deflater.compress, buffers), deflater.flush()])


def choose_encoding(accepted: bytes | None) -> bytes | None:
    """The encoding for answers to a client with this `grpc-accept-encoding`; None: identity."""
    if not accepted:
        return None
    names = {name.strip() for name in accepted.split(b",")}
    return next((encoding for encoding in ENCODINGS if encoding in names), None)
