"""As much of protobuf's wire format as keeps tensor bytes from being copied. Knows no message.

A parsed message owns a copy of each of its bytes fields; a request of hundreds of kilobytes spends most of its time
there. So the raw tensors of a large message are cut out as views first, and only the rest is parsed.
"""

from __future__ import annotations

from doorstep.wire.exchange import Buffer

_FIELDS = 4096  # of one message; one with more is made of small pieces and gains nothing


def varint(value: int) -> bytes:
    """`value`, which is not negative, as a base-128 varint."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def split_field(message: Buffer, number: int) -> tuple[bytes, list[memoryview]] | None:
    """The message without its length-delimited fields `number`, and views on what those hold, in order.

    None for anything out of the ordinary, malformed messages among it: then the whole must be parsed, and its parser
    says what is wrong.
    """
    view = memoryview(message)
    end = len(view)
    wanted = number << 3 | 2
    kept: list[memoryview] = []
    found: list[memoryview] = []
    position = 0
    for _ in range(_FIELDS):
        if position == end:
            return b"".join(kept), found
        start = position
        tag = view[position]
        position += 1
        if tag >= 0x80:
            more = _rest_of_varint(view, position, tag)
            if more is None:
                return None
            tag, position = more
        kind = tag & 7
        if tag < 8 or kind not in _SKIPPED:
            return None
        if kind == 2:
            if position == end:
                return None
            size = view[position]
            position += 1
            if size >= 0x80:
                more = _rest_of_varint(view, position, size)
                if more is None:
                    return None
                size, position = more
            stop = position + size
        elif kind == 0:
            stop = position
            while stop < end and view[stop] >= 0x80:
                stop += 1
            stop += 1
            if stop - position > 10:
                return None
        else:
            stop = position + _SKIPPED[kind]
        if stop > end:
            return None
        if tag == wanted:
            found.append(view[position:stop])
        else:
            kept.append(view[start:stop])
        position = stop
    return None


_SKIPPED = {0: 0, 1: 8, 2: 0, 5: 4}  # wire types, with the size of those that have one; groups are not handled


def _rest_of_varint(view: memoryview, position: int, first: int) -> tuple[int, int] | None:
    """The value whose first byte was `first`, and the position after it; None beyond 32 bits or the end."""
    value = first & 0x7F
    for shift, byte in zip((7, 14, 21, 28), view[position : position + 4], strict=False):
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (value, position) if value < 2**32 else None
    return None
