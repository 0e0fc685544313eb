"""Hostile and broken HTTP/2 clients: each gets an error or a closed connection, and the server goes on.

After every test the server still answers, and when the clients are gone nothing of them is left.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psutil
import pytest

from doorstep.testing.http2_client import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    NO_ERROR,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    Http2Client,
    block,
    field,
    frame,
    request,
    rst_stream,
    settings,
    window_update,
)
from doorstep.testing.wire import WireServer
from doorstep.wire.exchange import Exchange
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.grpc_call import StreamCall, UnaryCall
from doorstep.wire.http2_exchange import Http2Exchange
from doorstep.wire.http2_settings import Http2Settings
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

GRPC = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
QUICK = WireLimits(
    header_timeout_s=0.1,
    body_timeout_s=0.1,
    idle_timeout_s=0.3,
    write_timeout_s=0.2,
    body_bytes=1 << 20,
    arriving_bytes=4 << 20,
    streams=50,
)
MIB = 1 << 20


class Endpoints:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.gone = 0
        self.grpc = GrpcServer(WireLimits(grpc_message_bytes=2**31 - 1))
        self.grpc.add_unary("/t.T/Echo", self.echo)
        self.grpc.add_stream("/t.T/Stream", self.stream)
        self.router = router = Router()
        self.grpc.install(router)
        router.add("GET", "/hello", lambda e: e.respond(200, (), b"hello"))
        router.add("POST", "/echo", lambda e: e.respond(200, (), e.body))
        router.add("GET", "/large", lambda e: e.respond(200, (), bytes(50 * MIB)))
        router.add("GET", "/wait", self.wait)
        router.add("GET", "/endless", self.endless)

    def echo(self, call: UnaryCall) -> None:
        call.respond(call.message)

    def stream(self, call: StreamCall) -> None:
        call.on_cancel = self.leave
        call.on_half_close = call.finish
        call.on_message = lambda message: call.send(message) and None

    def wait(self, exchange: Exchange) -> None:
        exchange.on_disconnect = self.leave

    def leave(self) -> None:
        self.gone += 1

    def endless(self, exchange: Exchange) -> None:
        def write() -> None:
            while exchange.write(bytes(100_000)):
                pass

        exchange.on_disconnect = self.leave
        exchange.on_drain = write
        exchange.start(200, ())
        write()


def exchanges_left() -> int:
    gc.collect()
    # (`isinstance` asks things for their class, at which some of other packages warn.)
    return sum(issubclass(type(thing), Http2Exchange) and not thing.disconnected for thing in gc.get_objects())


def still_well(server: WireServer) -> None:
    """The server answers others, and has forgotten those who left."""
    with server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/hello"))
        assert client.answer(1) == (200, b"hello")
    server.wait_until_empty()
    assert server.context.held_bytes == 0
    assert server.call(exchanges_left) == 0


@pytest.fixture
def endpoints() -> Endpoints:
    return Endpoints()


@pytest.fixture
def server(endpoints: Endpoints) -> Iterator[WireServer]:
    with WireServer(endpoints.router) as server:
        yield server
        still_well(server)


@pytest.fixture
def quick(endpoints: Endpoints) -> Iterator[WireServer]:
    with WireServer(endpoints.router, QUICK) as server:
        yield server
        still_well(server)


@pytest.fixture
def client(server: WireServer) -> Iterator[Http2Client]:
    with server.connect() as raw:
        yield Http2Client(raw)


@pytest.fixture
def hasty(quick: WireServer) -> Iterator[Http2Client]:
    """A client of the server with short time limits."""
    with quick.connect() as raw:
        yield Http2Client(raw)


def flood(client: Http2Client, data: bytes) -> None:
    client.raw.send_until_refused(data)


def assert_calmed(client: Http2Client, *codes: int) -> None:
    goaway = client.until_closed()
    if goaway is not None:  # the client's own bytes may have turned it into a reset
        assert goaway.error_code in (codes or (ENHANCE_YOUR_CALM,)), goaway


# Floods


def test_rapid_reset_is_stopped(client: Http2Client, endpoints: Endpoints, server: WireServer) -> None:
    """CVE-2023-44487: streams that are reset as soon as they are opened never count as concurrent."""
    flood(client, b"".join(request(i, b"/wait") + rst_stream(i) for i in range(1, 20_001, 2)))
    goaway = client.until_closed()
    assert goaway is None or goaway.error_code != NO_ERROR
    assert endpoints.gone < 5000


def test_some_cancelled_streams_are_normal(client: Http2Client, endpoints: Endpoints) -> None:
    for i in range(1, 1001, 2):
        client.send(request(i, b"/wait"), rst_stream(i))
    client.send(request(1001, b"/hello"))
    assert client.answer(1001) == (200, b"hello")
    assert endpoints.gone == 500


def test_continuation_flood_is_stopped(client: Http2Client) -> None:
    """CVE-2024-27316 and its like."""
    piece = field(b"x-a", b"b" * 100)
    flood(client, frame(HEADERS, 0, 1, block(b"GET", b"/hello")) + frame(CONTINUATION, 0, 1, piece) * 10_000)
    assert_calmed(client, ENHANCE_YOUR_CALM, PROTOCOL_ERROR)


def test_empty_continuations_are_stopped(client: Http2Client) -> None:
    flood(client, frame(HEADERS, 0, 1, block(b"GET", b"/hello")) + frame(CONTINUATION, 0, 1) * 10_000)
    assert_calmed(client, ENHANCE_YOUR_CALM, PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(PING, 0, 0, bytes(8)), id="PING"),
        pytest.param(frame(PING, 1, 0, bytes(8)), id="PING acknowledgement"),
        pytest.param(settings(), id="empty SETTINGS"),
        pytest.param(settings((INITIAL_WINDOW_SIZE, 70_000)), id="SETTINGS"),
        pytest.param(window_update(0, 1), id="WINDOW_UPDATE"),
        pytest.param(frame(DATA, 0, 1), id="empty DATA"),
        pytest.param(frame(DATA, 8, 1, b"\x05" + bytes(5)), id="DATA of padding alone"),
        pytest.param(frame(0x10, 0, 0, b"\0\0\0\x01u=1"), id="PRIORITY_UPDATE"),
    ],
)
def test_frames_that_bring_nothing_are_limited(client: Http2Client, data: bytes) -> None:
    client.send(frame(HEADERS, END_HEADERS, 1, block(b"POST", b"/echo")))
    flood(client, data * 60_000)
    assert_calmed(client, ENHANCE_YOUR_CALM, PROTOCOL_ERROR, FLOW_CONTROL_ERROR)


def test_pings_that_come_too_often_are_strikes_where_they_are_counted(endpoints: Endpoints) -> None:
    server = WireServer(endpoints.router)
    server.context.http2 = Http2Settings(max_ping_strikes=2)
    with server, server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/wait"), frame(PING, 0, 0, bytes(8)) * 5)
        goaway = client.until_closed()
        assert goaway is not None
        assert (goaway.error_code, goaway.payload[8:]) == (ENHANCE_YOUR_CALM, b"too_many_pings")


def test_windows_may_be_updated_often_by_a_client_that_reads_much(client: Http2Client) -> None:
    client.send(window_update(0, 1_000_000), request(1, b"/large"))
    client.send(window_update(1, 1_000_000))
    size = 0
    while not (found := client.receive()).ends:
        if found.kind == DATA:
            size += len(found.payload)
            half = len(found.payload) // 2
            for increment in (half, len(found.payload) - half):
                client.send(window_update(0, increment), window_update(1, increment))
    assert size == 50 * MIB


# Too much of something


def test_streams_beyond_the_limit_close_the_connection(hasty: Http2Client, endpoints: Endpoints) -> None:
    hasty.send(*(request(i, b"/wait") for i in range(1, 121, 2)))
    assert_calmed(hasty, PROTOCOL_ERROR)
    assert endpoints.gone == QUICK.streams


def test_as_many_streams_as_allowed_are_served(hasty: Http2Client, endpoints: Endpoints) -> None:
    hasty.send(*(request(i, b"/wait") for i in range(1, 99, 2)), request(99, b"/hello"))
    assert hasty.answer(99) == (200, b"hello")
    hasty.send(request(101, b"/hello"))
    assert hasty.answer(101) == (200, b"hello")


def test_header_list_beyond_the_limit_closes_the_connection(client: Http2Client) -> None:
    many = b"".join(field(b"x-%d" % i, b"v" * 1000) for i in range(16))
    client.send(frame(HEADERS, 0, 1, block(b"GET", b"/hello")), frame(CONTINUATION, 0, 1, many) * 5)
    assert_calmed(client, ENHANCE_YOUR_CALM, PROTOCOL_ERROR)


def test_more_header_fields_than_the_limit_close_the_connection(client: Http2Client) -> None:
    client.send(request(1, b"/hello", extra=[(b"x-%d" % i, b"") for i in range(300)]))
    assert_calmed(client)


def test_header_bomb_is_stopped(client: Http2Client) -> None:
    """One large field in the dynamic table, then named again and again by a single byte."""
    stored = b"\x40\x03x-a\x7f" + bytes((0x81, 0x1E)) + b"v" * 4000
    assert len(stored) == 4008
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, block(b"GET", b"/hello") + stored + b"\xbe" * 10_000))
    assert_calmed(client, ENHANCE_YOUR_CALM, PROTOCOL_ERROR)


def test_body_in_countless_pieces_is_refused(endpoints: Endpoints) -> None:
    with WireServer(endpoints.router, replace(QUICK, chunk_count=1000)) as server:
        with server.connect() as raw:
            client = Http2Client(raw)
            client.send(frame(HEADERS, END_HEADERS, 1, block(b"POST", b"/echo")))
            flood(client, frame(DATA, 0, 1, b"x") * 1100)
            assert client.answer(1)[0] == 400
        still_well(server)


def test_bodies_that_arrive_at_once_are_bounded_together(quick: WireServer, hasty: Http2Client) -> None:
    body = bytes(500_000)
    for i in range(1, 21, 2):
        hasty.send(frame(HEADERS, END_HEADERS, i, block(b"POST", b"/echo")), frame(DATA, 0, i, body))
    refused = 0
    while refused < 2:  # ten times 500,000 bytes are a million too many
        found = hasty.receive()
        refused += found.kind == HEADERS
    # What has come of the refused is counted until it is thrown away.
    turn = threading.Event()
    for _ in range(1000):
        if quick.context.held_bytes <= QUICK.arriving_bytes:
            break
        turn.wait(0.01)
    assert quick.context.held_bytes <= QUICK.arriving_bytes


def resident() -> int:
    return psutil.Process().memory_info().rss  # type: ignore[no-any-return]


def test_promised_message_takes_no_memory_before_it_comes(client: Http2Client) -> None:
    before = resident()
    promise = b"\0" + (2**31 - 1).to_bytes(4, "big") + bytes(20_000)
    for i in range(1, 101, 2):
        path = b"/t.T/Echo" if i % 4 == 1 else b"/t.T/Stream"
        client.send(request(i, path, promise, extra=GRPC, end=False))
    client.send(request(101, b"/hello"))
    assert client.answer(101) == (200, b"hello")
    assert resident() - before < 50 * MIB


def test_client_that_never_reads_its_socket_costs_little_and_is_dropped(
    quick: WireServer, endpoints: Endpoints
) -> None:
    with quick.connect() as raw:
        client = Http2Client(raw, (INITIAL_WINDOW_SIZE, 2**31 - 1))
        before = resident()
        client.send(window_update(0, 2**31 - 1 - 65_535), *(request(i, b"/endless") for i in range(1, 101, 2)))
        quick.wait_until_empty()
        assert resident() - before < 60 * MIB
    assert endpoints.gone == 50


def test_client_that_grants_no_window_costs_little_and_loses_its_streams(
    quick: WireServer, endpoints: Endpoints
) -> None:
    with quick.connect() as raw:
        client = Http2Client(raw, (INITIAL_WINDOW_SIZE, 0))
        client.send(*(request(i, b"/endless") for i in range(1, 41, 2)))
        reset = {client.receive_kind(RST_STREAM).stream_id for _ in range(20)}
        assert reset == set(range(1, 41, 2))
        client.send(request(41, b"/wait"))
    quick.wait_until_empty()
    assert endpoints.gone == 21


def test_client_that_never_reads_cannot_pile_up_ping_answers(quick: WireServer) -> None:
    with quick.connect() as raw:
        client = Http2Client(raw)
        before = resident()
        flood(client, frame(PING, 0, 0, bytes(8)) * 1_000_000)
        quick.wait_until_empty()
        assert resident() - before < 50 * MIB


# Too slow


def test_preface_that_does_not_come_to_its_end_is_given_up(quick: WireServer) -> None:
    for part in (PREFACE[:10], PREFACE, PREFACE + settings()[:5]):
        with quick.connect() as raw:
            raw.send(part)
            raw.receive_all()


def test_frame_head_that_does_not_come_to_its_end_is_given_up(hasty: Http2Client, quick: WireServer) -> None:
    hasty.send(request(1, b"/hello")[:5])
    assert_calmed(hasty)
    assert quick.context.counters.timeouts == 1


def test_header_block_that_does_not_come_to_its_end_is_given_up(hasty: Http2Client, quick: WireServer) -> None:
    hasty.send(frame(HEADERS, END_STREAM, 1, block(b"GET", b"/hello")))
    assert_calmed(hasty)
    assert quick.context.counters.timeouts == 1


def test_header_block_is_given_up_though_a_byte_comes_now_and_then(quick: WireServer) -> None:
    with quick.connect() as raw:
        client = Http2Client(raw)
        data = frame(HEADERS, END_STREAM | END_HEADERS, 1, block(b"GET", b"/hello", [(b"x-a", b"b" * 2000)]))
        began = time.monotonic()
        for byte in data:
            flood(client, bytes((byte,)))
            if time.monotonic() - began > 5 or not quick.context.connections:
                break
            time.sleep(0.01)  # that is how slow this client is
        assert_calmed(client)


@pytest.mark.parametrize("extra", [(), GRPC])
def test_body_that_stops_coming_is_given_up(hasty: Http2Client, quick: WireServer, extra: Any) -> None:
    path = b"/t.T/Echo" if extra else b"/echo"
    hasty.send(request(1, path, b"\0\0\0\x40\0" + bytes(100), extra=extra, end=False))
    status, _ = hasty.answer(1)
    assert status == (200 if extra else -1)
    assert quick.context.counters.timeouts == 1


def test_large_frame_that_stops_coming_is_given_up(hasty: Http2Client, quick: WireServer) -> None:
    body = b"\0\0\x04\0\0" + bytes(0x40000)
    data = request(1, b"/t.T/Echo", body, extra=GRPC)
    hasty.send(data[:-1])
    assert hasty.answer(1) == (200, b"")
    hasty.send(data[-1:], request(3, b"/hello"))
    assert hasty.answer(3) == (200, b"hello")


def test_quiet_stream_between_messages_is_left_alone(hasty: Http2Client, quick: WireServer) -> None:
    hasty.send(request(1, b"/t.T/Stream", b"\0\0\0\0\1x", extra=GRPC, end=False))
    while hasty.receive().kind != DATA:
        pass
    ticks = 5 * QUICK.body_timeout_s
    now_ns = quick.context.clock()
    for i in range(1, 6):  # the sweep's clock, ahead of its time
        quick.call(lambda i=i: [c.sweep(now_ns + int(i * ticks * 1e8)) for c in list(quick.context.connections)])
    hasty.send(frame(DATA, END_STREAM, 1, b"\0\0\0\0\1y"))
    assert hasty.answer(1)[1] == b"\0\0\0\0\1y"


def test_idle_connection_is_sent_away(hasty: Http2Client) -> None:
    goaway = hasty.until_closed()
    assert goaway is not None
    assert goaway.error_code == NO_ERROR


def test_silent_client_is_pinged_and_given_up_without_an_answer(endpoints: Endpoints) -> None:
    server = WireServer(endpoints.router, QUICK)
    server.context.http2 = Http2Settings(keepalive_time_s=0.1, keepalive_timeout_s=0.1)
    with server:
        with server.connect() as raw:
            client = Http2Client(raw)
            client.send(request(1, b"/wait"))
            assert raw.receive_until(frame(PING, 0, 0, bytes(8)))
            assert raw.receive_all()[3] == GOAWAY
        server.wait_until_empty()
        with server.connect() as raw:
            client = Http2Client(raw)
            client.send(request(1, b"/wait"))
            for _ in range(3):
                raw.receive_until(frame(PING, 0, 0, bytes(8)))
                client.send(frame(PING, 1, 0, bytes(8)))
            assert endpoints.gone == 1
        still_well(server)
    assert endpoints.gone == 2


def test_old_connection_is_sent_away_and_closed_after_its_grace(endpoints: Endpoints) -> None:
    server = WireServer(endpoints.router, QUICK)
    server.context.http2 = Http2Settings(max_age_s=0.1, max_age_grace_s=0.1)
    with server, server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/wait"))
        assert client.receive_kind(GOAWAY).error_code == NO_ERROR
        client.until_closed()
        server.wait_until_empty()
        assert endpoints.gone == 1


# Wrong


WRONG = {
    "no preface": b"GARBAGE" * 10,
    "DATA on no stream": frame(DATA, 0, 0, b"x"),
    "large DATA on no stream": frame(DATA, 0, 0, bytes(20_000)),
    "large DATA on an idle stream": frame(DATA, 0, 7, bytes(20_000)),
    "HEADERS on no stream": frame(HEADERS, 5, 0, block(b"GET", b"/hello")),
    "HEADERS on an even stream": request(2, b"/hello"),
    "frame larger than allowed": frame(DATA, 0, 1, bytes(5 * MIB)),
    "CONTINUATION of nothing": frame(CONTINUATION, 4, 1),
    "large DATA inside a header block": request(1, b"/t.T/Stream", b"", extra=GRPC, end=False)
    + frame(HEADERS, 0, 3, block(b"GET", b"/hello"))
    + frame(DATA, 0, 1, bytes(20_000)),
    "PUSH_PROMISE": frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + block(b"GET", b"/hello")),
    "SETTINGS of five bytes": frame(SETTINGS, 0, 0, bytes(5)),
    "SETTINGS on a stream": frame(SETTINGS, 0, 1),
    "SETTINGS with a window too large": settings((INITIAL_WINDOW_SIZE, 2**31)),
    "SETTINGS with a frame size too small": settings((5, 100)),
    "PING of seven bytes": frame(PING, 0, 0, bytes(7)),
    "PING on a stream": frame(PING, 0, 1, bytes(8)),
    "WINDOW_UPDATE of nothing": window_update(0, 0),
    "WINDOW_UPDATE of three bytes": frame(8, 0, 0, bytes(3)),
    "WINDOW_UPDATE of an idle stream": window_update(9, 1),
    "windows that overflow": window_update(0, 2**31 - 1),
    "windows of a stream that overflow": request(1, b"/wait") + window_update(1, 2**31 - 1),
    "DATA after the end": request(1, b"/wait") + frame(DATA, 0, 1, b"x"),
    "large DATA after the end": request(1, b"/wait") + frame(DATA, 0, 1, bytes(20_000)),
    "RST_STREAM of an idle stream": rst_stream(9),
    "broken header block": frame(HEADERS, 5, 1, b"\xff\xff\xff\xff\xff"),
    "padding longer than its frame": frame(HEADERS, 5 | 8, 1, b"\xff\x00"),
}


@pytest.mark.parametrize("name", WRONG)
def test_protocol_error_ends_the_connection(server: WireServer, name: str) -> None:
    with server.connect() as raw:
        if name == "no preface":
            raw.send(PREFACE + WRONG[name])
            raw.receive_all()
            return
        client = Http2Client(raw)
        flood(client, WRONG[name])
        goaway = client.until_closed()
        assert goaway is None or goaway.error_code not in (NO_ERROR, CANCEL)


STREAM_ERRORS = {
    "upper-case name": request(1, b"/hello", extra=[(b"X-A", b"b")]),
    "connection field": request(1, b"/hello", extra=[(b"connection", b"close")]),
    "no method": frame(HEADERS, 5, 1, field(b":scheme", b"http") + field(b":path", b"/hello")),
    "pseudo-field after others": frame(HEADERS, 5, 1, field(b"x-a", b"b") + block(b"GET", b"/hello")),
    "unknown pseudo-field": request(1, b"/hello", extra=[(b":x", b"y")]),
    "line break in a value": request(1, b"/hello", extra=[(b"x-a", b"b\r\nc: d")]),
    "NUL in a value": request(1, b"/hello", extra=[(b"x-a", b"b\0c")]),
    "content-length too large": request(1, b"/echo", b"abc", extra=[(b"content-length", b"4")]),
    "content-length too small": request(1, b"/echo", b"abc", extra=[(b"content-length", b"2")]),
    "content-length too small for a large body": request(
        1, b"/echo", bytes(100_000), extra=[(b"content-length", b"50000")]
    ),
    "content-length too large for a large body": request(
        1, b"/echo", bytes(100_000), extra=[(b"content-length", b"150000")]
    ),
    "content-length that is no number": request(1, b"/echo", b"abc", extra=[(b"content-length", b"x")]),
    "two content-lengths": request(1, b"/echo", b"abc", extra=[(b"content-length", b"3"), (b"content-length", b"4")]),
}


@pytest.mark.parametrize("name", STREAM_ERRORS)
def test_error_of_a_stream_is_its_own(client: Http2Client, name: str) -> None:
    client.send(STREAM_ERRORS[name])
    assert client.receive_kind(RST_STREAM).stream_id == 1
    client.send(request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")


def test_frames_for_streams_that_are_over_are_ignored(client: Http2Client) -> None:
    client.send(request(1, b"/hello"))
    client.answer(1)
    client.send(window_update(1, 100), rst_stream(1), frame(PRIORITY, 0, 1, bytes(4) + b"\x10"), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")


def test_unknown_frames_are_ignored(client: Http2Client) -> None:
    client.send(frame(0xBE, 0xFF, 0, os.urandom(50)), frame(0x20, 0, 1, bytes(20_000)), request(1, b"/hello"))
    assert client.answer(1) == (200, b"hello")


def test_client_that_leaves_in_the_middle_of_anything_leaves_nothing(server: WireServer, endpoints: Endpoints) -> None:
    data = request(1, b"/t.T/Echo", b"\0\0\x01\0\0" + bytes(0x10000), extra=GRPC) + request(3, b"/echo", bytes(30_000))
    for cut in (1, 8, 30, 100, 200, 20_000, 65_000, 66_000, len(data) - 1):
        with server.connect() as raw:
            Http2Client(raw).send(data[:cut])
        server.wait_until_empty()
        assert server.context.held_bytes == 0


# Anything


def conversation() -> bytes:
    """Frames of every kind that a server takes."""
    return b"".join(
        (
            window_update(0, 1_000_000),
            request(1, b"/hello"),
            request(3, b"/echo", b"abc", extra=[(b"content-length", b"3")]),
            request(5, b"/t.T/Echo", b"\0\0\0\0\3abc", extra=GRPC),
            frame(PING, 0, 0, b"12345678"),
            request(7, b"/t.T/Echo", b"\0\0\0\x50\0" + bytes(0x5000), extra=GRPC),
            request(9, b"/t.T/Stream", b"\0\0\0\0\1x\0\0\0\0\1y", extra=GRPC, end=False),
            window_update(9, 1000),
            frame(DATA, 8 | END_STREAM, 9, b"\x04\0\0\0\0\1z" + bytes(4)),
            request(11, b"/wait"),
            rst_stream(11),
            frame(HEADERS, END_STREAM, 13, block(b"GET", b"/large")[:20]),
            frame(CONTINUATION, END_HEADERS, 13, block(b"GET", b"/large")[20:]),
            settings((INITIAL_WINDOW_SIZE, 100_000), (3, 10)),
            request(15, b"/endless"),
            frame(PRIORITY, 0, 15, bytes(4) + b"\x10"),
            rst_stream(15),
            rst_stream(13),
            frame(GOAWAY, 0, 0, bytes(8)),
        )
    )


def mutate(data: bytearray, dice: random.Random) -> None:
    for _ in range(dice.randint(1, 8)):
        at = dice.randrange(len(data))
        match dice.randrange(5):
            case 0:
                data[at] ^= 1 << dice.randrange(8)
            case 1:
                data[at] = dice.choice((0, 1, 4, 5, 8, 9, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at : at + dice.randint(1, 20)]
            case 3:
                data[at:at] = dice.randbytes(dice.randint(1, 20))
            case 4:
                data[at:at] = data[dice.randrange(len(data)) :][: dice.randint(1, 2000)]


def test_mutated_conversations_neither_stop_nor_swell_the_server(server: WireServer, endpoints: Endpoints) -> None:
    dice = random.Random(20231010)
    good = conversation()
    opening = PREFACE + settings() + frame(SETTINGS, 1, 0)
    before = 0
    began = time.monotonic()
    for count in range(4000):
        data = bytearray(good)
        mutate(data, dice)
        with server.connect() as raw:
            raw.send_until_refused(opening + bytes(data))
            if count % 10 == 0:  # most leave at once, some look at what they get
                raw.sock.settimeout(0.02)
                try:
                    raw.receive_all()
                except TimeoutError:
                    pass
        if count == 500:
            server.wait_until_empty()
            before = resident()
        if time.monotonic() - began > 8:  # however slow the machine
            break
    server.wait_until_empty()
    assert not before or resident() - before < 30 * MIB
    assert server.context.held_bytes == 0
