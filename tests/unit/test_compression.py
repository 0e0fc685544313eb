"""Content codings, checked against Python's own gzip and zlib."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest

from doorstep.errors import InvalidArgument
from doorstep.wire.compression import TooLarge, choose_coding, compress, decompress

LIMIT = 1 << 20


@pytest.mark.parametrize(
    "body", [b"", b"x", b"hello " * 50_000, bytes(range(256)) * 100], ids=["empty", "x", "long", "all"]
)
def test_what_a_client_compressed_comes_out_as_it_was(body: bytes) -> None:
    assert bytes(decompress(b"gzip", gzip.compress(body), LIMIT)) == body
    assert bytes(decompress(b"deflate", zlib.compress(body), LIMIT)) == body
    assert bytes(decompress(b"identity", body, LIMIT)) == body


def test_the_data_say_whether_they_are_gzip_or_deflate() -> None:
    """Triton lets zlib detect the format, whichever of the two the header names."""
    assert decompress(b"gzip", zlib.compress(b"abc"), LIMIT) == b"abc"
    assert decompress(b"deflate", gzip.compress(b"abc"), LIMIT) == b"abc"


def test_a_gzip_body_may_have_several_members() -> None:
    assert decompress(b"gzip", gzip.compress(b"abc") + gzip.compress(b"def"), LIMIT) == b"abcdef"


@pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
def test_exactly_the_limit_is_allowed_and_one_byte_more_is_not(coding: bytes) -> None:
    pack = gzip.compress if coding == b"gzip" else zlib.compress
    assert len(decompress(coding, pack(bytes(LIMIT)), LIMIT)) == LIMIT
    with pytest.raises(
        TooLarge, match=r"exceeds the maximum allowed value of 1048576 bytes. Use --http-max-input-size"
    ):
        decompress(coding, pack(bytes(LIMIT + 1)), LIMIT)


def test_many_small_members_do_not_add_up_past_the_limit() -> None:
    with pytest.raises(TooLarge):
        decompress(b"gzip", gzip.compress(bytes(LIMIT // 4)) * 5, LIMIT)


def test_a_bomb_costs_little_more_than_the_limit() -> None:
    bomb = gzip.compress(bytes(256 << 20), compresslevel=1)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decompress(b"gzip", bomb, LIMIT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * LIMIT


@pytest.mark.parametrize(
    "body",
    [b"", b"plain", gzip.compress(b"abc" * 1000)[:-9], zlib.compress(b"abc") + b"x", gzip.compress(b"a") + b"tail"],
    ids=["empty", "plain", "cut", "tail after zlib", "tail after gzip"],
)
@pytest.mark.parametrize("coding", [b"gzip", b"deflate"])
def test_what_is_not_compressed_properly_is_refused(coding: bytes, body: bytes) -> None:
    with pytest.raises(InvalidArgument):
        decompress(coding, body, LIMIT)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, b"identity"), (b"", b"identity"), (b"gzip", b"gzip"), (b"deflate", b"deflate"), (b"br", b"identity"),
        (b"gzip, deflate", b"gzip"), (b"deflate, gzip", b"deflate"), (b"gzip;q=0.5, deflate;q=0.8", b"deflate"),
        (b"gzip;q=0.5, deflate;q=0.5", b"gzip"), (b"identity, gzip", b"identity"),
        (b"identity;q=0.1, gzip;q=0.2", b"gzip"),
        (b"br;q=1, gzip;q=0.1", b"gzip"), (b"gzip;q=0", b"identity"), (b"GZIP", b"gzip"), (b" gzip ; q=0.9 ", b"gzip"),
        (b"gzip;q=banana", b"identity"), (b"*", b"identity"), (b"gzip;q=nan", b"identity"), (b",,;", b"identity"),
    ],
)  # fmt: skip
def test_the_coding_with_the_highest_quality_is_chosen_and_the_first_of_equals(
    accept: bytes | None, chosen: bytes
) -> None:
    assert choose_coding(accept) == chosen


def test_an_answer_in_several_buffers_is_compressed_as_one() -> None:
    buffers = (b"head", memoryview(b"tensor" * 100), bytearray(b"tail"))
    whole = b"".join(buffers)
    assert gzip.decompress(b"".join(compress(b"gzip", *buffers))) == whole
    assert zlib.decompress(b"".join(compress(b"deflate", *buffers))) == whole
    assert compress(b"identity", *buffers) == buffers
