"""Whether a header block changes HPACK's table, told without decoding it (RFC 7541, section 6). Knows no header."""

from __future__ import annotations


def leaves_table_alone(block: bytes) -> bool:
    """True where every field is an index, or a literal not to be indexed: the same bytes then mean the same again."""
    position = 0
    try:
        while position < len(block):
            first = block[position]
            if first & 0x80:  # indexed field
                _, position = _integer(block, position, 7)
                continue
            if first & 0xE0:  # 01…: literal to be indexed; 001…: new size of the table
                return False
            index, position = _integer(block, position, 4)
            if index == 0:
                position = _after_string(block, position)
            position = _after_string(block, position)
    except IndexError:
        return False
    return position == len(block)


def _integer(block: bytes, position: int, prefix: int) -> tuple[int, int]:
    """(value, position behind it); section 5.1."""
    limit = (1 << prefix) - 1
    value = block[position] & limit
    position += 1
    if value < limit:
        return value, position
    shift = 0
    while True:
        octet = block[position]
        position += 1
        value += (octet & 0x7F) << shift
        shift += 7
        if not octet & 0x80:
            return value, position


def _after_string(block: bytes, position: int) -> int:
    length, position = _integer(block, position, 7)
    return position + length
