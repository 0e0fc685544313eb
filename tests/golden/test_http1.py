"""HTTP/1.1 as real clients speak it, and to the byte (RFC 9110, RFC 9112)."""

from __future__ import annotations

import gzip
import http.client
import os
import shutil
import socket
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from doorstep.errors import InvalidArgument, Unavailable
from doorstep.testing.wire import WireServer
from doorstep.wire.answers import refusal
from doorstep.wire.compression import IDENTITY_ONLY
from doorstep.wire.exchange import Exchange, Refusal
from doorstep.wire.limits import WireLimits
from doorstep.wire.listener import Address, share
from doorstep.wire.router import Router

TEXT = ((b"content-type", b"text/plain"),)


class Endpoints:
    """Endpoints, and what they saw."""

    def __init__(self) -> None:
        self.waiting: list[Exchange] = []
        self.gone: list[str] = []
        self.pieces: list[bytes] = []
        self.bodies: list[Any] = []
        self.router = router = Router()
        router.add("GET", "/hello", lambda e: e.respond(200, TEXT, b"hello"))
        router.add("POST", "/echo", self.echo)
        router.add("POST", "/identity", self.echo, codings=IDENTITY_ONLY)
        router.add("POST", "/raw", self.echo, codings=None)
        router.add("POST", "/size", lambda e: e.respond(200, TEXT, b"%d" % len(e.body)))
        router.add("GET", "/wait", self.wait)
        router.add("POST", "/wait", self.wait)
        router.add("GET", "/stream", self.stream)
        router.add("POST", "/upload", self.upload, streaming=True)
        router.add("GET", "/name/{name}", lambda e: e.respond(200, TEXT, e.params["name"].encode()))
        router.add("GET", "/query", lambda e: e.respond(200, TEXT, e.query.encode()))
        router.add("GET", "/headers/{name}", lambda e: e.respond(200, TEXT, e.headers[e.params["name"].encode()]))
        router.add("GET", "/parts", lambda e: e.respond(200, (), b"a", memoryview(b"b" * 40_000), bytearray(b"c")))
        router.add("GET", "/nothing", lambda e: e.respond(204, ()))
        router.add("GET", "/raise", self.fail)
        router.add("GET", "/raise-late", self.fail_late)
        router.add("GET", "/coroutine", self.coroutine)
        router.add("GET", "/coroutine-raise", self.coroutine_fail)
        router.add("GET", "/twice", self.twice)

    def echo(self, exchange: Exchange) -> None:
        self.bodies.append(exchange.body)
        exchange.respond(200, TEXT, exchange.body)

    def wait(self, exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: self.gone.append(exchange.path)
        self.waiting.append(exchange)

    def stream(self, exchange: Exchange) -> None:
        exchange.start(200, ((b"content-type", b"text/event-stream"),))
        for word in (b"one", b"", b"two", b"x" * 20_000):
            exchange.write(word)
        exchange.end(((b"grpc-status", b"0"),))

    def upload(self, exchange: Exchange) -> None:
        def on_body(piece: Any, last: bool) -> None:
            self.pieces.append(bytes(piece))
            exchange.consume(len(piece))
            if last:
                exchange.respond(200, TEXT, b"%d" % sum(map(len, self.pieces)))

        exchange.on_body = on_body

    def fail(self, exchange: Exchange) -> None:
        raise ZeroDivisionError("secret detail")

    def fail_late(self, exchange: Exchange) -> None:
        exchange.start(200, ())
        exchange.write(b"begun")
        raise InvalidArgument("too late to say so")

    async def coroutine(self, exchange: Exchange) -> None:
        exchange.respond(200, TEXT, b"awaited")

    async def coroutine_fail(self, exchange: Exchange) -> None:
        raise Unavailable("not today")

    def twice(self, exchange: Exchange) -> None:
        exchange.respond(200, TEXT, b"once")
        exchange.respond(200, TEXT, b"twice")


@pytest.fixture
def endpoints() -> Endpoints:
    return Endpoints()


@pytest.fixture
def server(endpoints: Endpoints) -> Iterator[WireServer]:
    with WireServer(endpoints.router) as server:
        yield server
        server.wait_until_empty()


def test_an_answer_to_the_byte(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.receive_all() == (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello"
        )


def test_a_connection_serves_one_request_after_another(server: WireServer) -> None:
    with server.connect() as client:
        for _ in range(3):
            client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.receive_until(b"hello") == (
                b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"
            )


def test_a_head_that_comes_again_means_the_same_and_one_that_differs_does_not(server: WireServer) -> None:
    """Heads seen before are not parsed again; whatever differs in head or length is."""

    def echo(client: Any, body: bytes, extra: bytes = b"", *, pieces: tuple[int, ...] = ()) -> None:
        request = b"POST /echo HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (extra, len(body), body)
        start = 0
        for end in (*pieces, len(request)):
            client.send(request[start:end])
            start = end
        assert client.receive_until(b"\r\n\r\n" + body).startswith(b"HTTP/1.1 200 OK\r\n")

    with server.connect() as client:
        for body in (b"one", b"two", b"six", b"four", b"four", b"", b"", b"one", b"GET"):
            echo(client, body)
        echo(client, b"one", b"X-Other: 1\r\n")
        echo(client, b"two", b"X-Other: 1\r\n", pieces=(5, 40))
        echo(client, b"two", b"X-Other: 1\r\n")
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        for _ in range(3):
            client.receive_until(b"hello")
        for _ in range(3):
            client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            client.receive_until(b"hello")
        for _ in range(2):
            client.send(b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")
            assert client.receive_until(b'Not Found"}').startswith(b"HTTP/1.1 404 ")
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.receive_all().endswith(b"connection: close\r\n\r\nhello")


def test_a_target_may_name_the_host_as_proxies_do(server: WireServer) -> None:
    """RFC 9112 section 3.2.2: a server must take the absolute form."""
    with server.connect() as client:
        client.send(b"GET http://elsewhere:80/hello?a=b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.receive_all().endswith(b"\r\n\r\nhello")


def test_a_request_may_come_in_any_pieces(server: WireServer) -> None:
    request = b"POST /echo?x=%20y HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde"
    with server.connect() as client:
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(2):
            for byte in request:
                client.send(bytes([byte]))
            assert client.receive_answer()[2] == b"abcde"


def test_empty_lines_before_a_request_are_ignored(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"\r\n\r\nGET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.receive_answer()[2] == b"hello"


def test_http_1_0_closes_unless_asked_to_keep_alive(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /hello HTTP/1.0\r\n\r\n")
        assert client.receive_all().endswith(b"\r\nconnection: close\r\n\r\nhello")
    with server.connect() as client:
        for _ in range(2):
            client.send(b"GET /hello HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert client.receive_answer()[1]["connection"] == "keep-alive"


def test_http_1_0_gets_a_streamed_answer_without_chunks(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        head, _, body = client.receive_all().partition(b"\r\n\r\n")
    assert head == b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close"
    assert body == b"onetwo" + b"x" * 20_000


def test_head_gets_the_headers_of_get_and_no_body(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"HEAD /hello HTTP/1.1\r\nHost: x\r\n\r\nHEAD /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        first, second, third, last = client.receive_all().split(b"\r\n\r\n")
    assert first.endswith(b"content-length: 5")
    assert second.startswith(b"HTTP/1.1 200 OK")
    assert third.startswith(b"HTTP/1.1 200 OK")
    assert last == b"hello"


def test_no_content_has_no_length_and_no_body(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 204 No Content\r\n\r\n"


def test_an_answer_in_parts_arrives_as_one_body(server: WireServer) -> None:
    assert requests.get(server.url + "/parts", timeout=10).content == b"a" + b"b" * 40_000 + b"c"


def test_pipelined_requests_are_answered_in_order(server: WireServer, endpoints: Endpoints) -> None:
    with server.connect() as client:
        client.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        client.send(b"".join(b"GET /name/%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(500)))
        client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"z" * 100_000)
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        while not server.call(lambda: list(endpoints.waiting)):
            pass
        server.call(lambda: endpoints.waiting[0].respond(200, TEXT, b"first"))
        assert client.receive_answer()[2] == b"first"
        for number in range(500):
            assert client.receive_answer()[2] == b"%d" % number
        assert client.receive_answer()[2] == b"z" * 100_000
        assert client.receive_answer()[2] == b"hello"


def test_chunks_extensions_and_trailers(server: WireServer) -> None:
    with server.connect() as client:
        client.send(
            b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3;name=value\r\nabc\r\n0a\r\n0123456789\r\n0\r\nContent-Type: changed\r\n\r\n"
            b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        assert client.receive_answer()[2] == b"abc0123456789"
        assert client.receive_answer()[2] == b"hello"


def test_a_large_chunked_body_is_put_together(server: WireServer) -> None:
    piece = bytes(range(256)) * 1000
    answer = requests.post(server.url + "/echo", data=iter([piece] * 8), timeout=30)
    assert answer.content == piece * 8
    assert server.context.held_bytes == 0


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 65_535, 65_536, 65_537, 300_000, 5_000_000])
def test_bodies_of_any_size_arrive_whole(server: WireServer, size: int) -> None:
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    with requests.Session() as session:
        for _ in range(2):
            answer = session.post(server.url + "/echo", data=body, timeout=30)
            assert answer.content == body
            assert answer.headers["content-length"] == str(size)
    assert server.context.held_bytes == 0


def test_a_large_body_is_one_buffer_that_nothing_was_copied_into_twice(
    server: WireServer, endpoints: Endpoints
) -> None:
    requests.post(server.url + "/echo", data=b"x" * 1_000_000, timeout=30)
    assert isinstance(endpoints.bodies[0], memoryview)
    assert endpoints.bodies[0].nbytes == 1_000_000


def test_a_request_may_follow_a_large_body_in_the_same_packet(server: WireServer) -> None:
    request = b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n" + b"y" * 200_000
    with server.connect() as client:
        client.send((request + b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n") * 5)
        for _ in range(5):
            assert client.receive_answer()[2] == b"200000"
            assert client.receive_answer()[2] == b"hello"


def test_the_client_is_told_to_continue(server: WireServer) -> None:
    with server.connect() as client:
        for size in (5, 100_000):
            client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n" % size)
            assert client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"a" * size)
            assert client.receive_answer()[2] == b"a" * size


def test_the_client_is_told_to_continue_only_when_it_is_its_turn(server: WireServer, endpoints: Endpoints) -> None:
    with server.connect() as client:
        client.send(
            b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"
            b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"
        )
        while not server.call(lambda: list(endpoints.waiting)):
            pass
        server.call(lambda: endpoints.waiting[0].respond(200, TEXT, b"first"))
        assert client.receive_answer()[2] == b"first"
        assert client.receive_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"abc")
        assert client.receive_answer()[2] == b"abc"


def test_a_refused_expectation_is_answered_before_the_body_is_sent(server: WireServer) -> None:
    for head, status in (
        (b"POST /nowhere HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n", 404),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nContent-Length: 5\r\nExpect: the-unexpected\r\n\r\n", 417),
    ):
        with server.connect() as client:
            client.send(head)
            answer = client.receive_answer()
            assert (answer[0], answer[1]["connection"]) == (status, "close")
            assert client.receive_all() == b""


def test_compressed_bodies_are_decompressed(server: WireServer) -> None:
    for body in (b"short", b"long " * 300_000):
        for coding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
            answer = requests.post(server.url + "/echo", data=packed, headers={"Content-Encoding": coding}, timeout=30)
            assert (answer.status_code, answer.content) == (200, body)


def test_incompressible_bodies_are_decompressed_off_the_loop(server: WireServer) -> None:
    body = os.urandom(200_000)
    answer = requests.post(
        server.url + "/echo", data=gzip.compress(body), headers={"Content-Encoding": "gzip"}, timeout=30
    )
    assert answer.content == body


def test_an_unknown_coding_is_refused_as_the_route_says(server: WireServer) -> None:
    headers = {"Content-Encoding": "br"}
    answer = requests.post(server.url + "/echo", data=b"x", headers=headers, timeout=10)
    assert (answer.status_code, answer.json()) == (501, {"error": "Unsupported compression type"})
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    answer = requests.post(server.url + "/identity", data=b"x", headers={"Content-Encoding": "gzip"}, timeout=10)
    assert answer.status_code == 400
    assert answer.json() == {"error": "Unsupported content-encoding, only 'identity' is supported."}
    assert requests.post(server.url + "/raw", data=b"x", headers=headers, timeout=10).content == b"x"


def test_a_streamed_answer_is_chunked_and_drops_trailers(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert client.receive_all() == (
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n"
            b"\r\n3\r\none\r\n3\r\ntwo\r\n4e20\r\n" + b"x" * 20_000 + b"\r\n0\r\n\r\n"
        )


def test_a_streamed_answer_keeps_the_connection(server: WireServer) -> None:
    with requests.Session() as session:
        for _ in range(3):
            assert session.get(server.url + "/stream", timeout=10).content == b"onetwo" + b"x" * 20_000
    assert server.context.counters.accepted == 1


def test_a_streaming_endpoint_gets_the_body_in_pieces(server: WireServer, endpoints: Endpoints) -> None:
    body = bytes(range(256)) * 4000
    with requests.Session() as session:
        assert session.post(server.url + "/upload", data=body, timeout=30).content == b"1024000"
        assert b"".join(endpoints.pieces) == body
        assert len(endpoints.pieces) > 10
        endpoints.pieces.clear()
        assert session.post(server.url + "/upload", data=iter([b"a", b"bc"]), timeout=30).content == b"3"
    assert server.context.counters.accepted == 1


def test_a_streaming_endpoint_that_does_not_consume_stops_the_client(server: WireServer, endpoints: Endpoints) -> None:
    received: list[int] = []
    exchanges: list[Exchange] = []

    def slow(exchange: Exchange) -> None:
        exchanges.append(exchange)
        exchange.on_body = lambda piece, last: received.append(len(piece))

    server.call(lambda: endpoints.router.add("POST", "/slow", slow, streaming=True))
    with server.connect() as client:
        client.send(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 60000000\r\n\r\n")
        client.sock.settimeout(1.0)
        with pytest.raises(TimeoutError):
            client.send(bytes(60_000_000))
        assert server.call(lambda: sum(received)) < 1_000_000
        while server.call(lambda: sum(received)) < 20_000_000:
            server.call(lambda: exchanges[0].consume(exchanges[0].unconsumed))  # type: ignore[attr-defined]
            client.sock.setblocking(False)
            try:
                client.sock.send(bytes(1_000_000))
            except BlockingIOError:
                pass
        server.call(exchanges[0].reset)


def test_a_stream_stops_when_the_client_does_not_read_and_goes_on_when_it_does(
    server: WireServer, endpoints: Endpoints
) -> None:
    state = {"written": 0, "drained": 0}

    def pour(exchange: Exchange) -> None:
        exchange.start(200, ())

        def more() -> None:
            state["drained"] += 1
            while state["written"] < 50_000_000:
                state["written"] += 100_000
                if not exchange.write(bytes(100_000)):
                    return
            exchange.end()

        exchange.on_drain = more
        more()

    server.call(lambda: endpoints.router.add("GET", "/pour", pour))
    with requests.get(server.url + "/pour", stream=True, timeout=30) as answer:
        assert server.call(lambda: state["written"]) < 50_000_000
        assert sum(map(len, answer.iter_content(1 << 20))) == 50_000_000
    assert state["drained"] > 1


def test_names_queries_and_headers_reach_the_endpoint(server: WireServer) -> None:
    assert requests.get(server.url + "/name/a%2Fb%20c", timeout=10).content == b"a/b c"
    assert requests.get(server.url + "/query?a=1&b=%20?", timeout=10).content == b"a=1&b=%20?"
    with server.connect() as client:
        client.send(b"GET /headers/x-a HTTP/1.1\r\nHost: x\r\nX-A: one\r\nOther: z\r\nx-a: two\r\n\r\n")
        assert client.receive_answer()[2] == b"one, two"


def test_unknown_paths_and_methods_say_so_and_keep_the_connection(server: WireServer) -> None:
    with requests.Session() as session:
        answer = session.post(server.url + "/nowhere", data=b"x" * 1000, timeout=10)
        assert (answer.status_code, answer.text) == (404, '{"error":"Not Found"}')
        assert answer.headers["content-type"] == "application/json"
        answer = session.delete(server.url + "/hello", timeout=10)
        assert (answer.status_code, answer.text) == (405, '{"error":"Method Not Allowed"}')
        answer = session.request("PROPFIND", server.url + "/hello", timeout=10)
        assert answer.status_code == 405
    assert server.context.counters.accepted == 1


def test_an_offer_to_upgrade_is_ignored(server: WireServer) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    with server.connect() as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + offer + b"Content-Length: 3\r\n\r\nabc")
        assert client.receive_answer()[2] == b"abc"
        body = b"z" * 100_000
        client.send(b"POST /echo HTTP/1.1\r\n" + offer + b"Content-Length: 100000\r\n\r\n" + body)
        assert client.receive_answer()[2] == body
        chunks = (b"2710\r\n" + b"y" * 10_000 + b"\r\n") * 3 + b"0\r\n\r\n"
        client.send(b"POST /echo HTTP/1.1\r\n" + offer + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
        assert client.receive_answer()[2] == b"y" * 30_000
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n" + offer + b"\r\nGET /name/b HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.receive_answer()[2] == b"hello"
        assert client.receive_answer()[2] == b"b"


def test_an_endpoint_that_raises_is_a_500_without_a_traceback(
    server: WireServer, caplog: pytest.LogCaptureFixture
) -> None:
    with requests.Session() as session:
        answer = session.get(server.url + "/raise", timeout=10)
        assert (answer.status_code, answer.json()) == (500, {"error": "internal error: ZeroDivisionError"})
        answer = session.get(server.url + "/coroutine-raise", timeout=10)
        assert (answer.status_code, answer.json()) == (500, {"error": "not today"})
        assert session.get(server.url + "/coroutine", timeout=10).text == "awaited"
    assert "secret detail" in caplog.text
    assert "Traceback" in caplog.text


def test_an_endpoint_that_raises_after_it_began_breaks_the_connection(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /raise-late HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not client.receive_all().endswith(b"0\r\n\r\n")


def test_an_endpoint_that_answers_twice_answers_once(server: WireServer, caplog: pytest.LogCaptureFixture) -> None:
    assert requests.get(server.url + "/twice", timeout=10).content == b"once"
    server.call(lambda: None)  # the log line comes after the answer
    assert "was answered already" in caplog.text


def test_a_header_with_a_line_break_is_never_sent(server: WireServer, endpoints: Endpoints) -> None:
    server.call(
        lambda: endpoints.router.add(
            "GET", "/split/{x}", lambda e: e.respond(200, ((b"x-id", e.params["x"].encode()),), b"")
        )
    )
    answer = requests.get(server.url + "/split/a%0D%0ASet-Cookie:%20b", timeout=10)
    assert answer.status_code == 500
    assert "set-cookie" not in answer.headers


def test_the_endpoint_learns_that_the_client_has_gone(server: WireServer, endpoints: Endpoints) -> None:
    client = server.connect()
    client.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
    while not server.call(lambda: list(endpoints.waiting)):
        pass
    client.close()
    server.wait_until_empty()
    assert endpoints.gone == ["/wait"]
    exchange = endpoints.waiting[0]
    assert exchange.disconnected
    server.call(lambda: exchange.respond(200, TEXT, b"to nobody"))
    assert exchange.ended
    assert endpoints.gone == ["/wait"]


def test_gates_run_before_every_endpoint_and_before_the_body(server: WireServer, endpoints: Endpoints) -> None:
    seen: list[str] = []

    def gate(exchange: Exchange) -> Refusal | None:
        seen.append(exchange.route)
        return None if exchange.headers.get(b"key") == b"open" else refusal(403, "no key")

    server.context.gates.append(gate)
    for path in ("/hello", "/nowhere", "/echo"):
        answer = requests.get(server.url + path, timeout=10)
        assert (answer.status_code, answer.json()) == (403, {"error": "no key"})
    assert seen == ["/hello", "", ""]
    assert requests.get(server.url + "/hello", headers={"key": "open"}, timeout=10).status_code == 200
    with server.connect() as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        status, headers, _ = client.receive_answer()
        assert (status, headers["connection"]) == (403, "close")


def test_a_gate_that_raises_lets_nobody_in(server: WireServer) -> None:
    server.context.gates.append(lambda exchange: 1 / 0)  # type: ignore[arg-type,return-value]
    assert requests.get(server.url + "/hello", timeout=10).status_code == 500


def test_every_answer_is_told_to_the_access_hook(server: WireServer) -> None:
    seen: list[tuple[str, str, int, int]] = []
    server.context.on_access = lambda e, status, size, grpc: seen.append((e.method, e.path, status, size))
    with requests.Session() as session:
        for path in ("/hello", "/nowhere", "/stream"):
            session.get(server.url + path, timeout=10)
    assert seen == [("GET", "/hello", 200, 5), ("GET", "/nowhere", 404, 21), ("GET", "/stream", 200, 20_006)]


def test_draining_closes_idle_connections_and_finishes_answers(server: WireServer, endpoints: Endpoints) -> None:
    with server.connect() as idle, server.connect() as silent, server.connect() as busy:
        idle.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        idle.receive_answer()
        busy.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        while not server.call(lambda: list(endpoints.waiting)):
            pass
        server.call(server.context.drain)
        assert idle.receive_all() == b""
        assert silent.receive_all() == b""
        server.call(lambda: endpoints.waiting[0].respond(200, TEXT, b"done"))
        status, headers, body = busy.receive_answer()
        assert (status, headers["connection"], body) == (200, "close", b"done")
        assert busy.receive_all() == b""


def test_draining_answers_what_was_sent_before(server: WireServer, endpoints: Endpoints) -> None:
    with server.connect() as client:
        client.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\nGET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        while not server.call(lambda: list(endpoints.waiting)):
            pass
        server.call(server.context.drain)
        server.call(lambda: endpoints.waiting[0].respond(200, TEXT, b"done"))
        assert client.receive_answer()[2] == b"done"
        status, headers, body = client.receive_answer()
        assert (status, headers["connection"], body) == (200, "close", b"hello")


def test_a_listener_that_closes_waits_for_answers_and_then_breaks_off(endpoints: Endpoints) -> None:
    with WireServer(endpoints.router) as server, server.connect() as client:
        client.send(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        while not server.call(lambda: list(endpoints.waiting)):
            pass
        server.run(server.listener.close(0.05))
        assert client.receive_all() == b""
        assert endpoints.gone == ["/wait"]
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_curl_gets_and_posts(server: WireServer, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not installed")
    upload = tmp_path / "upload"
    upload.write_bytes(bytes(range(256)) * 8000)

    def run(*arguments: str) -> bytes:
        return subprocess.run([curl, "-sS", "--max-time", "20", *arguments], check=True, capture_output=True).stdout

    assert run(server.url + "/hello", server.url + "/name/two") == b"hellotwo"
    assert run("--data-binary", f"@{upload}", server.url + "/echo") == upload.read_bytes()
    assert (
        run("-H", "Transfer-Encoding: chunked", "--data-binary", f"@{upload}", server.url + "/echo")
        == upload.read_bytes()
    )
    assert run("-H", "Expect: 100-continue", "-d", "body", server.url + "/echo") == b"body"
    assert run("-I", server.url + "/hello").startswith(b"HTTP/1.1 200 OK\r\n")
    assert run("--http1.0", server.url + "/stream") == b"onetwo" + b"x" * 20_000


def test_the_standard_library_s_client(server: WireServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for _ in range(2):
        connection.request("POST", "/echo", b"body", {"Content-Type": "text/plain"})
        assert connection.getresponse().read() == b"body"
    connection.close()


def test_a_unix_socket_and_a_left_behind_one(endpoints: Endpoints, tmp_path: Path) -> None:
    path = tmp_path / "doorstep.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with WireServer(endpoints.router, path=str(path)) as server, server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.receive_answer()[2] == b"hello"
        with (
            pytest.raises(Unavailable, match="is in use by another server"),
            WireServer(endpoints.router, path=str(path)),
        ):
            pass
    assert not path.exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "", "*"])
def test_a_listener_binds_where_it_is_told(endpoints: Endpoints, host: str) -> None:
    with WireServer(endpoints.router, host=host) as server, server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.receive_answer()[2] == b"hello"


def test_a_taken_port_is_named_with_the_option_that_changes_it(endpoints: Endpoints) -> None:
    with WireServer(endpoints.router) as server:
        second = WireServer(endpoints.router, port=server.port, option="--http-port")
        with pytest.raises(Unavailable) as caught, second:
            pass
        assert caught.value.message == (
            f"cannot listen for http: port {server.port} on 127.0.0.1 is already in use; "
            "choose another with --http-port, or stop what uses it"
        )


def test_a_port_can_be_used_again_at_once(endpoints: Endpoints) -> None:
    with WireServer(endpoints.router) as server, server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        client.receive_all()  # the server closes first, so that its side of the connection lingers
        port = server.port
    with WireServer(endpoints.router, port=port) as server:
        assert requests.get(server.url + "/hello", timeout=10).content == b"hello"


def test_servers_share_a_port_when_both_say_so(endpoints: Endpoints) -> None:
    with (
        WireServer(endpoints.router, reuse_port=True) as first,
        WireServer(endpoints.router, reuse_port=True, port=first.port) as second,
    ):
        assert first.port == second.port


def test_an_unknown_host_is_a_clear_error(endpoints: Endpoints) -> None:
    with (
        pytest.raises(InvalidArgument, match=r"cannot listen for http on no-such-host\.invalid:0"),
        WireServer(endpoints.router, host="no-such-host.invalid"),
    ):
        pass


def test_the_same_port_given_twice_is_one_listener() -> None:
    http = Address("http", "127.0.0.1", 8000)
    grpc = Address("grpc", "127.0.0.1", 8000, option="--grpc-port")
    metrics = Address("metrics", "127.0.0.1", 8002)
    assert share([http, grpc, metrics]) == [(http, ("http", "grpc")), (metrics, ("metrics",))]
    free = [Address("http"), Address("grpc")]  # port 0 is a different port each time
    assert len(share(free)) == 2
    with pytest.raises(InvalidArgument, match="'http' and 'grpc' both want"):
        share([http, Address("grpc", "127.0.0.1", 8000, reuse_port=True)])


def test_the_limit_on_connections_is_answered_with_503(endpoints: Endpoints) -> None:
    with WireServer(endpoints.router, WireLimits(connections=2)) as server:
        with server.connect() as first, server.connect() as second:
            for client in (first, second):
                client.send(b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
                client.receive_answer()
            with server.connect() as third:
                status, headers, _ = third.receive_answer()
                assert (status, headers["connection"]) == (503, "close")
            assert server.context.counters.refused == 1
        server.wait_until_empty()
        assert requests.get(server.url + "/hello", timeout=10).status_code == 200
