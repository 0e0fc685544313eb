"""HTTP/2 as real clients speak it, and frame by frame (RFC 9113)."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doorstep.testing.http2_client import (
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    NO_ERROR,
    RST_STREAM,
    SETTINGS,
    Http2Client,
    block,
    frame,
    request,
    rst_stream,
    settings,
    window_update,
)
from doorstep.testing.wire import WireServer
from doorstep.wire.answers import refusal
from doorstep.wire.exchange import Exchange, Refusal
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

TEXT = ((b"content-type", b"text/plain"),)


class Endpoints:
    """Endpoints, and what they saw."""

    def __init__(self) -> None:
        self.waiting: list[Exchange] = []
        self.gone: list[str] = []
        self.pieces: list[bytes] = []
        self.seen: list[Exchange] = []
        self.accessed: list[tuple[str, int, int, int | None]] = []
        self.router = router = Router()
        router.add("GET", "/hello", lambda e: e.respond(200, TEXT, b"hello"))
        router.add("POST", "/echo", self.echo)
        router.add("GET", "/wait", self.wait)
        router.add("GET", "/stream", self.stream)
        router.add("GET", "/parts", lambda e: e.respond(200, (), b"a", memoryview(b"b" * 40_000), bytearray(b"c")))
        router.add("GET", "/large", lambda e: e.respond(200, (), bytes(range(256)) * 20_000))
        router.add("GET", "/nothing", lambda e: e.respond(204, ()))
        router.add("GET", "/raise", self.fail)
        router.add("GET", "/raise-late", self.fail_late)
        router.add("GET", "/coroutine", self.coroutine)
        router.add("POST", "/upload", self.upload, streaming=True)
        router.add("POST", "/hold", self.hold, streaming=True)
        router.add("GET", "/v2/models/{name}/versions/{version}", lambda e: e.respond(200, (), repr(e.params).encode()))

    def echo(self, exchange: Exchange) -> None:
        self.seen.append(exchange)
        exchange.respond(200, TEXT, exchange.body)

    def wait(self, exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: self.gone.append(exchange.path)
        self.waiting.append(exchange)

    def stream(self, exchange: Exchange) -> None:
        exchange.start(200, ((b"content-type", b"text/event-stream"),))
        for word in (b"one", b"", b"two", b"x" * 20_000):
            exchange.write(word)
        exchange.end(((b"x-trailer", b"yes"),))

    def upload(self, exchange: Exchange) -> None:
        def on_body(piece: Any, last: bool) -> None:
            self.pieces.append(bytes(piece))
            exchange.consume(len(piece))
            if last:
                exchange.respond(200, TEXT, b"%d" % sum(map(len, self.pieces)))

        exchange.on_body = on_body

    def hold(self, exchange: Exchange) -> None:
        """Takes a body and gives nothing of it back to the client's window."""
        exchange.on_body = lambda piece, last: self.pieces.append(bytes(piece))
        self.waiting.append(exchange)

    def fail(self, exchange: Exchange) -> None:
        raise RuntimeError("secret")

    def fail_late(self, exchange: Exchange) -> None:
        exchange.start(200, ())
        exchange.write(b"half")
        raise RuntimeError("secret")

    async def coroutine(self, exchange: Exchange) -> None:
        exchange.respond(200, (), b"later")

    def access(self, exchange: Exchange, status: int, size: int, grpc_status: int | None) -> None:
        self.accessed.append((exchange.path, status, size, grpc_status))


@pytest.fixture
def endpoints() -> Endpoints:
    return Endpoints()


@pytest.fixture
def server(endpoints: Endpoints) -> Iterator[WireServer]:
    server = WireServer(endpoints.router)
    server.context.on_access = endpoints.access
    with server:
        yield server
        server.wait_until_empty()
        assert server.context.held_bytes == 0


@pytest.fixture
def client(server: WireServer) -> Iterator[Http2Client]:
    with server.connect() as raw:
        yield Http2Client(raw)


def connection_of(server: WireServer) -> Any:
    (connection,) = server.context.connections
    return connection


def curl(*args: str) -> bytes:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    done = subprocess.run(
        ["curl", "-sS", "--http2-prior-knowledge", "--max-time", "20", *args], capture_output=True, check=True
    )
    return done.stdout


# Real clients


def test_curl_gets_an_answer(server: WireServer) -> None:
    assert curl("-w", " %{http_version} %{http_code}", f"{server.url}/hello") == b"hello 2 200"


def test_curl_posts_a_large_body(server: WireServer, tmp_path: Path) -> None:
    body = os.urandom(3_000_000)
    (tmp_path / "body").write_bytes(body)
    assert curl("--data-binary", f"@{tmp_path}/body", f"{server.url}/echo") == body


def test_curl_posts_a_body_of_unknown_length(server: WireServer, tmp_path: Path) -> None:
    body = os.urandom(300_000)
    (tmp_path / "body").write_bytes(body)
    assert curl("-T", f"{tmp_path}/body", "-X", "POST", "-H", "content-length:", f"{server.url}/echo") == body


def test_curl_posts_a_compressed_body(server: WireServer, tmp_path: Path) -> None:
    body = b"tensor " * 100_000
    (tmp_path / "body").write_bytes(gzip.compress(body))
    assert curl("-H", "content-encoding: gzip", "--data-binary", f"@{tmp_path}/body", f"{server.url}/echo") == body


def test_curl_is_told_the_length_of_a_head_answer(server: WireServer) -> None:
    head = curl("-I", f"{server.url}/hello").decode()
    assert head.startswith("HTTP/2 200")
    assert "content-length: 5" in head


def test_curl_that_is_refused_while_it_sends_a_body_gets_its_answer(server: WireServer) -> None:
    for _ in range(20):
        assert curl("-w", "%{http_code}", "-d", "x" * 10_000, f"{server.url}/nowhere") == b'{"error":"Not Found"}404'


def test_curl_gets_404_and_405(server: WireServer) -> None:
    assert curl("-w", "%{http_code}", f"{server.url}/nowhere") == b'{"error":"Not Found"}404'
    assert b"405" in curl("-w", "%{http_code}", "-X", "DELETE", f"{server.url}/hello")


@pytest.mark.skipif(shutil.which("nghttp") is None, reason="nghttp is not installed")
def test_nghttp_gets_a_streamed_answer_with_trailers(server: WireServer) -> None:
    done = subprocess.run(
        ["nghttp", "-v", "-t", "20", f"{server.url}/stream"], capture_output=True, check=True, text=True
    )
    assert "x-trailer: yes" in done.stdout
    assert "onetwo" in done.stdout


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed")
@pytest.mark.parametrize("path", ["/hello", "/large", "/stream"])
def test_h2load_gets_every_answer_on_many_streams(server: WireServer, path: str) -> None:
    done = subprocess.run(
        ["h2load", "-n", "400", "-c", "4", "-m", "20", "-w", "16", f"{server.url}{path}"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert re.search(r"400 succeeded, 0 failed, 0 errored", done.stdout), done.stdout


# Frame by frame


def test_first_frame_of_the_server_is_its_settings(server: WireServer) -> None:
    with server.connect() as raw:
        raw.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings())
        head = raw.receive_exactly(9)
        assert head[3] == SETTINGS
        pairs = raw.receive_exactly(int.from_bytes(head[:3], "big"))
        values = {
            int.from_bytes(pairs[i : i + 2]): int.from_bytes(pairs[i + 2 : i + 6]) for i in range(0, len(pairs), 6)
        }
        assert values[INITIAL_WINDOW_SIZE] >= 1 << 20, "a tensor should fit"
        assert values[MAX_FRAME_SIZE] >= 1 << 20


def test_preface_may_come_byte_by_byte(server: WireServer) -> None:
    with server.connect() as raw:
        for byte in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings() + request(1, b"/hello"):
            raw.send(bytes((byte,)))
        # A client that has said nothing else knows the connection is good when it is answered.
        head = raw.receive_exactly(9)
        assert head[3] == SETTINGS


@pytest.mark.parametrize("cut", [1, 8, 9, 10, 13, 21, 22, 40, 60, 80])
def test_frames_may_be_cut_anywhere(server: WireServer, cut: int) -> None:
    body = os.urandom(50_000)
    with server.connect() as raw:
        client = Http2Client(raw)
        data = window_update(0, 100_000) + request(1, b"/echo", body) + window_update(0, 5)
        for start in range(0, 400, cut):
            raw.send(data[start : start + cut])
        raw.send(data[-(-400 // cut) * cut :])
        assert client.answer(1) == (200, body)


def test_requests_are_answered_as_their_endpoints_finish(client: Http2Client, endpoints: Endpoints) -> None:
    client.send(request(1, b"/wait"), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")


def test_endpoint_sees_the_request_as_it_would_over_http1(
    client: Http2Client, server: WireServer, endpoints: Endpoints
) -> None:
    extra = ((b"x-a", b"1"), (b"x-a", b"2"), (b"cookie", b"a=b"), (b"cookie", b"c=d"))
    client.send(request(1, b"/echo?q=1", b"body", extra=extra))
    assert client.answer(1) == (200, b"body")
    (exchange,) = endpoints.seen
    assert (exchange.method, exchange.path, exchange.query, exchange.route) == ("POST", "/echo", "q=1", "/echo")
    assert exchange.headers == {b"host": b"x", b"x-a": b"1, 2", b"cookie": b"a=b; c=d"}
    assert exchange.connection.http_version == "2"
    assert exchange.connection.listener == "http"


def test_path_parameters_are_found(client: Http2Client) -> None:
    client.send(request(1, b"/v2/models/a%20b/versions/7"))
    assert client.answer(1) == (200, b"{'name': 'a b', 'version': '7'}")


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 16_385, 65_536, 1_000_000, 12_000_000])
@pytest.mark.parametrize("announced", [True, False])
def test_body_of_any_size_comes_back(client: Http2Client, size: int, announced: bool) -> None:
    body = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    extra = ((b"content-length", b"%d" % size),) if announced else ()
    frames = [frame(HEADERS, 4, 1, block(b"POST", b"/echo", extra))]
    pieces = [body[i : i + 2_000_000] for i in range(0, size, 2_000_000)] or [b""]
    frames += [frame(DATA, END_STREAM if i == len(pieces) - 1 else 0, 1, piece) for i, piece in enumerate(pieces)]
    client.send(*frames)
    assert client.answer(1) == (200, body)


def test_large_body_with_trailers_is_whole(client: Http2Client) -> None:
    body = os.urandom(100_000)
    client.send(request(1, b"/echo", body, end=False), frame(HEADERS, 5, 1, b"\x00\x03x-t\x01y"))
    assert client.answer(1) == (200, body)


def test_padded_frames_lose_their_padding(client: Http2Client) -> None:
    body = os.urandom(20_000)
    client.send(
        frame(HEADERS, 4, 1, block(b"POST", b"/echo")),
        frame(DATA, END_STREAM | 8, 1, b"\xff" + body + bytes(255)),
    )
    assert client.answer(1) == (200, body)


def test_answer_of_several_buffers_is_one_body(client: Http2Client) -> None:
    client.send(request(1, b"/parts"))
    assert client.answer(1) == (200, b"a" + b"b" * 40_000 + b"c")


def test_answer_without_content_has_one_frame(client: Http2Client) -> None:
    client.send(request(1, b"/nothing"))
    found = client.receive()
    assert (found.kind, found.ends, found.payload[0]) == (HEADERS, True, 0x89)


def test_client_window_is_respected_to_the_byte(server: WireServer) -> None:
    with server.connect() as raw:
        client = Http2Client(raw, (INITIAL_WINDOW_SIZE, 1000))
        client.send(request(1, b"/parts"), request(3, b"/hello"))
        # The connection's window lets stream 3 pass, whatever stream 1 is waiting for.
        first = [client.receive() for _ in range(4)]
        assert sum(len(f.payload) for f in first if f.kind == DATA and f.stream_id == 1) == 1000
        assert [f.payload for f in first if f.kind == DATA and f.stream_id == 3] == [b"hello"]
        client.send(window_update(1, 10))
        assert len(client.receive_kind(DATA).payload) == 10
        client.send(settings((INITIAL_WINDOW_SIZE, 2000)))
        assert len(client.receive_kind(DATA).payload) == 1000
        client.send(window_update(1, 1 << 20))
        rest = client.answer(1, grant=False)[1]
        assert len(rest) == 40_002 - 2010


def test_connection_window_is_shared_by_small_and_large_answers(client: Http2Client) -> None:
    client.send(request(1, b"/large"))
    seen = 0
    while seen < 65_535:
        seen += len(client.receive_kind(DATA).payload)
    assert seen == 65_535, "the window a connection begins with"
    client.send(window_update(1, 10_000_000), request(3, b"/hello"))
    # Nothing may be sent now; five bytes of window are used, in turn, by whichever stream was waiting.
    client.send(window_update(0, 10_000_000))
    bodies = {1: 0, 3: 0}
    ended = set()
    while ended != {1, 3}:
        found = client.receive()
        if found.kind == DATA:
            bodies[found.stream_id] += len(found.payload)
        if found.ends:
            ended.add(found.stream_id)
    assert bodies == {1: 256 * 20_000 - 65_535, 3: 5}


def test_frames_are_as_large_as_the_client_takes(server: WireServer) -> None:
    with server.connect() as raw:
        client = Http2Client(raw, (INITIAL_WINDOW_SIZE, 10_000_000), (MAX_FRAME_SIZE, 1 << 20))
        client.send(window_update(0, 10_000_000), request(1, b"/large"))
        sizes = []
        while not (found := client.receive()).ends:
            if found.kind == DATA:
                sizes.append(len(found.payload))
        assert sum(sizes) == 256 * 20_000
        assert max(sizes) == 1 << 20


def test_streaming_endpoint_gets_the_body_in_pieces(client: Http2Client, endpoints: Endpoints) -> None:
    body = os.urandom(40_000)
    client.send(frame(HEADERS, 4, 1, block(b"POST", b"/upload")))
    client.send(frame(DATA, 0, 1, body[:10]), frame(DATA, 0, 1, body[10:30_000]), frame(DATA, 1, 1, body[30_000:]))
    assert client.answer(1) == (200, b"40000")
    assert b"".join(endpoints.pieces) == body


def test_client_may_send_no_more_than_a_window_to_an_endpoint_that_does_not_consume(
    client: Http2Client, server: WireServer, endpoints: Endpoints
) -> None:
    window = server.context.http2.stream_window
    client.send(frame(HEADERS, 4, 1, block(b"POST", b"/hold")))
    for _ in range(window // 1_000_000):
        client.send(frame(DATA, 0, 1, bytes(1_000_000)))
    client.send(frame(DATA, 0, 1, bytes(1_000_000)))
    goaway = client.until_closed()
    assert goaway is not None
    assert goaway.error_code == 3, "FLOW_CONTROL_ERROR"


def test_client_may_send_on_when_the_endpoint_has_consumed(
    client: Http2Client, server: WireServer, endpoints: Endpoints
) -> None:
    window = server.context.http2.stream_window
    client.send(frame(HEADERS, 4, 1, block(b"POST", b"/upload")))
    for _ in range(3 * window // 1_000_000):
        client.send(frame(DATA, 0, 1, bytes(1_000_000)))
    client.send(frame(DATA, END_STREAM, 1))
    assert client.answer(1) == (200, b"%d" % (3 * window // 1_000_000 * 1_000_000))


def test_gone_client_is_noticed(server: WireServer, endpoints: Endpoints) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/wait"), request(3, b"/hello"))
        client.answer(3)
    server.wait_until_empty()
    assert endpoints.gone == ["/wait"]
    (exchange,) = endpoints.waiting
    assert exchange.disconnected
    server.call(lambda: exchange.respond(200, (), b"into the void"))


def test_reset_stream_is_noticed_and_the_connection_goes_on(
    client: Http2Client, server: WireServer, endpoints: Endpoints
) -> None:
    client.send(request(1, b"/wait"), rst_stream(1), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")
    assert endpoints.gone == ["/wait"]
    assert server.call(lambda: len(connection_of(server).streams)) == 0


def test_stream_reset_while_its_answer_waits_for_a_window_is_forgotten(client: Http2Client, server: WireServer) -> None:
    client.send(request(1, b"/large"))
    seen = 0
    while seen < 65_535:
        seen += len(client.receive_kind(DATA).payload)
    client.send(rst_stream(1), window_update(0, 65_535), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")
    assert server.call(lambda: len(connection_of(server).outbox.streams)) == 0


def test_client_that_goes_on_sending_after_its_answer_is_reset(client: Http2Client) -> None:
    client.send(frame(HEADERS, 4, 1, block(b"POST", b"/nowhere")), frame(DATA, 0, 1, bytes(100)))
    assert client.answer(1)[0] == 404
    client.send(*[frame(DATA, 0, 1, bytes(10_000))] * 7)
    found = client.receive_kind(RST_STREAM)
    assert (found.stream_id, found.error_code) == (1, NO_ERROR)
    client.send(frame(DATA, END_STREAM, 1, bytes(20_000)), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")


def test_client_that_never_ends_its_answered_request_is_reset(endpoints: Endpoints) -> None:
    limits = WireLimits(linger_timeout_s=0.05, body_timeout_s=0.1)
    with WireServer(endpoints.router, limits) as server, server.connect() as raw:
        client = Http2Client(raw)
        client.send(frame(HEADERS, 4, 1, block(b"POST", b"/nowhere")))
        assert client.answer(1)[0] == 404
        assert client.receive_kind(RST_STREAM).error_code == NO_ERROR


def test_too_large_body_is_413_before_and_while_it_comes(endpoints: Endpoints) -> None:
    with WireServer(endpoints.router, WireLimits(body_bytes=100_000)) as server:
        for extra, body in ((((b"content-length", b"100001"),), b""), ((), bytes(100_001))):
            with server.connect() as raw:
                client = Http2Client(raw)
                client.send(request(1, b"/echo", body, extra=extra, end=False))
                status, text = client.answer(1)
                assert status == -1  # 413 has no entry in the static table
                assert b"exceeds the maximum allowed value of 100000 bytes" in text
        server.wait_until_empty()
        assert server.context.held_bytes == 0


def test_expectation_is_met_with_100(client: Http2Client) -> None:
    client.send(frame(HEADERS, 4, 1, block(b"POST", b"/echo", ((b"expect", b"100-continue"),))))
    found = client.receive()
    assert (found.kind, found.ends) == (HEADERS, False)
    client.send(frame(DATA, END_STREAM, 1, b"body"))
    assert client.answer(1) == (200, b"body")


def test_unknown_content_encoding_is_refused_before_the_body(client: Http2Client) -> None:
    client.send(frame(HEADERS, 4, 1, block(b"POST", b"/echo", ((b"content-encoding", b"br"),))))
    assert b"Unsupported compression type" in client.answer(1)[1]


def test_failing_endpoint_is_500_without_its_secret(client: Http2Client) -> None:
    client.send(request(1, b"/raise"))
    status, body = client.answer(1)
    assert status == 500
    assert b"secret" not in body


def test_endpoint_that_fails_half_way_resets_its_stream_alone(client: Http2Client) -> None:
    client.send(request(1, b"/raise-late"), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")


def test_coroutine_endpoint_answers(client: Http2Client) -> None:
    client.send(request(1, b"/coroutine"))
    assert client.answer(1) == (200, b"later")


def test_gate_refuses_before_the_body_comes(endpoints: Endpoints) -> None:
    def gate(exchange: Exchange) -> Refusal | None:
        return refusal(400, "no") if exchange.headers.get(b"x-key") != b"k" else None

    server = WireServer(endpoints.router)
    server.context.gates.append(gate)
    with server, server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/echo", b"", end=False))
        assert client.answer(1) == (400, b'{"error":"no"}')
        client.send(request(3, b"/nowhere"))
        assert client.answer(3)[0] == 400
        client.send(request(5, b"/hello", extra=((b"x-key", b"k"),)))
        assert client.answer(5)[0] == 200


def test_slow_reader_makes_write_say_no_and_is_drained_later(endpoints: Endpoints) -> None:
    refused, drained = [], []

    def endpoint(exchange: Exchange) -> None:
        exchange.start(200, ())
        while exchange.write(bytes(100_000)):
            pass
        refused.append(True)

        def on_drain() -> None:
            drained.append(True)
            exchange.end()

        exchange.on_drain = on_drain

    endpoints.router.add("GET", "/much", endpoint)
    with WireServer(endpoints.router) as server, server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/much"), request(3, b"/hello"))
        seen = 0
        while seen < 65_535 - 5:
            found = client.receive()
            seen += len(found.payload) if found.kind == DATA and found.stream_id == 1 else 0
        assert refused
        assert not drained
        client.send(window_update(0, 1 << 24), window_update(1, 1 << 24))
        _, rest = client.answer(1, grant=False)
        assert drained
        assert (seen + len(rest)) % 100_000 == 0


def test_draining_connection_finishes_its_streams_and_says_which_was_the_last(
    client: Http2Client, server: WireServer, endpoints: Endpoints
) -> None:
    client.send(request(1, b"/wait"), request(3, b"/hello"))
    assert client.answer(3) == (200, b"hello")
    server.call(server.context.drain)
    first = client.receive_kind(GOAWAY)
    assert (int.from_bytes(first.payload[:4]), first.error_code) == (2**31 - 1, NO_ERROR)
    second = client.receive_kind(GOAWAY)  # the PING between them has been answered
    assert (int.from_bytes(second.payload[:4]), second.error_code) == (3, NO_ERROR)
    server.call(lambda: endpoints.waiting[0].respond(200, TEXT, b"finished"))
    assert client.answer(1) == (200, b"finished")
    assert client.until_closed() is None


def test_idle_connection_is_closed_when_draining(client: Http2Client, server: WireServer) -> None:
    client.send(request(1, b"/hello"))
    client.answer(1)
    server.call(server.context.drain)
    goaway = client.until_closed()
    assert goaway is not None
    assert goaway.error_code == NO_ERROR


def test_every_answer_is_accounted_once(server: WireServer, endpoints: Endpoints) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/hello"))
        client.answer(1)
        client.send(request(3, b"/stream"))
        client.answer(3)
        client.send(request(5, b"/wait"), request(7, b"/nothing"))
        client.answer(7)
    server.wait_until_empty()
    assert endpoints.accessed == [
        ("/hello", 200, 5, None),
        ("/stream", 200, 20_006, None),
        ("/nothing", 204, 0, None),
        ("/wait", 0, 0, None),
    ]
