"""An HTTP/2 client that sends exactly the frames it is told to, right or wrong. Knows no flow control of its own.

Header blocks are written without compression; of those that come back only `:status` is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import NamedTuple

from doorstep.testing.wire import RawClient

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED = 0x1, 0x1, 0x4, 0x8
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE = 1, 2, 3, 4, 5
NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR, SETTINGS_TIMEOUT, STREAM_CLOSED = range(6)
FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, CONNECT_ERROR, ENHANCE_YOUR_CALM = range(6, 12)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_HEAD = Struct(">BHBBL")
# The static table's entries for :status (RFC 7541, appendix A), as indexed fields.
_STATUS = {0x88: 200, 0x89: 204, 0x8A: 206, 0x8B: 304, 0x8C: 400, 0x8D: 404, 0x8E: 500}


class Frame(NamedTuple):
    kind: int
    flags: int
    stream_id: int
    payload: bytes

    @property
    def error_code(self) -> int:
        """Of RST_STREAM and GOAWAY."""
        return int.from_bytes(self.payload[4:8] if self.kind == GOAWAY else self.payload[:4], "big")

    @property
    def ends(self) -> bool:
        return self.kind in (DATA, HEADERS) and bool(self.flags & END_STREAM)


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id) + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in pairs))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def rst_stream(stream_id: int, error_code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream_id, error_code.to_bytes(4, "big"))


def field(name: bytes, value: bytes) -> bytes:
    """A header field that is not indexed, both strings as they are (RFC 7541 §6.2.2)."""
    return b"\x00" + _string(name) + _string(value)


def _string(data: bytes) -> bytes:
    size = len(data)
    if size < 127:
        return bytes((size,)) + data
    prefix, size = b"\x7f", size - 127
    while size >= 128:
        prefix += bytes((size & 127 | 128,))
        size >>= 7
    return prefix + bytes((size,)) + data


def block(method: bytes, path: bytes, extra: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A request's header block."""
    fields = [(b":method", method), (b":scheme", b"http"), (b":path", path), (b":authority", b"x"), *extra]
    return b"".join(field(name, value) for name, value in fields)


def request(
    stream_id: int,
    path: bytes,
    body: bytes | None = None,
    *,
    method: bytes | None = None,
    extra: Iterable[tuple[bytes, bytes]] = (),
    end: bool = True,
) -> bytes:
    """HEADERS, and DATA in one frame where there is a body."""
    head = block(method or (b"GET" if body is None else b"POST"), path, extra)
    if body is None:
        return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, head)
    return frame(HEADERS, END_HEADERS, stream_id, head) + frame(DATA, END_STREAM if end else 0, stream_id, body)


class Http2Client:
    """On a raw socket. Both sides' SETTINGS are known when it has been made."""

    def __init__(self, raw: RawClient, *pairs: tuple[int, int]) -> None:
        self.raw = raw
        raw.send(PREFACE + settings(*pairs))
        head = raw.receive_exactly(9)
        raw.receive_exactly(int.from_bytes(head[:3], "big"))
        raw.send(frame(SETTINGS, ACK, 0))

    def send(self, *frames: bytes) -> None:
        self.raw.send(b"".join(frames))

    def receive(self) -> Frame:
        """The next frame but SETTINGS, WINDOW_UPDATE and PING, which are answered or forgotten."""
        while True:
            high, low, kind, flags, stream_id = _HEAD.unpack(self.raw.receive_exactly(9))
            found = Frame(kind, flags, stream_id, self.raw.receive_exactly(high << 16 | low))
            if kind == SETTINGS and not flags & ACK:
                self.send(frame(SETTINGS, ACK, 0))
            elif kind == PING and not flags & ACK:
                self.send(frame(PING, ACK, 0, found.payload))
            elif kind not in (SETTINGS, WINDOW_UPDATE, PING):
                return found

    def receive_kind(self, kind: int) -> Frame:
        while (found := self.receive()).kind != kind:
            pass
        return found

    def answer(self, stream_id: int, *, grant: bool = True) -> tuple[int, bytes]:
        """Status and body of one stream's answer; trailers are passed over. `grant`: gives windows back."""
        status, body = 0, b""
        while True:
            found = self.receive()
            if found.stream_id != stream_id:
                if found.kind == GOAWAY:
                    raise ConnectionError(f"GOAWAY {found.error_code} {found.payload[8:]!r}")
                continue
            if found.kind == RST_STREAM:
                raise ConnectionError(f"RST_STREAM {found.error_code}")
            if found.kind == HEADERS and not status:
                status = _STATUS.get(found.payload[0], -1)
            elif found.kind == DATA:
                body += found.payload
                if grant and found.payload:
                    self.send(window_update(0, len(found.payload)), window_update(stream_id, len(found.payload)))
            if found.ends:
                return status, body

    def until_closed(self) -> Frame | None:
        """Reads until the server closes; its GOAWAY, if it said why."""
        goaway = None
        try:
            while True:
                found = self.receive()
                if found.kind == GOAWAY:
                    goaway = found
        except OSError:  # the end, or a reset
            return goaway
