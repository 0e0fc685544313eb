"""One HTTP/2 connection: its streams become exchanges. Knows no endpoint and nothing above HTTP.

ngh2 (libnghttp2) does header compression, stream states, settings and small bodies, and is imported only here. Large
DATA frames never pass through it: they land straight in the body they belong to, and leave from `flow.Outbox`. So every
frame head is looked at before the library sees it; all that is not a large DATA frame goes on to it, byte for byte.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any, Final

import ngh2
from ngh2 import events as ev

from doorstep.errors import DoorstepError, InvalidArgument
from doorstep.wire.answers import fail, refusal
from doorstep.wire.compression import INLINE_BYTES, TooLarge, decompress
from doorstep.wire.context import ListenerContext, describe
from doorstep.wire.exchange import Buffer, Endpoint, Refusal
from doorstep.wire.flow import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEAD,
    GOAWAY,
    HEADERS,
    MAX_WINDOW,
    PADDED,
    WINDOW_UPDATE,
    Outbox,
    OutStream,
    window_update,
)
from doorstep.wire.grpc_status import is_grpc, trailers_only
from doorstep.wire.http2_exchange import LOW, SMALL, FieldList, Http2Exchange, collect_headers

log = logging.getLogger("doorstep.wire")

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_LARGE = 16_384  # a DATA frame of at least so many bytes goes past the library
_DIRECT = 65_536  # with so many still to come, the kernel writes them where they belong
_INBOX = 1 << 18
_PUMP = 4 << 20  # bytes handed to the transport at a time
_SECOND = 1_000_000_000
_PROTOCOL_ERROR, _INTERNAL_ERROR, _FLOW_CONTROL_ERROR, _CANCEL, _ENHANCE_YOUR_CALM = 0x1, 0x2, 0x3, 0x8, 0xB
_LAST_CALL = b"doorstep"  # our PING between the two GOAWAYs
_goaway = Struct(">BHBBLLL").pack

_unpack_head = FRAME_HEAD.unpack_from
_inboxes = threading.local()  # what is read is dealt with before the next read: one inbox per event loop will do


def _inbox() -> memoryview:
    try:
        return _inboxes.view  # type: ignore[no-any-return]
    except AttributeError:
        _inboxes.view = memoryview(bytearray(_INBOX))
        return _inboxes.view  # type: ignore[no-any-return]


class Http2Connection(asyncio.BufferedProtocol):
    """Touched only from the event loop."""

    __slots__ = (
        "_aged_ns",
        "_arriving",
        "_block_since_ns",
        "_closing_ns",
        "_context",
        "_control",
        "_direct",
        "_draining",
        "_held",
        "_idle_since_ns",
        "_inbox",
        "_info",
        "_lane",
        "_lane_end",
        "_lane_left",
        "_lane_stream",
        "_last_head",
        "_loop",
        "_lost",
        "_made_ns",
        "_outbox",
        "_paused",
        "_paused_ns",
        "_paused_size",
        "_ping_ns",
        "_pinged_ns",
        "_reading",
        "_requests",
        "_resets",
        "_scheduled",
        "_sent_since_ping",
        "_session",
        "_settings",
        "_skip",
        "_strikes",
        "_streams",
        "_thirsty",
        "_touched",
        "_transport",
        "_unread",
        "_work",
    )

    def __init__(self, context: ListenerContext, transport: asyncio.Transport, first_bytes: bytes) -> None:
        """Takes over `transport`; `first_bytes` are what was read from it before, the beginning of the preface at least."""
        self._context = context
        self._transport = transport
        self._settings = settings = context.http2
        self._loop = asyncio.get_running_loop()
        self._info = describe(transport, context.name, "2")
        self._inbox = _inbox()
        self._streams: dict[int, Http2Exchange] = {}  # open streams
        self._outbox = Outbox()
        self._thirsty: set[OutStream] = set()  # their endpoints wait for on_drain
        self._resets: list[int] = []  # streams to be reset after what is queued: answered before the request was whole
        # Reading: where in the sequence of frames we are.
        self._skip = len(PREFACE)  # bytes that go to the library unseen
        self._held = b""  # the beginning of a frame whose head is not complete
        self._last_head = (HEADERS, 0)  # type and flags of the last frame; at first as if something had been begun
        self._lane: Http2Exchange | None = None  # whose large DATA frame is arriving
        self._lane_stream = 0
        self._lane_left = 0  # bytes of that frame still to come
        self._lane_end = False  # it ends the stream
        self._direct = False  # the current read goes into the exchange's `landing`
        self._unread = 0  # bytes of large DATA frames not yet given back to the client's connection window
        self._arriving = 0  # bytes of bodies that are kept until they are whole
        self._reading = False
        self._scheduled = False
        self._paused = False
        self._lost = False
        # What the sweep looks at; 0: not now.
        now_ns = context.now_ns
        self._made_ns = now_ns
        self._idle_since_ns = now_ns  # no stream open, or nothing read
        self._block_since_ns = 0  # a frame head or a header block has begun and not ended
        self._paused_ns = 0
        self._paused_size = 0
        self._closing_ns = 0
        self._aged_ns = 0
        self._pinged_ns = 0
        self._ping_ns = 0
        self._draining = 0  # 1: the client was told that we will close; 2: also what the last stream is
        self._touched = True
        self._control = 0  # frames that cost us and bring nothing, since the last sweep
        self._requests = 0  # since the last sweep
        self._work = 0  # bytes of bodies since the last sweep
        self._strikes = 0
        self._sent_since_ping = True

        limits = context.limits
        self._session = ngh2.Connection(
            ngh2.Role.SERVER,
            ngh2.Configuration(
                auto_window_update=False,
                stream_reset_rate_limit=(settings.reset_burst, settings.reset_rate),
                max_continuations=settings.continuations,
                max_inbound_header_list_size=limits.header_bytes,
                max_inbound_header_count=limits.header_count,
            ),
        )
        self._session.initiate_connection(
            {
                ngh2.Setting.MAX_CONCURRENT_STREAMS: limits.streams,
                ngh2.Setting.INITIAL_WINDOW_SIZE: settings.stream_window,
                ngh2.Setting.MAX_FRAME_SIZE: settings.frame_bytes,
                ngh2.Setting.MAX_HEADER_LIST_SIZE: limits.header_bytes,
                ngh2.Setting.NO_RFC7540_PRIORITIES: 1,
            }
        )
        self._session.set_local_window_size(settings.connection_window)
        transport.set_write_buffer_limits(high=1 << 20, low=1 << 18)
        context.connections.add(self)
        transport.set_protocol(self)
        self._receive(memoryview(first_bytes))
        if context.draining:
            self.drain()

    # -- reading -----------------------------------------------------------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._lane_left >= _DIRECT and (lane := self._lane) is not None:
            landing = lane.landing
            if landing is not None and len(landing) >= _DIRECT:
                self._direct = True
                return landing[: self._lane_left]
        self._direct = False
        held = self._held
        if held:
            size = len(held)
            self._inbox[:size] = held
            return self._inbox[size:]
        return self._inbox

    def buffer_updated(self, nbytes: int) -> None:
        if self._direct:
            self._direct = False
            self._reading = self._touched = True
            try:
                self._landed(nbytes)
            except Exception as error:
                self._give_up(error)
            self._reading = False
            self._flush()
            return
        size = len(self._held)
        if size:
            self._held = b""
            nbytes += size
        self._receive(self._inbox[:nbytes])

    def data_received(self, data: bytes) -> None:
        """For a transport that was not asked for `get_buffer`."""
        held, self._held = self._held, b""
        self._receive(memoryview(held + data))

    def _receive(self, data: memoryview) -> None:
        self._reading = self._touched = True
        try:
            self._walk(data)
        except Exception as error:
            self._give_up(error)
        self._reading = False
        self._flush()

    def _walk(self, data: memoryview) -> None:
        """Looks at each frame's head; runs of frames that are the library's go to it in one piece."""
        size = len(data)
        position = 0
        if self._lane_left:
            position = min(self._lane_left, size)
            self._lane_bytes(data[:position])
        start = position  # of the run
        skip = self._skip
        if skip:
            step = min(skip, size - position)
            self._skip = skip - step
            position += step
        kind, flags = self._last_head
        while size - position >= 9:
            high, low, next_kind, next_flags, stream_id = _unpack_head(data, position)
            length = high << 16 | low
            if next_kind == DATA:
                if length >= _LARGE and not next_flags & PADDED and not _in_block(kind, flags):
                    if start < position:
                        self._feed(data[start:position])
                        start = position
                        if self._lost:
                            return
                    exchange = self._streams.get(stream_id)
                    if exchange is not None and self._fits(exchange, length):
                        kind, flags = DATA, 0
                        self._lane = exchange
                        self._lane_stream = stream_id
                        self._lane_left = length
                        self._lane_end = bool(next_flags & END_STREAM)
                        position += 9
                        step = min(length, size - position)
                        if step:
                            self._lane_bytes(data[position : position + step])
                        position += step
                        start = position
                        continue
            elif next_kind == WINDOW_UPDATE and length == 4:
                if size - position < 13:
                    break
                increment = int.from_bytes(data[position + 9 : position + 13], "big") & MAX_WINDOW
                told = self._granted(stream_id, increment)
                if told != increment:  # the library hears of less, or of nothing
                    if start < position:
                        self._feed(data[start:position])
                    if told:
                        self._feed(memoryview(window_update(stream_id, told)))
                    position += 13
                    start = position
                    continue
            kind, flags = next_kind, next_flags
            position += 9 + length
        self._last_head = (kind, flags)
        if position > size:
            self._skip = position - size
        elif position < size:
            self._held = bytes(data[position:])
            data = data[:position]
        if start < len(data):
            self._feed(data[start:] if start else data)

    def _feed(self, data: memoryview) -> None:
        if self._lost:
            return
        session = self._session
        session.receive_data(data)
        for event in session.events():
            _HANDLERS[type(event)](self, event)

    def _fits(self, exchange: Http2Exchange, length: int) -> bool:
        """Whether a large DATA frame may go past the library. What is wrong with the others the library knows."""
        if exchange.remote_done or b"content-length" in exchange.headers or length > self._settings.frame_bytes:
            return False
        if exchange.paced and exchange.lane_unread + length > self._settings.stream_window:
            self._calm("more data than the stream's window", _FLOW_CONTROL_ERROR)
        return not self._lost

    def _lane_bytes(self, data: memoryview) -> None:
        """The next bytes of a large DATA frame, from the inbox."""
        self._lane_left -= len(data)
        exchange = self._lane
        if exchange is not None and self._arrived(exchange, len(data)):
            self._take(exchange, data, False)
        if not self._lane_left:
            self._lane_over()

    def _landed(self, size: int) -> None:
        """The next bytes of a large DATA frame are in `landing` already."""
        self._lane_left -= size
        exchange = self._lane
        if exchange is not None and exchange.landing is not None and self._arrived(exchange, size):
            try:
                exchange.landed(size)
            except Exception as error:
                fail(exchange, error)
        if not self._lane_left:
            self._lane_over()

    def _arrived(self, exchange: Http2Exchange, size: int) -> bool:
        """Counts bytes that came past the library and gives them back to the client's windows."""
        self._work += size
        if exchange.paced:
            exchange.lane_unread += size
        else:
            self._give_back(size)
            exchange.lane_unread += size
            if exchange.lane_unread >= self._settings.stream_window >> 2:
                self._transport.write(window_update(exchange.stream_id, exchange.lane_unread))
                exchange.lane_unread = 0
        return self._admits(exchange, size)

    def _give_back(self, size: int) -> None:
        self._unread += size
        if self._unread >= self._settings.connection_window >> 2:
            self._transport.write(window_update(0, self._unread))
            self._unread = 0

    def _lane_over(self) -> None:
        self._lane = None
        if self._lane_end:
            # The library keeps the streams' states: it hears of the end as an empty frame.
            self._feed(memoryview(FRAME_HEAD.pack(0, 0, DATA, END_STREAM, self._lane_stream)))

    def _granted(self, stream_id: int, increment: int) -> int:
        """A WINDOW_UPDATE; returns how much of it the library is to hear of."""
        if not stream_id:
            return self._outbox.grant(increment)
        stream = self._outbox.streams.get(stream_id)
        if stream is None or not increment:
            return increment
        self._outbox.grant_stream(stream, increment)
        # What left from the outbox was not taken off the library's count of this window: it must not overflow.
        room = MAX_WINDOW - self._session.stream_remote_window_size(stream_id)
        return increment if increment <= room else 0

    def _take(self, exchange: Http2Exchange, data: Buffer, last: bool) -> None:
        try:
            exchange.feed(data, last)
        except Exception as error:
            fail(exchange, error)

    def _admits(self, exchange: Http2Exchange, size: int) -> bool:
        """Whether the next bytes of a body are wanted; counts them where they have to be kept."""
        if exchange.ended:
            return False
        if exchange.paced:
            return True
        limits = self._context.limits
        if not exchange.match.streaming and exchange.received + size > limits.body_bytes:
            self._refuse(exchange, _too_large(limits.body_bytes))
            return False
        self._arriving += size
        exchange.arriving += size
        if self._arriving > self._settings.unfinished_bytes and self._arriving > exchange.arriving:
            self._refuse(
                exchange, refusal(503, "too many bytes of unfinished requests on one connection", grpc_status=8)
            )
            return False
        return True

    # -- events of the library ---------------------------------------------------------------------------------------

    def _on_request(self, event: ev.RequestReceived) -> None:
        context = self._context
        stream_id, fields = event.stream_id, event.headers
        headers = dict(fields)
        if len(headers) != len(fields):
            headers = collect_headers(fields)
        method = headers.pop(b":method").decode("latin-1")
        target = headers.pop(b":path", b"").decode("latin-1")
        headers.pop(b":scheme", None)
        authority = headers.pop(b":authority", None)
        if authority is not None:
            headers[b"host"] = authority
        exchange = Http2Exchange(self, self._info, stream_id, method, target, headers, context.clock())
        self._streams[stream_id] = exchange
        self._requests += 1
        context.counters.requests += 1
        match = exchange.match = context.router.find(method, exchange.path)
        exchange.params = match.params
        exchange.route = match.route
        for gate in context.gates:
            no = gate(exchange)
            if no is not None:
                self._refuse(exchange, no)
                return
        whole = event.end_stream
        if match.codings is not None and not match.streaming:
            coding = headers.get(b"content-encoding")
            if coding is not None and coding not in match.codings.accepted:
                self._refuse(exchange, match.codings.refusal)
                return
        if not whole:
            length = headers.get(b"content-length")
            if length is not None and not match.streaming and int(length) > context.limits.body_bytes:
                self._refuse(exchange, _too_large(context.limits.body_bytes))
                return
            if b"expect" in headers and headers[b"expect"].lower() == b"100-continue":
                self._session.send_informational_response(stream_id, [(b":status", b"100")])
        if match.streaming:
            exchange.paced = True
            self._call(match.endpoint, exchange)
        if whole:
            self._take(exchange, b"", True)

    def complete(self, exchange: Http2Exchange) -> None:
        """A buffered body is whole: undo its coding, then its endpoint's turn."""
        self._settle(exchange)
        coding = exchange.headers.get(b"content-encoding", b"identity") if exchange.match.codings else b"identity"
        if coding == b"identity" or not len(exchange.body):
            self._call(exchange.match.endpoint, exchange)
        elif len(exchange.body) <= INLINE_BYTES:
            try:
                exchange.body = decompress(coding, exchange.body, self._context.limits.body_bytes)
            except InvalidArgument as error:
                self._refuse(exchange, _undecodable(error))
            else:
                self._call(exchange.match.endpoint, exchange)
        else:
            limit = self._context.limits.body_bytes
            future = self._loop.run_in_executor(None, decompress, coding, exchange.body, limit)
            future.add_done_callback(partial(self._decompressed, exchange))

    def _decompressed(self, exchange: Http2Exchange, future: asyncio.Future[Buffer]) -> None:
        error = future.exception()
        if exchange.ended:
            return
        if error is None:
            exchange.body = future.result()
            self._call(exchange.match.endpoint, exchange)
        elif isinstance(error, InvalidArgument):
            self._refuse(exchange, _undecodable(error))
        else:
            fail(exchange, error)

    def _call(self, endpoint: Endpoint, exchange: Http2Exchange) -> None:
        try:
            endpoint(exchange)
        except Exception as error:
            fail(exchange, error)

    def _refuse(self, exchange: Http2Exchange, no: Refusal) -> None:
        if exchange.started:
            exchange.reset()
        elif is_grpc(exchange.headers):
            exchange.grpc_status = no.grpc_status
            exchange.answer(trailers_only(no.grpc_status, no.grpc_message), 0, (), None)
        else:
            exchange.respond(no.status, no.headers, no.body)

    def _on_data(self, event: ev.DataReceived) -> None:
        stream_id, data, last = event.stream_id, event.data, event.end_stream
        exchange = self._streams.get(stream_id)
        size = len(data)
        if size:
            self._work += size
            if exchange is None or not exchange.paced:
                self._session.acknowledge_received_data(size, stream_id)
            else:
                exchange.native_unread += size
        elif not last:
            self._control += 1
        if exchange is None:
            return
        if size and not self._admits(exchange, size):
            exchange.remote_done = last
            return
        self._take(exchange, data, last)

    def _on_trailers(self, event: ev.TrailersReceived) -> None:
        exchange = self._streams.get(event.stream_id)
        if exchange is not None and not exchange.remote_done:
            self._take(exchange, b"", True)

    def _on_closed(self, event: ev.StreamClosed) -> None:
        exchange = self._streams.pop(event.stream_id, None)
        if exchange is not None:
            self._let_go(exchange)
            if not self._streams and self._draining == 2:
                self._want_flush()

    def _let_go(self, exchange: Http2Exchange) -> None:
        """Everything a stream held goes back."""
        stream_id = exchange.stream_id
        if exchange.out is not None:
            self._thirsty.discard(exchange.out)
            self._outbox.close(stream_id)
        if exchange.native_unread:
            self._session.acknowledge_received_data(exchange.native_unread, stream_id)
        if exchange.paced and exchange.lane_unread:
            self._give_back(exchange.lane_unread)
        exchange.native_unread = exchange.lane_unread = 0
        self._settle(exchange)
        self._lose(exchange)

    def _settle(self, exchange: Http2Exchange) -> None:
        self._arriving -= exchange.arriving
        exchange.arriving = 0

    def _lose(self, exchange: Http2Exchange) -> None:
        ended = exchange.ended
        try:
            exchange.lost()
        except Exception:
            log.exception("%r: on_disconnect failed", exchange)
        if not ended:
            self._account(exchange)

    def _account(self, exchange: Http2Exchange) -> None:
        on_access = self._context.on_access
        if on_access is not None:
            on_access(exchange, exchange.status, exchange.sent, exchange.grpc_status)

    def _on_settings(self, event: ev.SettingsReceived) -> None:
        self._control += 1
        self._outbox.settings(dict(event.settings))

    def _on_ping(self, event: ev.PingReceived) -> None:
        self._control += 1
        settings = self._settings
        now_ns = self._context.clock()
        if self._sent_since_ping:
            self._sent_since_ping = False
            self._strikes = 0
        elif now_ns - self._ping_ns < settings.min_ping_interval_s * _SECOND:
            self._strikes += 1
            if settings.max_ping_strikes and self._strikes > settings.max_ping_strikes:
                self._calm("too_many_pings")
        self._ping_ns = now_ns

    def _on_ping_ack(self, event: ev.PingAcknowledged) -> None:
        self._control += 1
        if self._draining == 1 and event.opaque_data == _LAST_CALL:
            self._last_call()

    def _on_control(self, event: ev.Event) -> None:
        self._control += 1

    def _on_end(self, event: ev.ConnectionClosed) -> None:
        if event.error_code:
            self._context.counters.protocol_errors += 1
            log.info("%s: HTTP/2 error %s, connection closed", self._info.peer, event.error_code)
        self._close()

    def _on_nothing(self, event: ev.Event) -> None:
        pass

    # -- sending: called by exchanges --------------------------------------------------------------------------------

    def send_answer(
        self,
        exchange: Http2Exchange,
        fields: FieldList,
        size: int,
        body: tuple[Buffer, ...],
        trailers: FieldList | None,
    ) -> None:
        session, outbox, stream_id = self._session, self._outbox, exchange.stream_id
        self._work += size
        self._sent_since_ping = True
        try:
            if not size and trailers is None:
                session.send_response(stream_id, fields, end_stream=True)
            else:
                session.send_response(stream_id, fields)
                if size <= SMALL and size <= outbox.credit and size <= outbox.initial_window:
                    data = body[0] if len(body) == 1 else b"".join(body)
                    if trailers is None:
                        session.send_data(stream_id, data, end_stream=True)
                    else:
                        session.send_data(stream_id, data)
                        session.send_trailers(stream_id, trailers)
                    outbox.credit -= size
                else:
                    out = exchange.out = outbox.open(stream_id, session.stream_remote_window_size(stream_id), exchange)
                    for buffer in body:
                        outbox.put(out, buffer)
                    outbox.finish(out, trailers or ())
        except ngh2.NGH2Error:  # the client has reset the stream: the library will say so
            return
        if not exchange.remote_done and exchange.out is None:
            self._resets.append(stream_id)
        self._account(exchange)
        self._want_flush()

    def send_start(self, exchange: Http2Exchange, fields: FieldList) -> OutStream | None:
        session, stream_id = self._session, exchange.stream_id
        self._sent_since_ping = True
        out = None
        try:
            if exchange.method == "HEAD":
                session.send_response(stream_id, fields, end_stream=True)
            else:
                session.send_response(stream_id, fields)
                out = self._outbox.open(stream_id, session.stream_remote_window_size(stream_id), exchange)
        except ngh2.NGH2Error:
            return None
        self._want_flush()
        return out

    def send_data(self, out: OutStream, buffers: tuple[Buffer, ...]) -> int:
        """Returns how many bytes of the stream are waiting."""
        before = out.queued
        for buffer in buffers:
            self._outbox.put(out, buffer)
        size = out.queued - before
        self._work += size
        self._sent_since_ping = True
        out.owner.count_sent(size)
        self._want_flush()
        return out.queued

    def wait_for_room(self, out: OutStream) -> None:
        self._thirsty.add(out)

    def send_end(self, exchange: Http2Exchange, out: OutStream, trailers: FieldList) -> None:
        self._outbox.finish(out, trailers)
        self._account(exchange)
        self._want_flush()

    def reset_stream(self, exchange: Http2Exchange) -> None:
        self._outbox.close(exchange.stream_id)
        try:
            self._session.reset_stream(exchange.stream_id, _CANCEL)
        except ngh2.NGH2Error:
            return
        self._account(exchange)
        self._want_flush()

    def consume(self, exchange: Http2Exchange, size: int) -> None:
        """Gives `size` bytes of a paced exchange back to the client's windows."""
        native = min(size, exchange.native_unread)
        if native:
            exchange.native_unread -= native
            try:
                self._session.acknowledge_received_data(native, exchange.stream_id)
            except (ngh2.NGH2Error, ValueError):
                return
        lane = min(size - native, exchange.lane_unread)
        if lane:
            exchange.lane_unread -= lane
            self._give_back(lane)
            exchange.lane_given += lane
            if not exchange.remote_done and exchange.lane_given >= self._settings.stream_window >> 2:
                self._transport.write(window_update(exchange.stream_id, exchange.lane_given))
                exchange.lane_given = 0
        self._want_flush()

    # -- sending: to the transport -----------------------------------------------------------------------------------

    def _want_flush(self) -> None:
        if not self._reading and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Everything there is to send, in one write."""
        self._scheduled = False
        if self._lost or self._paused:
            return
        session, outbox = self._session, self._outbox
        try:
            data = session.data_to_send()
            if not outbox.streams and not self._resets:
                if data:
                    self._transport.write(data)
            else:
                out: list[Buffer] = [data] if data else []
                self._pump(out)
                if out:
                    self._transport.writelines(out)
            for event in session.events():
                _HANDLERS[type(event)](self, event)
        except Exception as error:
            self._give_up(error)
            return
        if self._thirsty:
            self._quench()
        if self._control > self._settings.control_frames and self._control > self._earned():
            self._calm("too many control frames")
        elif self._draining == 2 and not self._streams:
            self._close()

    def _pump(self, out: list[Buffer]) -> None:
        session, outbox = self._session, self._outbox
        for stream in outbox.pump(_PUMP, out):
            if stream.trailers:
                session.send_trailers(stream.stream_id, stream.trailers)
            else:
                session.end_stream(stream.stream_id)
            if not stream.owner.remote_done:
                self._resets.append(stream.stream_id)
            if data := session.data_to_send():
                out.append(data)
        if self._resets:
            for stream_id in self._resets:  # answered before the request was whole: the rest is not wanted
                if stream_id in self._streams:
                    session.reset_stream(stream_id, 0)
            self._resets.clear()
            if data := session.data_to_send():
                out.append(data)
        if outbox.sendable:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _quench(self) -> None:
        for stream in [s for s in self._thirsty if s.queued <= LOW]:
            self._thirsty.discard(stream)
            on_drain = stream.owner.on_drain
            if on_drain is not None and not stream.closed:
                try:
                    on_drain()
                except Exception as error:
                    fail(stream.owner, error)

    def pause_writing(self) -> None:
        self._paused = True
        self._paused_ns = 0

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    # -- the end -----------------------------------------------------------------------------------------------------

    def _earned(self) -> int:
        """Control frames that the requests and bytes since the last sweep account for."""
        return self._settings.control_frames + 8 * self._requests + (self._work >> 9)

    def _calm(self, reason: str, code: int = _ENHANCE_YOUR_CALM) -> None:
        """GOAWAY with a reason, and the end."""
        if self._lost:
            return
        self._context.counters.protocol_errors += 1
        log.info("%s: HTTP/2 connection closed: %s", self._info.peer, reason)
        self._session.send_goaway(code, debug_data=reason.encode())
        self._transport.write(self._session.data_to_send())
        self._close()

    def _give_up(self, error: Exception) -> None:
        """The library has, or we have: it takes no more bytes."""
        if self._lost:
            return
        if isinstance(error, ngh2.NGH2Error | DoorstepError):
            self._context.counters.protocol_errors += 1
            log.info("%s: HTTP/2 connection closed: %s", self._info.peer, error)
            code = _ENHANCE_YOUR_CALM if isinstance(error, ngh2.DenialOfServiceError) else _PROTOCOL_ERROR
        else:
            log.error("%s: HTTP/2 connection failed", self._info.peer, exc_info=error)
            code = _INTERNAL_ERROR
        self._transport.write(_goaway(0, 0, 8, GOAWAY, 0, 0, MAX_WINDOW, code))
        self._close()

    def _close(self) -> None:
        if not self._lost:
            self._lost = True
            self._closing_ns = self._context.clock()
            self._transport.close()
            self._lose_all()

    def _lose_all(self) -> None:
        streams, self._streams = self._streams, {}
        self._thirsty.clear()
        self._lane = None
        for exchange in streams.values():
            self._outbox.close(exchange.stream_id)
            self._settle(exchange)
            self._lose(exchange)

    def eof_received(self) -> bool | None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._context.connections.discard(self)
        self._lose_all()

    def abort(self) -> None:
        self._lost = True
        self._transport.abort()
        self._lose_all()

    def drain(self) -> None:
        """First word that no new streams are wanted, then, when the client has surely read it, which was the last."""
        if self._draining or self._lost:
            return
        self._draining = 1
        self._session.send_shutdown_notice()
        self._session.ping(_LAST_CALL)
        self._want_flush()

    def _last_call(self) -> None:
        self._draining = 2
        self._session.send_goaway()
        self._want_flush()

    # -- time --------------------------------------------------------------------------------------------------------

    def sweep(self, now_ns: int) -> None:
        limits = self._context.limits
        touched, self._touched = self._touched, False
        self._control = self._requests = self._work = 0
        if touched:
            self._idle_since_ns = now_ns
        if self._closing_ns:
            if now_ns - self._closing_ns > limits.write_timeout_s * _SECOND:
                self._transport.abort()
            return
        if self._paused and self._never_reads(now_ns):
            self._time_out("the client does not read")
            self._transport.abort()
        elif self._dawdles(now_ns):
            self._time_out("a header block is not finished")
        elif self._silent(now_ns, touched):
            self._time_out("no answer to PING")
            self._transport.abort()
        else:
            for exchange in list(self._streams.values()):
                self._look_at(exchange, now_ns)
            if not self._streams and now_ns - self._idle_since_ns > limits.idle_timeout_s * _SECOND:
                self.drain()
            self._grow_old(now_ns)

    def _time_out(self, reason: str) -> None:
        self._context.counters.timeouts += 1
        self._calm(reason)

    def _never_reads(self, now_ns: int) -> bool:
        size = self._transport.get_write_buffer_size()
        if not self._paused_ns or size != self._paused_size:
            self._paused_ns, self._paused_size = now_ns, size
        return now_ns - self._paused_ns > self._context.limits.write_timeout_s * _SECOND

    def _dawdles(self, now_ns: int) -> bool:
        """A frame other than DATA, or a header block, has begun too long ago."""
        kind, flags = self._last_head
        if not self._held and not (self._skip and kind != DATA) and not _in_block(kind, flags):
            self._block_since_ns = 0
            return False
        if not self._block_since_ns:
            self._block_since_ns = now_ns
        return now_ns - self._block_since_ns > self._context.limits.header_timeout_s * _SECOND

    def _silent(self, now_ns: int, touched: bool) -> bool:
        settings = self._settings
        if touched or not settings.keepalive_time_s:
            self._pinged_ns = 0
        elif self._pinged_ns:
            return now_ns - self._pinged_ns > settings.keepalive_timeout_s * _SECOND
        elif (self._streams or settings.keepalive_without_calls) and (
            now_ns - self._idle_since_ns > settings.keepalive_time_s * _SECOND
        ):
            self._pinged_ns = now_ns
            self._session.ping()
            self._want_flush()
        return False

    def _look_at(self, exchange: Http2Exchange, now_ns: int) -> None:
        """Gives up a stream whose client neither sends what it began nor takes what it asked for."""
        limits = self._context.limits
        out = exchange.out
        if out is not None and out.queued:
            if out.queued != exchange.progress_mark:
                exchange.progress_mark, exchange.progress_ns = out.queued, now_ns
            elif now_ns - exchange.progress_ns > limits.write_timeout_s * _SECOND:
                self._context.counters.timeouts += 1
                exchange.reset_late()
        elif exchange.remote_done or exchange.ended or exchange.patient:
            exchange.progress_ns = 0
        elif exchange.touched or not exchange.progress_ns or (exchange.paced and exchange.unread):
            exchange.touched, exchange.progress_ns = False, now_ns
        elif now_ns - exchange.progress_ns > limits.body_timeout_s * _SECOND:
            self._context.counters.timeouts += 1
            self._refuse(exchange, refusal(408, "the request's body did not arrive in time", grpc_status=4))

    def _grow_old(self, now_ns: int) -> None:
        settings = self._settings
        if self._draining == 1:
            self._last_call()
        if self._aged_ns:
            if settings.max_age_grace_s and now_ns - self._aged_ns > settings.max_age_grace_s * _SECOND:
                self._close()
        elif settings.max_age_s and now_ns - self._made_ns > settings.max_age_s * _SECOND:
            self._aged_ns = now_ns
            self.drain()

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    def __repr__(self) -> str:
        state = " lost" if self._lost else " draining" if self._draining else ""
        return f"<Http2Connection {self._info.peer} {len(self._streams)} streams{state}>"


def _in_block(kind: int, flags: int) -> bool:
    return (kind == HEADERS or kind == CONTINUATION) and not flags & END_HEADERS


def _too_large(limit: int) -> Refusal:
    return refusal(
        413,
        f"Request body exceeds the maximum allowed value of {limit} bytes. "
        "Use --http-max-input-size to increase the limit.",
        grpc_status=8,
    )


def _undecodable(error: InvalidArgument) -> Refusal:
    return refusal(413 if isinstance(error, TooLarge) else 400, error.message, grpc_status=3)


_HANDLERS: dict[type, Callable[[Http2Connection, Any], None]] = {
    ev.RequestReceived: Http2Connection._on_request,
    ev.DataReceived: Http2Connection._on_data,
    ev.TrailersReceived: Http2Connection._on_trailers,
    ev.StreamClosed: Http2Connection._on_closed,
    ev.StreamReset: Http2Connection._on_nothing,
    ev.SettingsReceived: Http2Connection._on_settings,
    ev.SettingsAcknowledged: Http2Connection._on_control,
    ev.PingReceived: Http2Connection._on_ping,
    ev.PingAcknowledged: Http2Connection._on_ping_ack,
    ev.WindowUpdated: Http2Connection._on_control,
    ev.GoAwayReceived: Http2Connection._on_control,
    ev.PriorityUpdateReceived: Http2Connection._on_control,
    ev.ConnectionClosed: Http2Connection._on_end,
}
for _kind in list(vars(ev).values()):
    if isinstance(_kind, type) and issubclass(_kind, ev.Event):
        _HANDLERS.setdefault(_kind, Http2Connection._on_control)
