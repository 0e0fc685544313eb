"""One HTTP/2 stream as an exchange: collects its request's body, sends its answer. Knows no frame and no endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from doorstep.wire.exchange import Buffer, ConnectionInfo, Exchange, Headers

if TYPE_CHECKING:
    from doorstep.wire.flow import OutStream
    from doorstep.wire.http2 import Http2Connection
    from doorstep.wire.router import Match

SMALL = 16_384  # answers up to this size are the library's to send, in one frame

_NO_LENGTH = frozenset({204, 304})
_CACHED_FIELDS = 1024
# Of HTTP/1.1 alone (RFC 9113 §8.2.2); an endpoint need not know which HTTP it answers.
_CONNECTION_FIELDS = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"content-length"})

FieldList = list[tuple[bytes, bytes]]
_fields: dict[tuple[int, Headers], FieldList] = {}


def landing(size: int) -> memoryview:
    """Room for a body of known size; not zeroed, and no memory is touched until bytes arrive."""
    return np.empty(size, np.uint8).data


class Http2Exchange(Exchange):
    """Touched only from the event loop.

    A streaming endpoint that knows how much is coming may put room for it into `landing`: the bytes go straight there,
    consumed by that, and `on_body` hears of it when it is full, with whatever came after; `landing` is None again by
    then. If the body ends before, `landing` still is what is missing.
    """

    __slots__ = (
        "_gone",
        "_owner",
        "_pieces",
        "_sent",
        "_status",
        "_whole",
        "arriving",
        "grpc_status",
        "landing",
        "lane_given",
        "lane_unread",
        "match",
        "native_unread",
        "out",
        "paced",
        "patient",
        "progress_mark",
        "progress_ns",
        "received",
        "remote_done",
        "stream_id",
        "touched",
        "unwanted",
    )

    match: Match
    landing: memoryview | None
    grpc_status: int | None

    def __init__(
        self,
        owner: Http2Connection,
        connection: ConnectionInfo,
        stream_id: int,
        headers: dict[bytes, bytes],
        received_ns: int,
    ) -> None:
        self._owner = owner
        self.connection = connection
        self.stream_id = stream_id
        self.headers = headers
        self.body = b""
        self.received_ns = received_ns
        self.state = None
        self.started = self.ended = self._gone = False
        self.on_disconnect = self.on_drain = self.on_body = None
        self.landing = None
        self.received = 0  # bytes of the body so far
        self.remote_done = False  # the whole request is here
        self.paced = False  # the client waits for `consume`
        self.patient = False  # silence of the client is no reason to give up
        self.native_unread = 0  # paced: bytes not consumed that came through the library …
        self.lane_unread = 0  # … and past it; not paced: those the stream's window has not been given back
        self.lane_given = 0  # paced: consumed, but not yet given back to the stream's window
        self.arriving = 0  # bytes kept until the body is whole
        self.progress_ns = 0  # when the sweep last saw it get on; 0: not looked at yet
        self.progress_mark = -1  # how much of its answer had been sent at that time
        self.touched = True
        self.unwanted = 0  # bytes of the body that came after the answer
        self.grpc_status = None
        self._whole: memoryview | bytearray | None = None  # a buffered body that is arriving
        self._pieces = 0  # of one of unknown length
        self.out: OutStream | None = None  # the answer's body, where it waits in the outbox
        self._sent = 0
        self._status = 0

    # -- the request's body ------------------------------------------------------------------------------------------

    def feed(self, data: Buffer, last: bool) -> None:
        """Takes the next bytes of the body, the caller's only until this returns, unless they are `bytes`."""
        size = len(data)
        self.received += size
        self.touched = True
        room = self.landing
        if room is not None:
            if size < len(room):
                room[:size] = data
                self.landing = room[size:]
                if self.paced and size:
                    self.consume(size)
                if last:
                    self.deliver(b"", True)
                return
            free = len(room)
            room[:] = data if size == free else memoryview(data)[:free]
            self.landing = None
            if self.paced:
                self.consume(free)
            self._owner.settle(self)
            self.deliver(b"" if size == free else bytes(memoryview(data)[free:]), last)
            return
        self.deliver(data if type(data) is bytes else bytes(data), last)

    def landed(self, size: int) -> None:
        """`size` bytes were put into `landing` by the caller."""
        self.received += size
        self.touched = True
        room = self.landing
        assert room is not None
        if self.paced:
            self.consume(size)
        if size < len(room):
            self.landing = room[size:]
        else:
            self.landing = None
            self._owner.settle(self)
            self.deliver(b"", False)

    def deliver(self, data: bytes, last: bool) -> None:
        if self.match.streaming:
            if self.on_body is not None and not self._gone:
                self.on_body(data, last)
        elif not self.ended:
            self._collect(data, last)

    def _collect(self, data: bytes, last: bool) -> None:
        whole = self._whole
        if whole is None and last:  # all of it came in one piece
            self.body = data
            self._owner.complete(self)
            return
        if whole is None:
            whole = self._whole = self._make_room(data)
        elif type(whole) is bytearray:
            whole += data
            self._pieces += 1
            if self._pieces > self._owner.context.limits.chunk_count:
                self._owner.refuse_pieces(self)
                return
        elif data or self.landing is not None:  # not as long as its content-length: the library refuses that before
            self.reset()
            return
        if last:
            self._whole = None
            self.body = whole
            self._owner.complete(self)

    def _make_room(self, data: bytes) -> memoryview | bytearray:
        """Room for a body of which `data` is only the beginning."""
        length = int(self.headers.get(b"content-length", b"0"))
        if length <= SMALL or length < len(data):
            return bytearray(data)
        whole = landing(length)
        whole[: len(data)] = data
        self.landing = whole[len(data) :] if length > len(data) else None
        return whole

    def consume(self, size: int) -> None:
        if self.paced:
            self._owner.consume(self, size)

    # -- the answer --------------------------------------------------------------------------------------------------

    @property
    def disconnected(self) -> bool:
        return self._gone

    @property
    def unread(self) -> int:
        return self.native_unread + self.lane_unread

    @property
    def sent(self) -> int:
        return self._sent

    @property
    def status(self) -> int:
        return self._status

    def respond(self, status: int, headers: Headers, *body: Buffer) -> None:
        if self.started:
            raise RuntimeError(f"{self.method} {self.path} was answered already")
        size = 0
        for buffer in body:
            size += buffer.nbytes if type(buffer) is memoryview else len(buffer)
        fields = fields_of(status, headers)
        if status not in _NO_LENGTH:
            fields = [*fields, (b"content-length", b"%d" % size)]
        self._status = status
        if self.method == "HEAD":
            size, body = 0, ()
        self.answer(fields, size, body, None)

    def answer(self, fields: FieldList, size: int, body: tuple[Buffer, ...], trailers: FieldList | None) -> None:
        """The whole answer in one go: `fields` begin with `:status`; None as trailers: there are none."""
        self.started = self.ended = True
        if self._gone:
            return
        self._sent = size
        if not self._status:
            self._status = int(fields[0][1])
        self._owner.send_answer(self, fields, size, body, trailers)

    def start(self, status: int, headers: Headers) -> None:
        self.start_fields(status, fields_of(status, headers))

    def start_fields(self, status: int, fields: FieldList) -> None:
        if self.started:
            raise RuntimeError(f"{self.method} {self.path} was answered already")
        self.started = True
        self._status = status
        if not self._gone:
            self.out = self._owner.send_start(self, fields)

    def write(self, data: Buffer) -> bool:
        return self.write_buffers((data,))

    def write_buffers(self, buffers: tuple[Buffer, ...]) -> bool:
        """As `write`, for several buffers that belong together. False, too, where nobody reads any more."""
        out = self.out
        if out is None or self._gone or self.ended:
            if not self.started:
                raise RuntimeError(f"{self!r} writes before its start")
            return False
        owner = self._owner
        self._sent += owner.send_data(out, buffers)
        if not owner.outbox.is_full(out):
            return True
        owner.wait_for_room(out)
        return False

    def drop_unsent(self) -> None:
        """Forgets what was written and has not left yet, because too much of it is not read."""
        if self.out is not None:
            self._owner.outbox.drop(self.out)

    def end(self, trailers: Headers = ()) -> None:
        if not self.started:
            raise RuntimeError(f"{self!r} ends before its start")
        if self.ended:
            return
        self.ended = True
        if self.out is not None and not self._gone:
            self._owner.send_end(self, self.out, list(trailers))

    def reset(self) -> None:
        if self._gone:
            return
        if not self.ended:
            self.ended = True
            self._owner.account(self)
        self._owner.reset_stream(self)

    def break_off(self) -> None:
        """The client does not take the rest of an answer, complete or not."""
        self._owner.reset_stream(self)
        self.lost()

    def lost(self) -> None:
        """The stream is gone before the answer was complete, or after."""
        if self._gone:
            return
        self._gone = True
        self.landing = self._whole = None
        self.out = None
        callback = self.on_disconnect
        # Whoever answers holds the exchange, and these hold whoever answers: bodies are not to wait for the collector.
        self.on_disconnect = self.on_body = self.on_drain = None
        if not self.ended:
            self.ended = True
            if callback is not None:
                callback()

    def __repr__(self) -> str:
        state = "gone" if self._gone else "answered" if self.ended else "answering" if self.started else "waiting"
        return f"<Http2Exchange {self.stream_id} {self.method} {self.path} {state}>"


def fields_of(status: int, headers: Headers) -> FieldList:
    """`:status` and the fields. Kept for headers that come as a tuple of tuples; not to be changed."""
    cacheable = type(headers) is tuple
    if cacheable:
        found = _fields.get((status, headers))
        if found is not None:
            return found
    fields = [(b":status", b"%d" % status)]
    for name, value in headers:
        if b"\r" in value or b"\n" in value or b"\0" in value:
            raise ValueError(f"header {name!r} holds a line break or NUL: {value!r}")
        if name not in _CONNECTION_FIELDS:
            fields.append((name, value))
    if cacheable:
        if len(_fields) >= _CACHED_FIELDS:
            _fields.clear()
        _fields[status, headers] = fields
    return fields


def collect_headers(fields: tuple[tuple[bytes, bytes], ...]) -> dict[bytes, bytes]:
    """Repeated fields joined: cookies with `; `, all others with `, `."""
    headers: dict[bytes, bytes] = {}
    for name, value in fields:
        if name in headers:
            headers[name] += (b"; " if name == b"cookie" else b", ") + value
        else:
            headers[name] = value
    return headers
