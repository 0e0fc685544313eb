"""gRPC's messages, statuses, timeouts and compression; deadlines; and DATA frames on their way out. No socket."""

from __future__ import annotations

import gzip
import itertools
import random
import struct
import zlib
from typing import Any
from urllib.parse import unquote

import pytest

from doorstep.errors import ErrorCode
from doorstep.wire.deadlines import Deadlines
from doorstep.wire.flow import CONNECTION_FULL, STREAM_FULL, Outbox, OutStream, window_update
from doorstep.wire.grpc_codec import BadFlag, MessageReader, MessageTooLarge, prefix
from doorstep.wire.grpc_compression import CompressionLevel, Corrupt, choose_encoding, compress, decompress
from doorstep.wire.grpc_status import STATUS_OF, encode_message, is_grpc, parse_timeout, trailers_only

LIMIT = 1 << 20


def frame(message: bytes, flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(message)) + message


def read(pieces: list[bytes], limit: int = LIMIT) -> list[tuple[int, bytes]]:
    """What a reader makes of a body in pieces, with its room filled as a connection would."""
    reader = MessageReader(limit)
    messages: list[tuple[int, bytes]] = []
    for piece in pieces:
        room = reader.room
        if room is not None:
            missing = len(room)
            if len(piece) < missing:
                room[: len(piece)] = piece
                reader.room = room[len(piece) :]
                continue
            room[:] = piece[:missing]
            piece = piece[missing:]
            flag, message = reader.filled()
            messages.append((flag, bytes(message)))
        messages += [(flag, bytes(message)) for flag, message in reader.feed(piece)]
    assert reader.between
    return messages


# Messages


def test_prefix_is_flag_and_big_endian_length() -> None:
    assert prefix(0x01020304) == b"\x00\x01\x02\x03\x04"
    assert prefix(5, compressed=True) == b"\x01\x00\x00\x00\x05"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 11, 100, 16_383, 16_384, 20_000, 100_000])
def test_messages_are_found_however_the_body_is_cut(size: int) -> None:
    sizes = [0, 1, 10, 16_383, 16_384, 16_385, 0, 70_000, 3]
    messages = [(i % 2, bytes([i]) * n) for i, n in enumerate(sizes)]
    body = b"".join(frame(message, flag) for flag, message in messages)
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    assert read(pieces) == messages


def test_messages_are_found_in_pieces_of_any_sizes() -> None:
    dice = random.Random(1)
    for _ in range(200):
        messages = [(0, dice.randbytes(dice.choice((0, 1, 100, 20_000)))) for _ in range(dice.randint(1, 5))]
        body = b"".join(frame(message) for _, message in messages)
        cuts = sorted(dice.randrange(len(body) + 1) for _ in range(dice.randint(0, 6)))
        pieces = [body[a:b] for a, b in itertools.pairwise([0, *cuts, len(body)])]
        assert read(pieces) == messages


def test_message_beyond_the_limit_is_refused_before_there_is_room_for_it() -> None:
    reader = MessageReader(100)
    assert [bytes(m) for _, m in reader.feed(frame(bytes(100)))] == [bytes(100)]
    with pytest.raises(MessageTooLarge, match=r"larger than max \(101 vs\. 100\)"):
        reader.feed(frame(bytes(101))[:5])
    assert reader.room is None


def test_flag_other_than_0_and_1_is_refused() -> None:
    with pytest.raises(BadFlag):
        MessageReader(100).feed(b"\x02\0\0\0\0")


def test_reader_knows_whether_a_message_has_begun() -> None:
    reader = MessageReader(LIMIT)
    assert reader.between
    reader.feed(b"\0\0")
    assert not reader.between
    reader.feed(b"\0\0\1x")
    assert reader.between
    reader.feed(frame(bytes(50_000))[:10])
    assert not reader.between


# Statuses


def test_every_error_code_has_a_status() -> None:
    assert set(STATUS_OF) == set(ErrorCode)


@pytest.mark.parametrize("text", ["plain", "100 %", "zwei\nZeilen", "größer", "日本", "\x00\x7f", "a%20b", ""])
def test_message_survives_percent_encoding(text: str) -> None:
    encoded = encode_message(text)
    assert all(0x20 <= byte < 0x7F for byte in encoded)
    assert unquote(encoded.decode()) == text


@pytest.mark.parametrize("text", ["x" * 100_000, "ä" * 100_000, "%" * 100_000, "日" * 100_000])
def test_long_message_is_cut_between_characters(text: str) -> None:
    encoded = encode_message(text)
    assert 1000 < len(encoded) <= 4096
    assert text.startswith(unquote(encoded.decode(), errors="strict"))


def test_trailers_only_answer_is_200_with_a_status() -> None:
    fields = dict(trailers_only(5, "no"))
    assert fields[b":status"] == b"200"
    assert fields[b"content-type"] == b"application/grpc"
    assert (fields[b"grpc-status"], fields[b"grpc-message"]) == (b"5", b"no")
    assert b"grpc-message" not in dict(trailers_only(5, ""))


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [(b"1H", 3600 * 10**9), (b"2M", 120 * 10**9), (b"3S", 3 * 10**9), (b"4m", 4_000_000), (b"5u", 5000), (b"6n", 6),
     (b"99999999H", 99_999_999 * 3600 * 10**9), (b"0S", 0)],
)  # fmt: skip
def test_timeout_has_six_units(value: bytes, nanoseconds: int) -> None:
    assert parse_timeout(value) == nanoseconds


@pytest.mark.parametrize("value", [b"", b"S", b"1", b"123456789S", b"1.5S", b"-1S", b"1 S", b"1s", b"\xb2S", b"+1S"])
def test_malformed_timeout_is_refused(value: bytes) -> None:
    with pytest.raises(ValueError, match="malformed grpc-timeout"):
        parse_timeout(value)


def test_grpc_is_known_by_its_content_type() -> None:
    assert is_grpc({b"content-type": b"application/grpc+proto"})
    assert not is_grpc({b"content-type": b"application/json"})
    assert not is_grpc({})


# Compression


def test_real_gzip_and_zlib_data_is_understood() -> None:
    data = b"tensor " * 1000
    assert decompress(b"gzip", gzip.compress(data), len(data)) == data
    assert decompress(b"deflate", zlib.compress(data), len(data)) == data


@pytest.mark.parametrize("level", [CompressionLevel.LOW, CompressionLevel.MEDIUM, CompressionLevel.HIGH])
def test_compressed_messages_are_real_gzip_and_zlib_data(level: CompressionLevel) -> None:
    buffers = (b"tensor " * 1000, memoryview(b"abc"), bytearray(b"d"))
    assert gzip.decompress(compress(b"gzip", level, buffers)) == b"".join(buffers)
    assert zlib.decompress(compress(b"deflate", level, buffers)) == b"".join(buffers)


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
@pytest.mark.parametrize("size", [1, 3_000_000])
def test_nothing_is_inflated_beyond_the_limit(encoding: bytes, size: int) -> None:
    data = compress(encoding, CompressionLevel.HIGH, (bytes(size),))
    assert len(decompress(encoding, data, size)) == size
    with pytest.raises(MessageTooLarge):
        decompress(encoding, data, size - 1)


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_corrupt_data_is_told_from_whole_data(encoding: bytes) -> None:
    whole = compress(encoding, CompressionLevel.LOW, (b"tensor " * 100,))
    for broken in (whole[:-1], whole[: len(whole) // 2], b"", b"x" * 50, whole + b"x"):
        with pytest.raises(Corrupt):
            decompress(encoding, broken, LIMIT)


def test_encoding_for_answers_is_one_the_client_accepts() -> None:
    assert choose_encoding(b"identity, deflate, gzip") == b"gzip"
    assert choose_encoding(b"identity,deflate") == b"deflate"
    assert choose_encoding(b"identity, snappy") is None
    assert choose_encoding(None) is None


# Deadlines


class Timer:
    def __init__(self, loop: Loop, delay_s: float, callback: Any) -> None:
        self.at_ns = loop.now_ns + int(delay_s * 1e9)
        self.callback = callback
        self.loop = loop

    def cancel(self) -> None:
        self.loop.timers.remove(self)


class Loop:
    """call_later, and a clock that only the test moves."""

    def __init__(self) -> None:
        self.now_ns = 10**12
        self.timers: list[Timer] = []

    def clock(self) -> int:
        return self.now_ns

    def call_later(self, delay_s: float, callback: Any) -> Timer:
        timer = Timer(self, delay_s, callback)
        self.timers.append(timer)
        return timer

    def advance(self, until_ns: int) -> None:
        while due := [timer for timer in self.timers if timer.at_ns <= until_ns]:
            timer = min(due, key=lambda t: t.at_ns)
            self.timers.remove(timer)
            self.now_ns = max(self.now_ns, timer.at_ns)
            timer.callback()
        self.now_ns = until_ns


class Item:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.expired_ns: list[int] = []

    def expire(self) -> None:
        self.expired_ns.append(self.loop.now_ns)


MS = 1_000_000


def test_items_expire_once_and_never_before_their_deadline() -> None:
    loop, dice = Loop(), random.Random(2)
    deadlines = Deadlines(loop, loop.clock)  # type: ignore[arg-type]
    items = [(Item(loop), loop.now_ns + dice.randrange(3000) * MS) for _ in range(500)]
    for item, deadline_ns in items:
        deadlines.add(deadline_ns, item)
    assert len(loop.timers) == 1, "one timer for all"
    loop.advance(loop.now_ns + 4000 * MS)
    for item, deadline_ns in items:
        (expired_ns,) = item.expired_ns
        assert deadline_ns <= expired_ns <= deadline_ns + 50 * MS
    assert len(deadlines) == 0
    assert not loop.timers


def test_discarded_items_never_expire_and_leave_nothing() -> None:
    loop = Loop()
    deadlines = Deadlines(loop, loop.clock)  # type: ignore[arg-type]
    for i in range(20_000):
        item = Item(loop)
        deadlines.discard(deadlines.add(loop.now_ns + 3_600_000 * MS + i * 20 * MS, item), item)
    assert len(deadlines) == 0
    assert len(deadlines._heap) < 100, "an hour of calls is not kept for an hour"
    loop.advance(loop.now_ns + 5_000_000 * MS)
    assert not loop.timers


def test_nearer_deadline_than_the_timer_is_kept_too() -> None:
    loop = Loop()
    deadlines = Deadlines(loop, loop.clock)  # type: ignore[arg-type]
    late, early = Item(loop), Item(loop)
    deadlines.add(loop.now_ns + 10_000 * MS, late)
    deadlines.add(loop.now_ns + 100 * MS, early)
    loop.advance(loop.now_ns + 200 * MS)
    assert early.expired_ns
    assert not late.expired_ns


# DATA frames on their way out


class Pipe:
    """An outbox, and what a client gets out of it."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.bodies: dict[int, bytes] = {}
        self.frames: list[tuple[int, int]] = []  # stream, size
        self.done: list[int] = []

    def pump(self, budget: int = 1 << 30) -> None:
        out: list[Any] = []
        self.done += [stream.stream_id for stream in self.outbox.pump(budget, out)]
        data = b"".join(out)
        while data:
            high, low, kind, flags, stream_id = struct.unpack(">BHBBL", data[:9])
            size = high << 16 | low
            assert (kind, flags) == (0, 0)
            assert 0 < size <= self.outbox.max_frame
            self.bodies[stream_id] = self.bodies.get(stream_id, b"") + data[9 : 9 + size]
            self.frames.append((stream_id, size))
            data = data[9 + size :]

    def open(self, stream_id: int, window: int = 65_535) -> OutStream:
        return self.outbox.open(stream_id, window, None)


@pytest.fixture
def pipe() -> Pipe:
    return Pipe()


def test_body_leaves_whole_and_ends(pipe: Pipe) -> None:
    stream = pipe.open(1)
    for buffer in (b"ab", b"", memoryview(b"cd"), bytearray(b"e" * 40_000)):
        pipe.outbox.put(stream, buffer)
    pipe.pump()
    assert pipe.bodies == {1: b"abcd" + b"e" * 40_000}
    assert pipe.frames == [(1, 16_384), (1, 16_384), (1, 7236)], "buffers share frames"
    assert pipe.done == []
    pipe.outbox.finish(stream, ())
    pipe.pump()
    assert pipe.done == [1]
    assert pipe.outbox.queued == 0
    assert not pipe.outbox.streams


def test_nothing_leaves_beyond_a_window(pipe: Pipe) -> None:
    one, three = pipe.open(1, 100), pipe.open(3, 1_000_000)
    pipe.outbox.put(one, bytes(1000))
    pipe.outbox.put(three, bytes(100_000))
    pipe.pump()
    assert {stream: len(body) for stream, body in pipe.bodies.items()} == {1: 100, 3: 65_435}
    assert pipe.outbox.credit == 0
    assert not pipe.outbox.sendable
    pipe.outbox.grant(10)
    pipe.outbox.grant_stream(one, 5)
    pipe.pump()
    assert sum(map(len, pipe.bodies.values())) == 65_545


def test_settings_change_the_windows_of_open_streams_even_below_zero(pipe: Pipe) -> None:
    stream = pipe.open(1, 65_535)
    pipe.outbox.put(stream, bytes(1000))
    pipe.pump(100)
    pipe.outbox.settings({4: 50})
    assert stream.window == 50 - 100
    pipe.pump()
    assert len(pipe.bodies[1]) == 100
    pipe.outbox.settings({4: 200})
    pipe.pump()
    assert len(pipe.bodies[1]) == 200


def test_frames_are_as_large_as_settings_say_but_not_larger_than_is_fair(pipe: Pipe) -> None:
    pipe.outbox.settings({5: 16_777_215})
    pipe.outbox.grant(10_000_000)
    stream = pipe.open(1, 10_000_000)
    pipe.outbox.put(stream, bytes(3_000_000))
    pipe.pump()
    assert max(size for _, size in pipe.frames) == 1 << 20


def test_library_is_told_of_credit_only_when_the_debt_is_paid(pipe: Pipe) -> None:
    stream = pipe.open(1)
    pipe.outbox.put(stream, bytes(1000))
    pipe.pump()
    assert pipe.outbox.debt == 1000
    assert pipe.outbox.grant(400) == 0
    assert pipe.outbox.grant(700) == 100
    assert pipe.outbox.debt == 0
    assert pipe.outbox.credit == 65_535 + 100


def test_large_body_does_not_keep_another_waiting(pipe: Pipe) -> None:
    pipe.outbox.grant(100_000_000)
    large, small = pipe.open(1, 100_000_000), pipe.open(3)
    pipe.outbox.put(large, bytes(50_000_000))
    pipe.outbox.put(small, b"x")
    pipe.outbox.finish(small, ())
    pipe.pump(4_000_000)
    assert pipe.done == [3]
    assert len(pipe.bodies[1]) < 4_000_000


def test_closed_stream_sends_nothing_more_and_gives_its_bytes_back(pipe: Pipe) -> None:
    stream = pipe.open(1, 100)
    pipe.outbox.put(stream, bytes(1000))
    pipe.outbox.close(1)
    pipe.pump()
    assert not pipe.bodies
    assert pipe.outbox.queued == 0
    pipe.outbox.close(1)


def test_endpoint_waits_sooner_where_much_is_queued_of_others(pipe: Pipe) -> None:
    streams = [pipe.open(i, 0) for i in range(1, 101, 2)]
    pipe.outbox.put(streams[0], bytes(STREAM_FULL))
    assert not pipe.outbox.is_full(streams[0])
    pipe.outbox.put(streams[0], b"x")
    assert pipe.outbox.is_full(streams[0])
    pipe.outbox.put(streams[1], bytes(CONNECTION_FULL))
    pipe.outbox.put(streams[2], bytes(STREAM_FULL // 2))
    assert pipe.outbox.is_full(streams[2])
    assert not pipe.outbox.is_full(streams[3])


def test_random_traffic_arrives_whole_and_within_its_windows(pipe: Pipe) -> None:
    dice = random.Random(3)
    outbox, sent, granted, total = pipe.outbox, {}, {}, 65_535  # what was put, what streams and connection were granted
    streams = {}
    for stream_id in range(1, 21, 2):
        streams[stream_id] = pipe.open(stream_id)
        sent[stream_id], granted[stream_id] = b"", 65_535
    for _ in range(500):
        stream_id = dice.choice(list(streams))
        match dice.randrange(5):
            case 0 | 1:
                data = dice.randbytes(dice.choice((1, 100, 20_000)))
                sent[stream_id] += data
                outbox.put(streams[stream_id], data)
            case 2:
                granted[stream_id] += 5000
                outbox.grant_stream(streams[stream_id], 5000)
            case 3:
                total += 7000
                outbox.grant(7000)
            case 4:
                pipe.pump(dice.randrange(1, 50_000))
        bodies = pipe.bodies
        assert sum(map(len, bodies.values())) + outbox.credit == total
        assert outbox.credit >= 0
        assert all(len(body) <= granted[i] for i, body in bodies.items())
    outbox.grant(10_000_000)
    for stream in streams.values():
        outbox.grant_stream(stream, 10_000_000)
        outbox.finish(stream, ())
    pipe.pump()
    assert {i: body for i, body in sent.items() if body} == pipe.bodies
    assert sorted(pipe.done) == list(streams)


def test_window_update_is_a_frame_of_four_bytes() -> None:
    assert window_update(3, 0x01020304) == b"\0\0\4\x08\0\0\0\0\3\1\2\3\4"
