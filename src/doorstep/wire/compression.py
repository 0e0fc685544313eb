"""Content-Encoding, both ways: gzip and deflate (zlib-wrapped, as HTTP means it). Knows no connection.

Decompression is bounded by the size of what comes out, so that a small body cannot become a large one.
"""

from __future__ import annotations

import zlib

from doorstep.errors import InvalidArgument
from doorstep.wire.answers import JSON, error_body
from doorstep.wire.exchange import Buffer, Refusal

_WINDOW_BITS = {b"gzip": 31, b"deflate": 15}
_DETECT = 47  # zlib finds out which of the two it is
_PIECE = 1 << 20  # bytes inflated at a time: what an oversize body costs beyond its limit
INLINE_BYTES = 4096  # compressed bodies up to this size are inflated on the loop; at 1000:1 that is 4 MB, some ms


class TooLarge(InvalidArgument):
    """A body that is, or would become, larger than its limit."""


class ContentCodings:
    """Which content-encodings a route accepts, and its answer to the others."""

    __slots__ = ("accepted", "refusal")

    def __init__(self, accepted: frozenset[bytes], refusal: Refusal) -> None:
        self.accepted = accepted
        self.refusal = refusal


# Triton's infer: 501, and what would have been accepted.
ANY_CODING = ContentCodings(
    frozenset({b"gzip", b"deflate", b"identity"}),
    Refusal(
        501,
        error_body("Unsupported compression type"),
        (*JSON, (b"accept-encoding", b"gzip, deflate")),
        grpc_status=12,
        grpc_message="Unsupported compression type",
    ),
)
# Triton's generate and generate_stream.
IDENTITY_ONLY = ContentCodings(
    frozenset({b"identity"}),
    Refusal(
        400,
        error_body("Unsupported content-encoding, only 'identity' is supported."),
        JSON,
        grpc_status=3,
        grpc_message="Unsupported content-encoding, only 'identity' is supported.",
    ),
)


def decompress(coding: bytes, body: Buffer, limit: int) -> Buffer:
    """The body without its `coding`. Raises TooLarge above `limit` bytes, InvalidArgument for what is not `coding`."""
    if coding == b"identity":
        return body
    if not body:
        raise InvalidArgument("nothing to be decompressed")
    pieces: list[bytes] = []
    room = limit
    rest: Buffer = body
    while True:
        inflater = zlib.decompressobj(_DETECT)
        try:
            while not inflater.eof:
                piece = inflater.decompress(rest, min(room + 1, _PIECE))
                if len(piece) > room:
                    raise TooLarge(
                        f"Decompressed data size exceeds the maximum allowed value of {limit} bytes. "
                        "Use --http-max-input-size to increase the limit."
                    )
                room -= len(piece)
                pieces.append(piece)
                rest = inflater.unconsumed_tail
                if not rest and not piece and not inflater.eof:
                    raise InvalidArgument(
                        f"Failed to decompress the request body: the {coding.decode()} data ends early"
                    )
        except zlib.error as error:
            raise InvalidArgument(f"Failed to decompress the request body: {error}") from None
        rest = inflater.unused_data
        if not rest:
            break
        # What follows must be compressed as well: a gzip file may be several, one after another.
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def choose_coding(accept_encoding: bytes | None) -> bytes:
    """The coding for an answer: of identity, gzip and deflate the one with the highest q; the first of equals."""
    best, best_quality = b"identity", 0.0
    if not accept_encoding:
        return best
    for item in accept_encoding.split(b","):
        name, *parameters = item.split(b";")
        name = name.strip().lower()
        if name not in (b"identity", b"gzip", b"deflate"):
            continue
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition(b"=")
            if key.strip().lower() == b"q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        if quality > best_quality:
            best, best_quality = name, quality
    return best


def compress(coding: bytes, *body: Buffer) -> tuple[Buffer, ...]:
    """The buffers of an answer's body, in `coding`."""
    if coding == b"identity":
        return body
    deflater = zlib.compressobj(wbits=_WINDOW_BITS[coding])
    return (b"".join([*map(deflater.compress, body), deflater.flush()]),)
