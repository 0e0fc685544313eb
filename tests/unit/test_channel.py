"""What crosses between the server and a worker process: frames, tensors laid out in memory, lines, segments."""

from __future__ import annotations

import os
import socket

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from doorstep.types import BYTES, DTYPES, FP32, INT32, Tensor, datatype_of
from doorstep.workers.channel import Channel
from doorstep.workers.frames import (
    ALIGNMENT,
    FRAME_LIMIT,
    FrameBuffer,
    Kind,
    Layout,
    ProtocolError,
    frame,
    pack_strings,
    read_tensors,
    unpack_strings,
)
from doorstep.workers.output import LINE_BYTES, LINES_PER_SECOND, LineBudget, LineReader
from doorstep.workers.shared_memory import Reader, Segment, Writer, make_memory, segment_size


def received(buffer: FrameBuffer, data: bytes, step: int) -> list:
    frames = []
    for at in range(0, len(data), step):
        piece = data[at : at + step]
        while piece:
            space = buffer.space()
            count = min(len(space), len(piece))
            space[:count] = piece[:count]
            piece = piece[count:]
            frames += [(kind, meta, bytes(rest)) for kind, meta, rest in buffer.received(count)]
    return frames


@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.lists(st.text(max_size=20), max_size=5), st.binary(max_size=300))),
    st.integers(1, 1000),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(sent, step):
    data = b"".join(frame(kind, meta, rest) for kind, meta, rest in sent)
    assert received(FrameBuffer(), data, step) == sent


def test_a_frame_larger_than_the_buffer_arrives():
    big = os.urandom(300_000)
    assert received(FrameBuffer(), frame(Kind.LOG, {}, b"x") + frame(Kind.RESULT, [1], big), 65536) == [
        (Kind.LOG, {}, b"x"),
        (Kind.RESULT, [1], big),
    ]


def test_a_frame_that_claims_too_much_or_is_no_json_is_refused():
    with pytest.raises(ProtocolError, match="a frame of"):
        received(FrameBuffer(), FRAME_LIMIT.to_bytes(4, "little") + bytes(8), 12)
    with pytest.raises(ProtocolError, match="not JSON"):
        received(FrameBuffer(), (2).to_bytes(4, "little") + bytes(8) + b"{[", 14)


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_frames_or_a_protocol_error(data):
    try:
        received(FrameBuffer(), data, 50)
    except ProtocolError:
        pass


def tensors() -> list[Tensor]:
    strings = np.empty((2, 2), object)
    strings[:] = [[b"", b"\0"], ["ü".encode(), b"x" * 1000]]
    made = [Tensor(name, d, np.arange(7).astype(d.numpy)) for name, d in DTYPES.items() if d is not BYTES]
    return [
        *made,
        Tensor("strings", BYTES, strings),
        Tensor("scalar", FP32, np.array(2.5, np.float32)),
        Tensor("empty", FP32, np.zeros((3, 0, 2), np.float32)),
        Tensor("transposed", INT32, np.arange(6, dtype=np.int32).reshape(2, 3).T),
        Tensor("swapped", INT32, np.arange(3, dtype=">i4")),
        Tensor("nothing", BYTES, np.empty(0, object)),
    ]


@pytest.mark.parametrize("how", ["joined", "write"])
def test_tensors_come_back_from_where_they_were_laid(how):
    layout = Layout()
    entries = [layout.add([tensor]) for tensor in tensors()]
    assert all(at % ALIGNMENT == 0 for ((_, _, _, at, _),) in entries)
    if how == "joined":
        memory = layout.joined()
    else:
        memory = np.zeros(layout.size, np.uint8)
        layout.write(memory.data)
    for tensor, entry in zip(tensors(), entries, strict=True):
        (back,) = read_tensors(entry, memory)
        assert (back.name, back.datatype, back.shape) == (tensor.name, tensor.datatype, tensor.shape)
        assert back.array.dtype == tensor.datatype.numpy
        assert back.array.tolist() == tensor.array.tolist()


@pytest.mark.parametrize(
    "entry",
    [
        ("x", "FP32", [5], 0, 20),
        ("x", "FP32", [1], 64, 4),
        ("x", "FP32", [-1], 0, 4),
        ("x", "FP32", ["a"], 0, 4),
        ("x", "FP31", [1], 0, 4),
        ("x", "FP32", [1], -4, 4),
        ("x", "FP32", [2**62, 2**62], 0, 4),
        ("x", "BYTES", [9], 0, 16),
        ("x", "BYTES", [1], 0, 16),
        ("x", "BYTES", [-1], 0, 16),
        ("x", "FP32"),
        5,
    ],
)
def test_a_tensor_that_is_not_where_it_should_be_is_refused(entry):
    with pytest.raises(ProtocolError):
        read_tensors([entry], bytearray(b"\xff" * 16))


@given(st.lists(st.binary(max_size=20), max_size=50))
def test_strings_survive_packing(items):
    array = np.empty(len(items), object)
    array[:] = items
    assert unpack_strings(pack_strings(array), [len(items)]).tolist() == items


def test_str_becomes_utf8():
    array = np.array(["ü", b"\xff", 5], object)
    assert unpack_strings(pack_strings(array), [3]).tolist() == ["ü".encode(), b"\xff", b"5"]
    assert unpack_strings(pack_strings(np.array(["a", "bc"])), [2]).tolist() == [b"a", b"bc"]


def test_the_channel_hands_over_descriptors_in_their_order():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs)
        for text in (b"first", b"second"):
            fd = make_memory(10, "x")
            os.pwrite(fd, text, 0)
            socket.send_fds(ours, [frame(Kind.SEGMENT, {})], [fd])
            os.close(fd)
        for text in (b"first", b"second"):
            assert channel.receive()[0] == Kind.SEGMENT
            fd = channel.descriptor()
            assert os.pread(fd, 10, 0).rstrip(b"\0") == text
            os.close(fd)
        channel.send(Kind.RESULT, [1], b"data")
        assert received(FrameBuffer(), ours.recv(100), 100) == [(Kind.RESULT, [1], b"data")]
        ours.shutdown(socket.SHUT_RDWR)
        with pytest.raises(EOFError):
            channel.receive()


# Shared memory


def segment(id: int, size: int = 65536) -> Segment:
    return Segment(id, make_memory(size, "test"), size)


def test_shared_memory_cannot_be_made_smaller_or_larger():
    fd = make_memory(100, "test")
    for size in (0, 200):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_the_smallest_free_segment_that_is_large_enough_is_taken():
    writer = Writer()
    for id, size in ((1, 300), (2, 100), (3, 200)):
        writer.add(segment(id, size))
    assert [writer.take(150).id, writer.take(150).id, writer.take(150)] == [3, 1, None]
    writer.release([1, 1, 99])
    assert [writer.take(150).id, writer.take(150)] == [1, None]


def test_a_segment_is_released_when_the_last_array_made_from_it_is_gone():
    reader = Reader()
    reader.add(segment(1))
    memory = reader.open(1)
    with pytest.raises(KeyError):
        reader.open(1)
    (tensor,) = read_tensors([("x", "FP32", [4], 64, 16)], memory)
    row = tensor.array[1:]
    sent = memoryview(row)
    del memory, tensor, row
    assert reader.released() == []
    assert sent[0] == 0
    del sent
    assert reader.released() == [1]
    assert reader.released() == []
    reader.open(1)


def test_unused_segments_are_forgotten_on_both_sides():
    reader, writer = Reader(), Writer()
    for id in (1, 2):
        reader.add(segment(id))
        writer.add(segment(id))
    view = reader.open(1)
    taken = writer.take(1)
    later = taken.used_at + 1
    assert reader.unused(later) == [2]
    assert writer.unused(later) == [2 if taken.id == 1 else 1]
    assert (len(reader), len(writer)) == (1, 1)
    reader.forget([1])
    assert view[0] == 0  # what is looked at stays


@pytest.mark.parametrize(("needed", "size"), [(1, 65536), (65537, 131072), (20 << 20, 32 << 20), (33 << 20, 48 << 20)])
def test_segment_sizes(needed, size):
    assert segment_size(needed) == size


# Lines


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def reader(lines: list[str], clock: Clock | None = None) -> tuple[LineReader, int]:
    out, into = os.pipe()
    return LineReader(out, lines.append, clock or Clock()), into


def test_lines_are_put_together_and_the_last_one_needs_no_end():
    lines: list[str] = []
    stream, into = reader(lines)
    for piece in (b"one\ntw", b"o\n\n", b"bad \xff\n", b"10%\r90%\r\n", b"tab\tesc\x1b\n", b"end"):
        os.write(into, piece)
        assert stream.read()
    assert lines == ["one", "two", r"bad \xff", "90%", "tab\tesc" + r"\x1b"]
    os.close(into)
    assert not stream.read()
    assert lines[-1] == "end"
    stream.close()


def test_a_line_without_end_takes_no_more_memory_than_a_long_one():
    lines: list[str] = []
    stream, into = reader(lines)
    for _ in range(100):
        stream.feed(b"x" * 65536)
    stream.feed(b"rest\nnext\n")
    assert [len(line) for line in lines] == [LINE_BYTES + len(" … (line cut)"), 4]
    assert lines[1] == "next"
    os.close(into)
    stream.close()


def test_a_reader_over_its_budget_says_so_until_the_second_is_over():
    clock = Clock()
    stream, into = reader([], clock)
    stream.feed(b"x" * 10_000_000)
    assert stream.over_budget()
    clock.now += 1
    assert not stream.over_budget()
    os.close(into)
    stream.close()


def test_lines_over_the_budget_are_counted_not_logged():
    clock = Clock()
    lines: list[tuple[str, str]] = []
    budget = LineBudget(lambda level, line: lines.append((level, line)), clock)
    for i in range(LINES_PER_SECOND + 25):
        budget("INFO", str(i))
    assert len(lines) == LINES_PER_SECOND
    clock.now += 1
    budget("INFO", "later")
    assert lines[-2:] == [("WARNING", f"25 lines not shown: over {LINES_PER_SECOND} in a second"), ("INFO", "later")]


def test_bfloat16_is_laid_out_as_itself():
    layout = Layout()
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    (entry,) = layout.add([Tensor("x", datatype_of(array), array)])
    assert read_tensors([entry], layout.joined())[0].array.tolist() == [1.5, -2]
