"""How the load loop tells one HTTP answer from the next, with answers written by hand."""

from __future__ import annotations

import select
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from doorstep.cli.bench.connection import FAILED, Lost
from doorstep.cli.bench.http import HttpConnection

REQUEST = b"POST /v2/models/m/infer HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"


def answer(body: bytes, status: bytes = b"200 OK", extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\n%scontent-length: %d\r\n\r\n%s" % (
        status, extra, len(body), body
    )  # fmt: skip


class Pair:
    """A connection of the load loop, and the server's end of it."""

    def __init__(self) -> None:
        ours, self.server = socket.socketpair()
        self.errors: Counter[str] = Counter()
        self.connection = HttpConnection(ours, select.poll(), self.errors, REQUEST)
        self.clock = 0

    def ask(self) -> int:
        """Sends the request; returns its start time."""
        self.clock += 1
        self.connection.start(self.clock)
        assert self.server.recv(65_536) == REQUEST
        return self.clock

    def tell(self, data: bytes) -> list[int]:
        """The server sends `data`; returns what is finished by it."""
        done: list[int] = []
        for start in range(0, len(data), 8192):
            self.server.sendall(data[start : start + 8192])
            self.connection.readable(done)
        return done


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair()
    yield found
    found.server.close()
    found.connection.close()


def test_the_same_answer_again_and_again(pair: Pair) -> None:
    for _ in range(4):
        started = pair.ask()
        assert pair.tell(answer(b'{"a":1}')) == [started]
        assert pair.connection.in_flight == 0
    assert pair.connection.bytes_in == 4 * len(answer(b'{"a":1}'))
    assert pair.connection.bytes_out == 4 * len(REQUEST)


def test_answers_whose_head_changes(pair: Pair) -> None:
    for size in (3, 4, 40_000, 4, 0, 40_000, 40_000):
        started = pair.ask()
        assert pair.tell(answer(b"x" * size)) == [started]


@pytest.mark.parametrize("size", [10, 5000])
def test_an_answer_in_pieces_of_any_size(pair: Pair, size: int) -> None:
    whole = answer(b"y" * size)
    for step in (1, 7, 50, len(whole) - 1):
        for _ in range(2):  # the first time it is new, then known
            started = pair.ask()
            done: list[int] = []
            for at in range(0, len(whole), step):
                assert not done
                done = pair.tell(whole[at : at + step])
            assert done == [started]


def test_an_answer_without_length_is_read_to_its_last_chunk(pair: Pair) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for size in (5, 9):
        started = pair.ask()
        assert pair.tell(head + b"%x\r\n%s\r\n" % (size, b"z" * size)) == []
        assert pair.tell(b"0\r\n\r\n") == [started]


def test_a_refusal_is_counted_by_its_text_and_is_no_latency(pair: Pair) -> None:
    for _ in range(2):
        pair.ask()
        assert pair.tell(answer(b'{"error":"Exceeds maximum queue size"}', b"503 Service Unavailable")) == [FAILED]
    started = pair.ask()
    assert pair.tell(answer(b"{}")) == [started]
    pair.ask()
    assert pair.tell(answer(b"{}", b"404 Not Found")) == [FAILED]
    assert pair.errors == {"503 Exceeds maximum queue size": 2, "404 {}": 1}


def test_a_last_answer_counts_before_the_connection_goes(pair: Pair) -> None:
    started = pair.ask()
    pair.server.sendall(answer(b"{}", extra=b"Connection: close\r\n"))
    done: list[int] = []
    with pytest.raises(Lost):
        pair.connection.readable(done)
    assert done == [started]
    assert pair.connection.in_flight == 0


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\ncontent-le", answer(b"abcdef")[:-3]])
def test_a_connection_that_ends_early_is_lost_with_its_request(pair: Pair, sent: bytes) -> None:
    pair.ask()
    assert pair.tell(sent) == []
    pair.server.shutdown(socket.SHUT_WR)
    with pytest.raises(Lost, match="closed"):
        pair.connection.readable([])
    assert pair.connection.in_flight == 1


def test_what_is_no_http_is_lost(pair: Pair) -> None:
    pair.ask()
    with pytest.raises(Lost, match=r"not an HTTP/1\.1 answer"):
        pair.tell(b"SSH-2.0-OpenSSH\r\n")


def test_a_request_larger_than_the_socket_takes_goes_out_in_pieces() -> None:
    ours, server = socket.socketpair()
    large = b"x" * 3_000_000
    poller = select.poll()
    connection = HttpConnection(ours, poller, Counter(), large)
    connection.start(1)
    received = 0
    while received < len(large):
        for _, events in poller.poll(0):
            if events & select.POLLOUT:
                connection.writable()
        received += len(server.recv(1 << 20))
    assert connection.bytes_out == received == len(large)
    assert not poller.poll(0), "it still waits to write"
    server.close()
    connection.close()
