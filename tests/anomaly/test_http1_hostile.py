"""Hostile and broken HTTP/1.1 clients: each gets an error or a closed connection, and the server goes on.

After every test the server still answers, and when the clients are gone nothing of them is left.
"""

from __future__ import annotations

import gzip
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from doorstep.testing.wire import RawClient, WireServer
from doorstep.wire.exchange import Exchange
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

TEXT = ((b"content-type", b"text/plain"),)
HOST = b"Host: x\r\n"
QUICK = WireLimits(
    header_timeout_s=0.1,
    body_timeout_s=0.1,
    idle_timeout_s=0.3,
    write_timeout_s=0.2,
    linger_timeout_s=0.1,
    body_bytes=1 << 20,
    arriving_bytes=4 << 20,
)


def make_router() -> Router:
    router = Router()
    router.add("GET", "/hello", lambda e: e.respond(200, TEXT, b"hello"))
    router.add("POST", "/echo", lambda e: e.respond(200, TEXT, e.body))
    router.add("POST", "/size", lambda e: e.respond(200, TEXT, b"%d" % len(e.body)))
    router.add("GET", "/large", lambda e: e.respond(200, TEXT, bytes(50_000_000)))

    def endless(exchange: Exchange) -> None:
        exchange.start(200, ())
        exchange.on_drain = lambda: exchange.write(bytes(1_000_000)) and None
        while exchange.write(bytes(1_000_000)):
            pass

    router.add("GET", "/endless", endless)
    return router


def still_well(server: WireServer) -> None:
    """The server answers others, and has forgotten those who left."""
    with server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        assert client.receive_all().endswith(b"\r\n\r\nhello")
    server.wait_until_empty()
    assert server.context.held_bytes == 0


@pytest.fixture
def server() -> Iterator[WireServer]:
    with WireServer(make_router()) as server:
        yield server
        still_well(server)


@pytest.fixture
def quick() -> Iterator[WireServer]:
    with WireServer(make_router(), QUICK) as server:
        yield server
        still_well(server)


def statuses(answers: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3, 3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: -1\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: 0x3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: 3 3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length:\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nContent-Length : 3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\n Content-Length: 3\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\nabc",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3 \r\nabc\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcdef\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\nabc\r\n",
        b"GET /hello HTTP/1.1\nHost: x\n\n",
        b"GET /hello HTTP/1.1\r\nA: b\nC: d\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nA: b\rC: d\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nA: b\r\n\tfolded\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nA: b\0c\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nA\0: b\r\n\r\n",
        b"GET /hello HTTP/1.1\r\n: b\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nnonsense\r\n\r\n",
        b"GET /hello\0 HTTP/1.1\r\n\r\n",
        b"GET /hel\tlo HTTP/1.1\r\n\r\n",
        b"GET /h\xc3\xa9llo HTTP/1.1\r\n\r\n",
        b"GET hello HTTP/1.1\r\n\r\n",
        b"CONNECT elsewhere:443 HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"GET /hello HTTP/1.1 \r\n\r\n",
        b"GET /hello HTTP/1.2\r\n\r\n",
        b"GET /hello HTTP/2.0\r\n\r\n",
        b"GET /hello HTTP/0.9\r\n\r\n",
        b"GET /hello\r\n\r\n",
        b"get /hello HTTP/1.1\r\n\r\n",
        b"BREW /hello HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"\x00" * 100,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_and_nothing_behind_it_is_heard(
    server: WireServer, request_bytes: bytes
) -> None:
    with server.connect() as client:
        client.send_until_refused(request_bytes + b"GET /hello HTTP/1.1\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n")
        answers = client.receive_all()
    assert len(statuses(answers)) == 1, answers
    assert statuses(answers)[0] in (400, 501, 505), answers
    assert b"connection: close\r\n" in answers
    assert re.search(rb'\r\n\r\n\{"error":"[^"]+"\}$', answers), answers


def test_a_bad_request_does_not_take_the_answers_before_it_away(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\n\r\nGET /hello HTTP/1.1\r\n\r\nnonsense\r\n\r\n")
        assert statuses(client.receive_all()) == [200, 200, 400]


def test_bytes_behind_connection_close_are_ignored(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\nConnection: close\r\n\r\nGET /hello HTTP/1.1\r\n\r\n")
        assert statuses(client.receive_all()) == [200]


def test_a_content_length_that_promises_too_little_makes_the_rest_a_new_request(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcdefgh\r\n\r\n")
        assert statuses(client.receive_all()) == [200, 400]


def test_a_content_length_that_promises_too_much_times_out(quick: WireServer) -> None:
    for size in (100, 100_000):
        with quick.connect() as client:
            client.send(b"POST /echo HTTP/1.1\r\nContent-Length: %d\r\n\r\nabc" % size)
            assert statuses(client.receive_all()) == [408]


def test_too_many_or_too_large_headers_are_refused(server: WireServer) -> None:
    fields = b"".join(b"x-%d: y\r\n" % number for number in range(257))
    repeated = b"a: b\r\n" * 100_000
    for head, status in (
        (b"GET /hello HTTP/1.1\r\n" + fields + b"\r\n", 431),
        (b"GET /hello HTTP/1.1\r\n" + repeated + b"\r\n", 431),
        (b"GET /hello HTTP/1.1\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /hello HTTP/1.1\r\n" + b"x" * 70_000 + b": y\r\n\r\n", 431),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /hello HTTP/1.1\r\nx: " + b"y" * 10_000_000, 431),
    ):
        with server.connect() as client:
            client.send_until_refused(head)
            assert statuses(client.receive_all())[:1] == [status], head[:40]


def test_headers_at_the_limits_are_accepted(server: WireServer) -> None:
    fields = b"".join(b"x-%d: y\r\n" % number for number in range(256))
    for head in (
        b"GET /hello HTTP/1.1\r\n" + fields + b"\r\n",
        b"GET /hello HTTP/1.1\r\nx: " + b"y" * 65_000 + b"\r\n\r\n",
    ):
        with server.connect() as client:
            client.send(head)
            assert client.receive_answer()[0] == 200


def test_a_body_declared_too_large_is_refused_before_it_is_sent(server: WireServer) -> None:
    with server.connect() as client:
        client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 67108865\r\n\r\n")
        status, headers, body = client.receive_answer()
    assert (status, headers["connection"]) == (400, "close")
    assert body == (
        b'{"error":"Request body size of 67108865 bytes exceeds the maximum allowed input size of 67108864 bytes. '
        b'Use --http-max-input-size to increase the limit."}'
    )


def test_a_client_that_sends_its_refused_body_all_the_same_still_gets_the_answer(server: WireServer) -> None:
    answer = requests.post(server.url + "/echo", data=bytes(70_000_000), timeout=30)
    assert answer.status_code == 400


def test_a_chunked_body_that_grows_too_large_is_refused(quick: WireServer) -> None:
    with quick.connect() as client:
        client.send_until_refused(b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.send_until_refused((b"10000\r\n" + bytes(65_536) + b"\r\n") * 40)
        assert statuses(client.receive_all())[:1] == [400]


def test_two_hundred_thousand_tiny_chunks_are_refused_as_triton_refuses_them(server: WireServer) -> None:
    with server.connect() as client:
        client.send_until_refused(
            b"POST /size HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 200_000
        )
        status, headers, body = client.receive_answer()
    assert (status, headers["connection"]) == (400, "close")
    assert body == (
        b'{"error":"Chunked request body exceeds maximum of 65536 non-empty chunks. Send fewer or larger HTTP chunks."}'
    )


def test_as_many_chunks_as_are_allowed_are_accepted(server: WireServer) -> None:
    with server.connect() as client:
        client.send(
            b"POST /size HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 65_536 + b"0\r\n\r\n"
        )
        assert client.receive_answer()[2] == b"65536"


@pytest.mark.parametrize("filler", [b"1;" + b"e" * 1000, b"0\r\n" + b"t: r\r\n", b"1;e=" + b"e" * 10_000_000])
def test_a_chunked_body_that_is_mostly_framing_is_refused(server: WireServer, filler: bytes) -> None:
    with server.connect() as client:
        client.send_until_refused(b"POST /size HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        if filler.startswith(b"0"):
            client.send_until_refused(b"0\r\n" + b"trailer: value\r\n" * 1_000_000)
        else:
            client.send_until_refused((filler + b"\r\nx\r\n") * 20_000 if len(filler) < 10_000 else filler)
        assert statuses(client.receive_all())[:1] == [400]


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compression_bomb_is_refused(server: WireServer, coding: str) -> None:
    bomb = gzip.compress(bytes(100 << 20), compresslevel=9)
    answer = requests.post(server.url + "/size", data=bomb, headers={"Content-Encoding": coding}, timeout=30)
    assert answer.status_code == 400
    assert answer.json() == {
        "error": "Decompressed data size exceeds the maximum allowed value of 67108864 bytes. "
        "Use --http-max-input-size to increase the limit."
    }


def test_a_body_that_is_not_what_its_coding_says_is_refused_and_the_connection_kept(server: WireServer) -> None:
    with requests.Session() as session:
        for body in (b"plain", b"", gzip.compress(b"x" * 10_000_000)[:-5], b"x" * 10_000):
            answer = session.post(server.url + "/size", data=body, headers={"Content-Encoding": "gzip"}, timeout=30)
            assert answer.status_code == 400
    assert server.context.counters.accepted == 1


def test_a_client_that_never_finishes_its_head_is_told_and_closed(quick: WireServer) -> None:
    with quick.connect() as client:
        client.send(b"GET /hello HTTP/1.1\r\nHost")
        assert statuses(client.receive_all()) == [408]
    assert quick.context.counters.timeouts == 1


def drip(client: RawClient, head: bytes, byte: bytes) -> bytes:
    """Sends `byte` again and again until the server has had enough."""
    client.sock.settimeout(0.01)
    answers = b""
    try:
        client.send(head)
        while True:
            client.send(byte)
            try:
                data = client.sock.recv(65_536)
                if not data:
                    return answers
                answers += data
            except TimeoutError:
                continue
    except (BrokenPipeError, ConnectionResetError):
        return answers


def test_a_client_that_drips_its_head_is_closed(quick: WireServer) -> None:
    with quick.connect() as client:
        assert statuses(drip(client, b"GET /hello HTTP/1.1\r\n", b"a: b\r\n")) == [408]


@pytest.mark.parametrize("size", [5000, 500_000])
def test_a_client_that_drips_its_body_is_closed(quick: WireServer, size: int) -> None:
    with quick.connect() as client:
        assert statuses(drip(client, b"POST /echo HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size, b"x")) == [408]


def test_a_client_that_drips_chunks_is_closed(quick: WireServer) -> None:
    with quick.connect() as client:
        head = b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert statuses(drip(client, head, b"1\r\nx\r\n")) == [408]


def test_clients_that_say_nothing_are_closed(quick: WireServer) -> None:
    clients = [quick.connect() for _ in range(20)]
    clients[0].send(b"GET /hello HTTP/1.1\r\n\r\n")
    clients[1].send(b"\r\n\r\n")
    clients[2].send(b"PRI * HT")
    quick.wait_until_empty()
    for client in clients:
        client.close()


@pytest.mark.parametrize("path", [b"/large", b"/endless"])
def test_a_client_that_never_reads_is_closed(quick: WireServer, path: bytes) -> None:
    with quick.connect() as client:
        client.send(b"GET %b HTTP/1.1\r\n\r\n" % path)
        quick.wait_until_empty()
    assert quick.context.counters.timeouts == 1


def test_a_client_that_pipelines_and_never_reads_is_stopped_and_closed(quick: WireServer) -> None:
    requests_bytes = b"POST /echo HTTP/1.1\r\nContent-Length: 4000\r\n\r\n" + bytes(4000)
    with quick.connect() as client:
        client.sock.setblocking(False)
        sent = 0
        try:
            while sent < 100_000_000:
                sent += client.sock.send(requests_bytes * 100)
        except (BlockingIOError, ConnectionError):
            pass
        assert sent < 100_000_000
        quick.wait_until_empty()


def test_a_flood_of_pipelined_requests_is_answered_in_order(server: WireServer) -> None:
    count = 50_000
    with server.connect() as client:
        client.sock.setblocking(True)
        request = b"GET /hello HTTP/1.1\r\n\r\n"
        total = len(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello")
        received = 0
        for _ in range(count // 1000):
            client.send(request * 1000)
            received += len(client.receive_exactly(total * 1000))
        assert received == total * count


def test_connections_that_come_and_go_leave_nothing(server: WireServer) -> None:
    for number in range(300):
        client = server.connect()
        match number % 4:
            case 1:
                client.send(b"GET /hel")
            case 2:
                client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 100000\r\n\r\nabc")
            case 3:
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")  # reset, not close
                client.send(b"GET /hello HTTP/1.1\r\n\r\n")
        client.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_promises_of_large_bodies_cost_no_memory(server: WireServer) -> None:
    before = resident_bytes()
    clients = [server.connect() for _ in range(200)]
    for client in clients:
        client.send(b"POST /echo HTTP/1.1\r\nContent-Length: 67108864\r\n\r\n" + b"x" * 100)
    for client in clients:
        client.send(b"y")
    while server.call(lambda: server.context.held_bytes) < 200 * 101:
        pass
    assert resident_bytes() - before < 64 << 20  # 200 times 64 MiB were promised
    for client in clients:
        client.close()


def test_large_bodies_that_really_arrive_are_bounded_together(quick: WireServer) -> None:
    clients = [quick.connect() for _ in range(6)]
    for client in clients[:5]:
        client.send_until_refused(b"POST /echo HTTP/1.1\r\nContent-Length: 1048576\r\n\r\n" + bytes(1_000_000))
    answers = b"".join(client.receive_all() for client in clients[:5])
    assert 503 in statuses(answers)
    for client in clients:
        client.close()


def test_running_out_of_file_descriptors_costs_no_processor_time_and_passes() -> None:
    code = """
import asyncio, resource, sys, time, uvloop
from doorstep.wire.context import ListenerContext
from doorstep.wire.listener import Address, Listener
from doorstep.wire.router import Router

async def main():
    router = Router()
    router.add("GET", "/cpu", lambda e: e.respond(200, (), str(time.process_time()).encode()))
    listener = Listener(ListenerContext("http", router), Address("http"))
    await listener.open()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    print(listener.port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await listener.close(0)

uvloop.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    port = int(process.stdout.readline())
    first = socket.create_connection(("127.0.0.1", port))

    def processor_time_s() -> float:
        first.sendall(b"GET /cpu HTTP/1.1\r\n\r\n")
        return float(first.recv(10_000).rpartition(b"\r\n\r\n")[2])

    processor_time_s()
    crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    begin_cpu_s, begin_s = processor_time_s(), time.monotonic()
    while time.monotonic() - begin_s < 0.5:  # the span measured, not a wait for something
        first.sendall(b"GET /cpu HTTP/1.1\r\n\r\n")
        first.recv(10_000)
        time.sleep(0.05)
    assert processor_time_s() - begin_cpu_s < 0.25
    for sock in crowd:
        sock.close()
    while True:  # the descriptors come back as the server notices
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET /cpu HTTP/1.1\r\n\r\n")
            try:
                if client.recv(10_000).startswith(b"HTTP/1.1 200"):
                    break
            except ConnectionResetError:
                continue
    first.close()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors.count(b"\n") < 50, errors.decode()


SEEDS = [
    b"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabcde",
    b"POST /echo HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: x\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nab",
    b"POST /size HTTP/1.1\r\nContent-Encoding: gzip\r\nContent-Length: 23\r\n\r\n" + gzip.compress(b"abc", mtime=0),
    b"GET /hello HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"GET /hello HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    b"POST /echo HTTP/1.1\r\nContent-Length: 70000\r\n\r\n" + b"z" * 70_000,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
]
TOKENS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b":",
    b"0",
    b"-1",
    b"99999999999",
    b"chunked",
    b"Content-Length: 4\r\n",
    b";",
    b"\xff",
]


def mutate(random_: random.Random, data: bytearray) -> bytes:
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(min(len(data), 300)) if data else 0
        match random_.randrange(5):
            case 0:
                data[at : at + 1] = bytes([random_.randrange(256)])
            case 1:
                del data[at : at + random_.randint(1, 8)]
            case 2:
                data[at:at] = random_.choice(TOKENS)
            case 3:
                data[at:at] = data[at : at + random_.randint(1, 40)]
            case 4:
                data += random_.choice(SEEDS)
    return bytes(data)


def test_mutated_requests_neither_stick_nor_break_the_server() -> None:
    random_ = random.Random(20250807)
    end_s = time.monotonic() + 8.0
    count = 0
    with WireServer(make_router(), QUICK) as server:
        while time.monotonic() < end_s and count < 4000:
            with server.connect() as client:
                stream = b"".join(
                    mutate(random_, bytearray(random_.choice(SEEDS))) for _ in range(random_.randint(1, 3))
                )
                cut = random_.randrange(len(stream)) if stream else 0
                client.send_until_refused(stream[:cut])
                client.send_until_refused(stream[cut:])
                try:
                    client.sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                client.receive_all()  # ends: the server closes, whatever it was sent
            count += 1
        still_well(server)
    assert count > 100
