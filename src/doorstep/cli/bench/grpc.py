"""gRPC for the load loop: one message sent again and again over HTTP/2. Knows no clock and no message's meaning.

A client of unary calls says and hears the same thing every time. ngh2 does the first calls of a connection; once a
call's header blocks no longer change HPACK's tables, they are sent and recognised as bytes, which costs far less. What
is not recognised goes to ngh2 still: its tables stay true, because the bytes it did not see change nothing in them.
"""

from __future__ import annotations

import socket
from collections import Counter, deque
from struct import Struct, pack
from typing import Any

import ngh2

from doorstep.cli.bench.connection import FAILED, WOULD_BLOCK, LoadConnection, Lost
from doorstep.cli.bench.grpc_wire import Fields, client_side, status_problem
from doorstep.cli.bench.hpack_blocks import leaves_table_alone

DATA, HEADERS, RST_STREAM, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 7, 8, 9
END_STREAM, END_HEADERS, PADDED_OR_PRIORITY = 0x1, 0x4, 0x28
_FRAME = Struct(">BHBBI")  # length in 1 + 2 bytes, type, flags, stream
_unpack_frame = _FRAME.unpack_from
_STREAM = Struct(">I")
_SMALL_READ, _LARGE_READ = 1 << 14, 1 << 18  # bytes
_CREDIT = 1 << 29  # bytes received before the server is allowed as many more
_NEVER = 1 << 62
_STATUS_200 = b"\x88"  # the header block that says ":status: 200" and nothing else, by HPACK's static table


class GrpcConnection(LoadConnection):
    def __init__(
        self, sock: socket.socket, poller: Any, errors: Counter[str], *, fields: Fields, message: bytes
    ) -> None:
        super().__init__(sock, poller, errors)
        self._fields = fields
        self._message = message
        self._started: dict[int, int] = {}  # stream → start time
        self._failed: dict[int, str] = {}
        self._leaving = False  # the server takes no more requests on this connection
        self._partial = b""  # of a frame
        self._skip = 0  # bytes of a DATA frame that are still to come
        self._http2 = client_side()
        # What was learnt: how a request, and an answer to it, look in bytes.
        self._first_raw = _NEVER  # streams from here on are ours, those before it are ngh2's
        self._next_stream = 0
        self._template = bytearray()
        self._stream_at: list[int] = []  # where in it the stream's number stands
        self._request_block = b""
        self._blocks: dict[int, list[bytes]] = {}  # stream of ngh2's → header blocks of its answer
        self._head = self._trailers = b""  # of an answer that is well
        self._window = 0  # bytes the server will take, when we write frames
        self._largest = 0  # frame the server will take
        self._waiting: deque[int] = deque()  # start times of requests that the window has no room for
        self._going_out = self._offset = 0  # the stream of which only a part is sent, and how much of its message
        self._unacknowledged = 0  # bytes of DATA received
        self._headed: set[int] = set()  # our streams whose answer has begun
        self._borrowed: dict[int, int] = {}  # our stream → the one of ngh2's that decodes for it
        self.write(self._http2.data_to_send())

    @property
    def in_flight(self) -> int:
        return len(self._started) + len(self._waiting)

    def start(self, started_ns: int) -> None:
        if self._first_raw != _NEVER:
            self._start_raw(started_ns)
            return
        http2 = self._http2
        try:
            stream = http2.send_request(self._fields)
            http2.send_data(stream, self._message, end_stream=True)
            self._started[stream] = started_ns
            data = http2.data_to_send()
        except ngh2.NGH2Error as error:
            raise Lost(f"HTTP/2: {error}") from None
        self._request_block = _headers_payload(data, stream)
        self.write(data)

    def _start_raw(self, started_ns: int) -> None:
        size = len(self._message)
        if self._window < size or self._waiting or self._going_out:
            self._waiting.append(started_ns)
            self._send_piecemeal()
            return
        stream = self._next_stream
        self._next_stream = stream + 2
        template = self._template
        for offset in self._stream_at:
            _STREAM.pack_into(template, offset, stream)
        self._started[stream] = started_ns
        self._window -= size
        self.write(memoryview(template))
        if self._unsent is not None:
            self._unsent = memoryview(bytes(self._unsent))  # the template is about to change

    def _send_piecemeal(self) -> None:
        """What the server's window has no room for goes out as the window opens, one request after the other."""
        size = len(self._message)
        while self._going_out or self._waiting:
            if not self._going_out:
                self._going_out, self._offset = self._next_stream, 0
                self._next_stream += 2
                self._started[self._going_out] = self._waiting.popleft()
                self.write(_frame(HEADERS, END_HEADERS, self._going_out, self._request_block))
            count = min(self._window, self._largest, size - self._offset)
            if count <= 0:
                return
            piece = self._message[self._offset : self._offset + count]
            self._offset += count
            self._window -= count
            last = self._offset == size
            self.write(_frame(DATA, END_STREAM if last else 0, self._going_out, piece))
            if last:
                self._going_out = 0

    # What comes back

    def readable(self, done: list[int]) -> None:
        try:
            data = self.sock.recv(_LARGE_READ if self._skip else _SMALL_READ)
        except WOULD_BLOCK:
            return
        except OSError as error:
            raise Lost(f"connection lost: {error.strerror or error}") from None
        if not data:
            raise Lost("connection closed by the server")
        self.bytes_in += len(data)
        self._read_frames(data, done)
        if self._leaving and not self._started:
            raise Lost("connection closed by the server (GOAWAY)")

    def _read_frames(self, data: bytes, done: list[int]) -> None:
        if self._partial:
            data = self._partial + data
            self._partial = b""
        position, end, first_raw = 0, len(data), self._first_raw
        while position < end:
            if self._skip:
                taken = min(self._skip, end - position)
                self._skip -= taken
                position += taken
                continue
            if end - position < 9:
                break
            high, low, kind, flags, stream = _unpack_frame(data, position)
            length = high << 16 | low
            if stream >= first_raw and kind == DATA and not flags & END_STREAM:
                self._skip = length
                self._receive_credit(length)
                position += 9
                continue
            after = position + 9 + length
            if after > end:
                break
            if stream < first_raw and not (stream == 0 and kind == WINDOW_UPDATE and first_raw != _NEVER):
                self._feed(data[position:after], kind, flags, stream, done)
            elif kind == HEADERS:
                payload = data[position + 9 : after]
                if flags & END_STREAM and payload == self._trailers and stream in self._headed:
                    self._headed.discard(stream)
                    done.append(self._started.pop(stream, FAILED))
                elif not flags & END_STREAM and payload == self._head:
                    self._headed.add(stream)
                else:
                    self._decode(data[position:after], flags, stream, done)
            else:
                self._other(data[position:after], kind, stream, done)
            first_raw = self._first_raw
            position = after
        if position < end:
            self._partial = data[position:]

    def _receive_credit(self, size: int) -> None:
        self._unacknowledged += size
        if self._unacknowledged >= _CREDIT:
            self.write(_frame(WINDOW_UPDATE, 0, 0, pack(">I", self._unacknowledged)))
            self._unacknowledged = 0

    # Frames of ngh2's streams, and those of the connection

    def _feed(self, frame: bytes, kind: int, flags: int, stream: int, done: list[int]) -> None:
        if kind == HEADERS and stream:
            self._blocks.setdefault(stream, []).append(_block(frame, flags))
        http2 = self._http2
        for event in self._events(frame):
            kind_of = type(event)
            if kind_of is ngh2.TrailersReceived or kind_of is ngh2.ResponseReceived:
                problem = status_problem(event.headers, last=kind_of is ngh2.TrailersReceived or event.end_stream)
                if problem:
                    self._failed[event.stream_id] = problem
            elif kind_of is ngh2.StreamClosed and event.stream_id in self._started:
                self._finish(event.stream_id, event.error_code, done)
                self._learn(self._blocks.pop(event.stream_id, []), well=done[-1] != FAILED)
        answer = http2.data_to_send()
        if answer:
            self.write(answer)

    def _events(self, frame: bytes) -> list[Any]:
        try:
            self._http2.receive_data(frame)
            events: list[Any] = self._http2.events()
        except ngh2.NGH2Error as error:
            raise Lost(f"HTTP/2: {error}") from None
        if any(type(event) is ngh2.GoAwayReceived for event in events):
            self._leaving = True
        return events

    def _finish(self, stream: int, error_code: int, done: list[int]) -> None:
        started = self._started.pop(stream, FAILED)
        problem = self._failed.pop(stream, "")
        if not problem and error_code:
            problem = f"stream reset by the server (HTTP/2 error {error_code})"
        if problem:
            self.errors[problem] += 1
            started = FAILED
        done.append(started)

    def _learn(self, blocks: list[bytes], *, well: bool) -> None:
        """Goes over to bytes, where request and answer are ones that can be had again."""
        if not well or len(blocks) != 2 or self._first_raw != _NEVER or self._leaving:
            return
        http2, size = self._http2, len(self._message)
        settings = http2.remote_settings
        if (
            not all(block and leaves_table_alone(block) for block in (*blocks, self._request_block))
            or http2.queued_body_size()
            or settings.get(int(ngh2.Setting.INITIAL_WINDOW_SIZE), 65_535) < size
        ):
            return
        self._head, self._trailers = blocks
        self._next_stream = self._first_raw = http2.next_stream_id
        self._window = http2.remote_window_size
        largest = self._largest = settings.get(int(ngh2.Setting.MAX_FRAME_SIZE), 16_384)
        self._template = bytearray(_frame(HEADERS, END_HEADERS, 0, self._request_block))
        self._stream_at = [5]
        for start in range(0, size, largest):
            self._stream_at.append(len(self._template) + 5)
            last = END_STREAM if start + largest >= size else 0
            self._template += _frame(DATA, last, 0, self._message[start : start + largest])

    # Frames of our streams that are not as usual

    def _decode(self, frame: bytes, flags: int, stream: int, done: list[int]) -> None:
        """An unusual header block: ngh2 reads it, on a stream of its own that the server never heard of."""
        block = _block(frame, flags)
        reusable = bool(block) and leaves_table_alone(block)
        if not reusable:
            self._head = self._trailers = b""  # the same bytes now mean something else
        headed = stream in self._headed
        if stream not in self._borrowed:
            self._borrow(stream)
        self._ask_ngh2(frame, stream, done)
        if not flags & END_STREAM:
            self._headed.add(stream)
            if reusable and stream not in self._failed:
                self._head = block
        elif reusable and headed and done and done[-1] != FAILED:
            self._trailers = block

    def _borrow(self, stream: int) -> None:
        http2 = self._http2
        pending = http2.data_to_send()
        if pending:
            self.write(pending)
        theirs = self._borrowed[stream] = http2.send_request(self._fields, end_stream=True)
        http2.data_to_send()  # not for the server
        if stream in self._headed:
            self._events(_frame(HEADERS, END_HEADERS, theirs, _STATUS_200))

    def _ask_ngh2(self, frame: bytes, stream: int, done: list[int]) -> None:
        theirs = self._borrowed[stream]
        for event in self._events(frame[:5] + pack(">I", theirs) + frame[9:]):
            kind = type(event)
            if kind is ngh2.TrailersReceived or kind is ngh2.ResponseReceived:
                problem = status_problem(event.headers, last=kind is ngh2.TrailersReceived or event.end_stream)
                if problem:
                    self._failed[stream] = problem
            elif kind is ngh2.StreamClosed and event.stream_id == theirs:
                del self._borrowed[stream]
                self._headed.discard(stream)
                self._finish(stream, event.error_code, done)

    def _other(self, frame: bytes, kind: int, stream: int, done: list[int]) -> None:
        if kind == WINDOW_UPDATE:
            if not stream:
                self._window += _STREAM.unpack_from(frame, 9)[0]
                self._send_piecemeal()
        elif kind == RST_STREAM and stream in self._started:
            self._headed.discard(stream)
            self._finish(stream, _STREAM.unpack_from(frame, 9)[0], done)
        elif stream in self._borrowed and kind == CONTINUATION:
            self._ask_ngh2(frame, stream, done)
        elif kind == DATA and stream in self._started:
            self._failed[stream] = "grpc-status missing"
            self._headed.discard(stream)
            self._finish(stream, 0, done)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def _block(frame: bytes, flags: int) -> bytes:
    """The header block of a HEADERS frame; b"" where it is not the whole of it, or not alone."""
    return frame[9:] if flags & END_HEADERS and not flags & PADDED_OR_PRIORITY else b""


def _headers_payload(data: bytes, stream: int) -> bytes:
    """The header block that `data`, frames on their way out, has for `stream`."""
    position = 0
    while position + 9 <= len(data):
        high, low, kind, flags, number = _unpack_frame(data, position)
        after = position + 9 + (high << 16 | low)
        if kind == HEADERS and number == stream:
            return _block(data[position:after], flags)
        position = after
    return b""
