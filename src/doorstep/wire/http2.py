"""One HTTP/2 connection: its streams become exchanges. Knows no endpoint and nothing above HTTP.

ngh2 (libnghttp2) does header compression, stream states, settings and small bodies, and is imported only here. Large
DATA frames never pass through it: `Inbound` lands them in the body they belong to, and `Outbox` sends them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from struct import Struct
from typing import Any, Final

import ngh2
from ngh2 import events as ev

from doorstep.errors import DoorstepError
from doorstep.wire.answers import fail
from doorstep.wire.context import ListenerContext, describe
from doorstep.wire.exchange import Buffer
from doorstep.wire.flow import GOAWAY, MAX_WINDOW, Outbox, OutStream
from doorstep.wire.http2_dispatch import admits, complete, dispatch, refuse_pieces
from doorstep.wire.http2_exchange import SMALL, FieldList, Http2Exchange, collect_headers
from doorstep.wire.http2_inbound import Inbound
from doorstep.wire.http2_watch import Watch

log = logging.getLogger("doorstep.wire")

_PUMP = 4 << 20  # bytes of large bodies handed to the transport at a time
_NO_ERROR, _PROTOCOL_ERROR, _INTERNAL_ERROR, _FLOW_CONTROL_ERROR, _CANCEL, _ENHANCE_YOUR_CALM = (
    0x0,
    0x1,
    0x2,
    0x3,
    0x8,
    0xB,
)
_LAST_CALL: Final = b"doorstep"  # our PING between the two GOAWAYs of a graceful end
_goaway = Struct(">BHBBLLL").pack

_OPEN, _NOTICE, _LAST = "open", "notice", "last"  # the client was told that we close; and after which stream


class Http2Connection(asyncio.BufferedProtocol):
    """Touched only from the event loop."""

    __slots__ = (
        "_inbound",
        "_paused",
        "_phase",
        "_reading",
        "_resets",
        "_scheduled",
        "_thirsty",
        "context",
        "info",
        "loop",
        "lost",
        "outbox",
        "session",
        "settings",
        "streams",
        "transport",
        "watch",
        "work",
    )

    def __init__(self, context: ListenerContext, transport: asyncio.Transport, first_bytes: bytes) -> None:
        """Takes over `transport`; `first_bytes` have been read from it already: the preface, or its beginning."""
        self.context = context
        self.transport = transport
        self.settings = context.http2
        self.loop = asyncio.get_running_loop()
        self.info = describe(transport, context.name, "2")
        self.streams: dict[int, Http2Exchange] = {}  # those that are open
        self.outbox = Outbox()
        self.work = 0  # bytes of bodies, both ways, since the watch last asked
        self.lost = False  # nothing more is read or sent
        self.watch = Watch(self, context.now_ns)
        self.session = _session(context)
        self._inbound = Inbound(self)
        self._thirsty: set[OutStream] = set()  # their endpoints wait for on_drain
        self._resets: list[int] = []  # streams answered, whose requests go on and on
        self._phase = _OPEN
        self._reading = False
        self._scheduled = False
        self._paused = False
        context.connections.add(self)
        transport.set_write_buffer_limits(high=1 << 20, low=1 << 18)
        transport.set_protocol(self)
        transport.write(self.session.data_to_send())
        self._receive(self._inbound.walk, memoryview(first_bytes))
        if context.draining:
            self.drain()

    # Bytes in

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._inbound.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._receive(self._inbound.filled, nbytes)

    def _receive(self, read: Callable[[Any], None], what: Any) -> None:
        if self.lost:
            return
        self._reading = self.watch.touched = True
        try:
            read(what)
        except Exception as error:
            self._give_up(error)
        self._reading = False
        self._flush()

    def feed(self, data: memoryview) -> None:
        """The next bytes for the library."""
        if self.lost:
            return
        session = self.session
        session.receive_data(data)
        for event in session.events():
            _HANDLERS[type(event)](self, event)

    # Events of the library

    def _on_request(self, event: ev.RequestReceived) -> None:
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
        exchange = Http2Exchange(self, self.info, stream_id, headers, self.context.clock())
        exchange.method = method
        exchange.path, _, exchange.query = target.partition("?")
        self.streams[stream_id] = exchange
        self.watch.requests += 1
        dispatch(self, exchange, event.end_stream)

    def _on_data(self, event: ev.DataReceived) -> None:
        stream_id, data, last = event.stream_id, event.data, event.end_stream
        exchange = self.streams.get(stream_id)
        size = len(data)
        if size:
            self.work += size
            if exchange is None or not exchange.paced:
                self.session.acknowledge_received_data(size, stream_id)
            else:
                exchange.native_unread += size
        elif not last:
            self.watch.control += 1
        if exchange is None:
            return
        exchange.remote_done = last
        if (size and not admits(self, exchange, size)) or exchange.ended:
            return
        try:
            exchange.feed(data, last)
        except Exception as error:
            fail(exchange, error)

    def _on_trailers(self, event: ev.TrailersReceived) -> None:
        exchange = self.streams.get(event.stream_id)
        if exchange is not None and not exchange.remote_done:
            exchange.remote_done = True
            try:
                exchange.feed(b"", True)
            except Exception as error:
                fail(exchange, error)

    def _on_closed(self, event: ev.StreamClosed) -> None:
        exchange = self.streams.pop(event.stream_id, None)
        if exchange is not None:
            self._let_go(exchange)

    def _on_settings(self, event: ev.SettingsReceived) -> None:
        self.watch.control += 1
        self.outbox.settings(dict(event.settings))

    def _on_ping(self, event: ev.PingReceived) -> None:
        self.watch.control += 1
        if self.watch.pinged(self.context.clock()):
            self.calm("too_many_pings")

    def _on_ping_ack(self, event: ev.PingAcknowledged) -> None:
        self.watch.control += 1
        if self._phase is _NOTICE and event.opaque_data == _LAST_CALL:
            self.last_call()

    def _on_control(self, event: ev.Event) -> None:
        self.watch.control += 1

    def _on_end(self, event: ev.ConnectionClosed) -> None:
        if event.error_code:
            self.context.counters.protocol_errors += 1
            log.info("%s: HTTP/2 error %s, connection closed", self.info.peer, event.error_code)
        self.close()

    # Called by exchanges

    def complete(self, exchange: Http2Exchange) -> None:
        complete(self, exchange)

    def refuse_pieces(self, exchange: Http2Exchange) -> None:
        refuse_pieces(self, exchange)

    def settle(self, exchange: Http2Exchange) -> None:
        """A body that was arriving is whole, or given up."""
        self.context.held_bytes -= exchange.arriving
        exchange.arriving = 0

    def send_answer(
        self,
        exchange: Http2Exchange,
        fields: FieldList,
        size: int,
        body: tuple[Buffer, ...],
        trailers: FieldList | None,
    ) -> None:
        session, outbox, stream_id = self.session, self.outbox, exchange.stream_id
        try:
            if not size and trailers is None:
                session.send_response(stream_id, fields, end_stream=True)
            else:
                session.send_response(stream_id, fields)
                if size <= SMALL and size <= outbox.credit and size <= outbox.initial_window:
                    outbox.credit -= size
                    self.work += size
                    session.send_data(stream_id, b"".join(body), end_stream=trailers is None)
                    if trailers is not None:
                        session.send_trailers(stream_id, trailers)
                else:
                    out = exchange.out = outbox.open(stream_id, session.stream_remote_window_size(stream_id), exchange)
                    for buffer in body:
                        outbox.put(out, buffer)
                    outbox.finish(out, trailers or ())
        except ngh2.NGH2Error:  # the client has reset the stream: the library is about to say so
            return
        exchange.progress_ns = 0
        self.account(exchange)
        if len(self.streams) == 1 and not self._reading:
            self._flush()  # nothing else can be waiting to share the write
        else:
            self._want_flush()

    def send_start(self, exchange: Http2Exchange, fields: FieldList) -> OutStream | None:
        session, stream_id = self.session, exchange.stream_id
        out = None
        try:
            if exchange.method == "HEAD":
                session.send_response(stream_id, fields, end_stream=True)
            else:
                session.send_response(stream_id, fields)
                out = self.outbox.open(stream_id, session.stream_remote_window_size(stream_id), exchange)
        except ngh2.NGH2Error:
            return None
        self._want_flush()
        return out

    def send_data(self, out: OutStream, buffers: tuple[Buffer, ...]) -> int:
        """Returns how many bytes are queued now."""
        size = sum([self.outbox.put(out, buffer) for buffer in buffers])
        self._want_flush()
        return size

    def wait_for_room(self, out: OutStream) -> None:
        self._thirsty.add(out)

    def send_end(self, exchange: Http2Exchange, out: OutStream, trailers: FieldList) -> None:
        self.outbox.finish(out, trailers)
        self.account(exchange)
        self._want_flush()

    def reset_rest(self, exchange: Http2Exchange) -> None:
        """The request was answered before it was whole, and the client has had time to notice."""
        if exchange.out is None or exchange.out.closed or exchange.out.stream_id not in self.outbox.streams:
            self._resets.append(exchange.stream_id)
            self._want_flush()

    def reset_stream(self, exchange: Http2Exchange) -> None:
        self.outbox.close(exchange.stream_id)
        try:
            self.session.reset_stream(exchange.stream_id, _CANCEL)
        except ngh2.NGH2Error:
            return
        self._want_flush()

    def consume(self, exchange: Http2Exchange, size: int) -> None:
        """Gives bytes of a paced exchange back to the client's windows."""
        native = min(size, exchange.native_unread)
        if native:
            exchange.native_unread -= native
            self.session.acknowledge_received_data(native, exchange.stream_id)
        lane = min(size - native, exchange.lane_unread)
        if lane:
            exchange.lane_unread -= lane
            self._inbound.give_back(lane)
            self._inbound.give_back_stream(exchange, lane)
        self._want_flush()

    def account(self, exchange: Http2Exchange) -> None:
        self.watch.answered = True
        on_access = self.context.on_access
        if on_access is not None:
            on_access(exchange, exchange.status, exchange.sent, exchange.grpc_status)

    # Bytes out

    def _want_flush(self) -> None:
        if not self._reading and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Everything there is to send, in one write."""
        self._scheduled = False
        if self.lost or self._paused:
            return
        session = self.session
        try:
            data = session.data_to_send()
            if self.outbox.streams or self._resets:
                out: list[Buffer] = [data] if data else []
                self._pump(out)
                if out:
                    self.transport.writelines(out)
            elif data:
                self.transport.write(data)
            if data or self.outbox.streams:  # sending may have ended streams
                for event in session.events():
                    _HANDLERS[type(event)](self, event)
        except Exception as error:
            self._give_up(error)
            return
        if self._thirsty:
            self._quench()
        if self.watch.flooded():
            self.calm("too many control frames")
        elif self._phase is _LAST and not self.streams:
            self.close()

    def _pump(self, out: list[Buffer]) -> None:
        session, outbox = self.session, self.outbox
        credit = outbox.credit
        done = outbox.pump(_PUMP, out)
        self.work += credit - outbox.credit
        for stream in done:
            if stream.trailers:
                session.send_trailers(stream.stream_id, stream.trailers)
            else:
                session.end_stream(stream.stream_id)
        if data := session.data_to_send():
            out.append(data)
        if self._resets:
            for stream_id in self._resets:
                if stream_id in self.streams:
                    session.reset_stream(stream_id, _NO_ERROR)
            self._resets.clear()
            if data := session.data_to_send():
                out.append(data)
        if outbox.sendable:
            self._scheduled = True
            self.loop.call_soon(self._flush)

    def _quench(self) -> None:
        for stream in [s for s in self._thirsty if self.outbox.has_room(s)]:
            self._thirsty.discard(stream)
            on_drain = stream.owner.on_drain
            if on_drain is not None and not stream.closed:
                try:
                    on_drain()
                except Exception as error:
                    fail(stream.owner, error)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    # The end

    def drain(self) -> None:
        """First word that no new streams are wanted, then, when the client has read it, which was the last."""
        if self._phase is _OPEN and not self.lost:
            self._phase = _NOTICE
            self.session.send_shutdown_notice()
            self.session.ping(_LAST_CALL)
            self._want_flush()

    def last_call(self) -> None:
        if self._phase is _NOTICE and not self.lost:
            self._phase = _LAST
            self.session.send_goaway()
            self._want_flush()

    def ping(self) -> None:
        self.session.ping()
        self._want_flush()

    def calm(self, reason: str, code: int = _ENHANCE_YOUR_CALM) -> None:
        """GOAWAY with a reason, and the end."""
        if not self.lost:
            self.context.counters.protocol_errors += 1
            log.info("%s: HTTP/2 connection closed: %s", self.info.peer, reason)
            self.transport.write(_goaway(0, 8 + len(reason), GOAWAY, 0, 0, MAX_WINDOW, code) + reason.encode())
            self.close()

    def flow_control_error(self) -> None:
        self.calm("more data than the window allows", _FLOW_CONTROL_ERROR)

    def _give_up(self, error: Exception) -> None:
        """The library takes no more bytes, or we made a mistake."""
        if isinstance(error, ngh2.DenialOfServiceError):
            self.calm(str(error))
        elif isinstance(error, ngh2.NGH2Error | DoorstepError):
            self.calm(str(error), _PROTOCOL_ERROR)
        else:
            log.error("%s: HTTP/2 connection failed", self.info.peer, exc_info=error)
            self.calm("internal error", _INTERNAL_ERROR)

    def sweep(self, now_ns: int) -> None:
        self.watch.look(now_ns, in_block=self._inbound.in_block, paused=self._paused)

    def close(self) -> None:
        """What has been written is still sent."""
        if not self.lost:
            self.transport.close()
            self._lose_all()

    def abort(self) -> None:
        self.transport.abort()
        self._lose_all()

    def eof_received(self) -> bool | None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.context.connections.discard(self)
        self._lose_all()

    def _lose_all(self) -> None:
        self.lost = True
        streams, self.streams = self.streams, {}
        self._thirsty.clear()
        for exchange in streams.values():
            self.outbox.close(exchange.stream_id)
            self.settle(exchange)
            self._lose(exchange)

    def _let_go(self, exchange: Http2Exchange) -> None:
        """Everything a closed stream held goes back."""
        stream_id = exchange.stream_id
        if exchange.out is not None:
            self._thirsty.discard(exchange.out)
            self.outbox.close(stream_id)
        if exchange.native_unread:
            self.session.acknowledge_received_data(exchange.native_unread, stream_id)
        if exchange.lane_unread:
            self._inbound.give_back(exchange.lane_unread)
        exchange.native_unread = exchange.lane_unread = 0
        if exchange.arriving:
            self.settle(exchange)
        self._lose(exchange)

    def _lose(self, exchange: Http2Exchange) -> None:
        ended = exchange.ended
        try:
            exchange.lost()
        except Exception:
            log.exception("%r: on_disconnect failed", exchange)
        if not ended:
            self.account(exchange)

    def __repr__(self) -> str:
        state = " lost" if self.lost else "" if self._phase is _OPEN else " draining"
        return f"<Http2Connection {self.info.peer} {len(self.streams)} streams{state}>"


def _session(context: ListenerContext) -> ngh2.Connection:
    settings, limits = context.http2, context.limits
    configuration = ngh2.Configuration(
        auto_window_update=False,
        stream_reset_rate_limit=(settings.reset_burst, settings.reset_rate),
        max_continuations=settings.continuations,
        max_inbound_header_list_size=limits.header_bytes,
        max_inbound_header_count=limits.header_count,
    )
    session = ngh2.Connection(ngh2.Role.SERVER, configuration)
    session.initiate_connection(
        {
            ngh2.Setting.MAX_CONCURRENT_STREAMS: limits.streams,
            ngh2.Setting.INITIAL_WINDOW_SIZE: settings.stream_window,
            ngh2.Setting.MAX_FRAME_SIZE: settings.frame_bytes,
            ngh2.Setting.MAX_HEADER_LIST_SIZE: limits.header_bytes,
            ngh2.Setting.NO_RFC7540_PRIORITIES: 1,
        }
    )
    session.set_local_window_size(settings.connection_window)
    return session


_HANDLERS: dict[type, Callable[[Http2Connection, Any], None]] = {
    ev.RequestReceived: Http2Connection._on_request,
    ev.DataReceived: Http2Connection._on_data,
    ev.TrailersReceived: Http2Connection._on_trailers,
    ev.StreamClosed: Http2Connection._on_closed,
    ev.SettingsReceived: Http2Connection._on_settings,
    ev.PingReceived: Http2Connection._on_ping,
    ev.PingAcknowledged: Http2Connection._on_ping_ack,
    ev.ConnectionClosed: Http2Connection._on_end,
}
for _kind in ev.Event.__subclasses__():
    _HANDLERS.setdefault(_kind, Http2Connection._on_control)
