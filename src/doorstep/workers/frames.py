"""What crosses the socket between the server and a worker process: frames, and tensors laid out in bytes.

Knows no socket, process or memory mapping. A frame is a 12-byte head, a JSON part and a data part; never pickle.
Tensors are laid out one after another from 64-byte boundaries, either in the data part (a few kilobytes: nothing to
arrange beforehand) or in a segment of shared memory; the JSON part says where each begins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from enum import IntEnum
from typing import Any

import numpy as np
import orjson

from doorstep.types import BYTES, DTYPES, Array, Tensor

WINDOW_BYTES = 1024 * 1024  # of one request's responses that may be on their way; then whoever makes them waits
RESPONSE_BYTES = 128  # what a response counts for beside its tensors
INLINE_BYTES = 16 * 1024  # tensors of a batch up to this many bytes travel in the frame
ALIGNMENT = 64
FRAME_LIMIT = 64 * 1024 * 1024  # no frame is longer; the bulk of a batch is in shared memory


class Kind(IntEnum):
    """What a frame says. Those a later protocol needs get the free numbers of their group, never a used one."""

    # Life: the server asks, the process answers.
    HELLO = 1  # from the process, first of all
    COMPLETE = 2  # complete this config
    COMPLETED = 3
    LOAD = 4  # load the instance
    READY = 5
    FAILED = 6  # instead of COMPLETED or READY
    UNLOAD = 7
    GONE = 8  # unloaded; the process ends by itself
    # Work: one batch at a time.
    EXECUTE = 16
    RESULT = 17
    # Responses one by one, on the side socket, as most of what follows.
    EMIT = 18  # from the process: responses to requests whose result is, or will be, LATER
    TAKEN = 19  # so much of a request's responses has gone on: the process may send more
    CANCEL = 20  # nobody waits for this request
    # Memory: only the server makes it.
    SEGMENT = 24  # here is a segment; its descriptor comes with the frame
    NEED = 25  # from the process: a segment of so many bytes, please
    FORGET = 26  # these segments are no more
    RELEASE = 27  # these segments can be written again
    # Told, not asked, by the process.
    LOG = 32
    # Whether the instance can serve: the server asks.
    IS_READY = 36
    READINESS = 37
    # What a model asks of the server.
    CALL = 40  # run this request on another model
    RESPONSE = 41  # one of the responses to a CALL
    READ = 42  # so much of a call's responses has been looked at: the server may send more
    CANCEL_CALL = 43
    ASK = 44
    ANSWER = 45
    TELL = 46


class ProtocolError(Exception):
    """The other side sent what no frame of ours looks like. It cannot be trusted further."""


_HEAD = struct.Struct("<IIH2x")  # bytes of JSON, bytes of data, kind
HEAD_BYTES = _HEAD.size
_unpack_head = _HEAD.unpack_from
_dumps = orjson.dumps
_loads = orjson.loads


def frame(kind: Kind, meta: Any, data: bytes | bytearray = b"") -> bytes:
    text = _dumps(meta)
    return b"".join((_HEAD.pack(len(text), len(data), kind), text, data))


def raw_frame(kind: Kind, text: bytes, data: bytes) -> bytes:
    """A frame whose JSON is there already."""
    return b"".join((_HEAD.pack(len(text), len(data), kind), text, data))


class FrameBuffer:
    """Bytes in, frames out. Receive into `space()`, tell `received(count)`, and iterate over what it returns."""

    __slots__ = ("_buffer", "_filled", "_view")

    def __init__(self) -> None:
        self._buffer = bytearray(64 * 1024)
        self._view = memoryview(self._buffer)
        self._filled = 0

    def space(self) -> memoryview:
        return self._view[self._filled :]

    def received(self, count: int) -> Iterator[tuple[int, Any, bytearray]]:
        """The frames that are complete now. Their parts are copies, so the buffer can be received into again.

        Raises ProtocolError; nothing more can be read then."""
        self._filled += count
        start = 0
        frames = []
        while self._filled - start >= HEAD_BYTES:
            meta_size, data_size, kind = _unpack_head(self._buffer, start)
            meta_at = start + HEAD_BYTES
            data_at = meta_at + meta_size
            end = data_at + data_size
            if end > self._filled:
                if end - start > FRAME_LIMIT:
                    raise ProtocolError(f"a frame of {end - start} bytes")
                if end - start > len(self._buffer):
                    self._grow(end - start)
                break
            try:
                meta = _loads(self._view[meta_at:data_at])
            except orjson.JSONDecodeError as error:
                raise ProtocolError(f"a frame that is not JSON: {error}") from None
            frames.append((kind, meta, self._buffer[data_at:end]))
            start = end
        if start:
            rest = self._filled - start
            if rest:
                self._buffer[:rest] = self._buffer[start : self._filled]
            self._filled = rest
        return iter(frames)

    def _grow(self, size: int) -> None:
        bigger = bytearray(1 << (size - 1).bit_length())
        bigger[: self._filled] = self._view[: self._filled]
        self._buffer = bigger
        self._view = memoryview(bigger)


Entry = tuple[str, str, tuple[int, ...], int, int]  # name, datatype, shape, offset, bytes
Source = Array | bytes


class Layout:
    """Where the tensors of a batch go: `add` them all, then `write` them into a buffer of `size` bytes."""

    __slots__ = ("_sources", "size")

    def __init__(self) -> None:
        self._sources: list[tuple[int, int, Source]] = []
        self.size = 0

    def add(self, tensors: Iterable[Tensor]) -> list[Entry]:
        """Gives each tensor its place; what it returns belongs in the frame's JSON."""
        entries = []
        at = self.size
        for tensor in tensors:
            datatype = tensor.datatype
            array = tensor.array
            shape = array.shape
            source: Source
            if datatype is BYTES:
                source = pack_strings(array)
                size = len(source)
            else:
                if array.dtype is not datatype.numpy and array.dtype != datatype.numpy:
                    array = array.astype(datatype.numpy)
                source = array
                size = array.nbytes
            entries.append((tensor.name, datatype.name, shape, at, size))
            self._sources.append((at, size, source))
            at = (at + size + ALIGNMENT - 1) & -ALIGNMENT
        self.size = at
        return entries

    def write(self, buffer: Any) -> None:
        """Copies the tensors: the one copy they see on their way."""
        for at, size, source in self._sources:
            if type(source) is bytes:
                buffer[at : at + size] = source
            elif size:
                assert isinstance(source, np.ndarray)
                np.ndarray(source.shape, source.dtype, buffer, at)[...] = source

    def joined(self) -> bytearray:
        buffer = bytearray(self.size)
        for at, size, source in self._sources:
            buffer[at : at + size] = source if type(source) is bytes else source.tobytes()  # type: ignore[union-attr]
        return buffer


def read_tensors(entries: Iterable[Any], memory: Any, base: int = 0) -> list[Tensor]:
    """The tensors at their places in `memory`, counted from `base`: views of it, but for strings.

    Raises ProtocolError."""
    tensors = []
    try:
        for name, type_name, shape, at, size in entries:
            datatype = DTYPES[type_name]
            array: Array
            at += base
            if at < 0 or size < 0 or (shape and min(shape) < 0):  # numpy does not look at the first, and reads there
                raise ValueError(f"{shape} at {at}")
            if datatype is BYTES:
                array = unpack_strings(bytes(memory[at : at + size]), shape)
            else:
                array = np.ndarray(shape, datatype.numpy, memory, at)
            tensors.append(Tensor(name, datatype, array))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"a tensor that is not where it should be: {error!r}") from None
    return tensors


def pack_strings(array: Array) -> bytes:
    """The lengths of all elements (4 bytes each), then all elements. Elements that are not `bytes` become UTF-8."""
    items = array.ravel().tolist()
    for i, item in enumerate(items):
        if type(item) is not bytes:
            items[i] = item if isinstance(item, bytes) else str(item).encode()
    items.insert(0, struct.pack(f"<{len(items)}I", *map(len, items)))
    return b"".join(items)


def unpack_strings(data: bytes, shape: Iterable[int]) -> Array:
    shape = tuple(shape)
    count = 1
    for dim in shape:
        count *= dim
    if count < 0 or count * 4 > len(data):
        raise ValueError(f"{len(data)} bytes cannot hold {count} strings")
    items = []
    at = count * 4
    for length in struct.unpack_from(f"<{count}I", data):
        items.append(data[at : at + length])
        at += length
    if at != len(data):
        raise ValueError(f"{len(data)} bytes hold strings of {at - count * 4} bytes")
    array = np.empty(count, np.object_)
    array[:] = items
    return array.reshape(shape)
