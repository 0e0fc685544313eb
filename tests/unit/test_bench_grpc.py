"""The load loop's gRPC against a server made of ngh2: a real peer for what is sent as bytes and recognised as bytes."""

from __future__ import annotations

import select
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import ngh2
import pytest

from doorstep.cli.bench.connection import FAILED, Lost
from doorstep.cli.bench.grpc import GrpcConnection
from doorstep.cli.bench.grpc_wire import framed, request_fields
from doorstep.cli.bench.hpack_blocks import leaves_table_alone

FIELDS = request_fields("host:1", "/inference.GRPCInferenceService/ModelInfer")
HEAD = [(b":status", b"200"), (b"content-type", b"application/grpc")]
OK = [(b"grpc-status", b"0")]


class Pair:
    """The load loop's end of a connection, and a server's, driven step by step."""

    def __init__(self, message: bytes = b"m" * 100, settings: dict[ngh2.Setting, int] | None = None) -> None:
        ours, self.socket = socket.socketpair()
        self.socket.setblocking(False)
        self.errors: Counter[str] = Counter()
        self.message = framed(message)
        self.connection = GrpcConnection(ours, select.poll(), self.errors, fields=FIELDS, message=self.message)
        self.server = ngh2.Connection(ngh2.Role.SERVER)
        self.server.initiate_connection(settings or {})
        self.requests: dict[int, bytearray] = {}  # stream → body, of those not yet answered
        self.finished: list[int] = []
        self.heard: list[list[tuple[bytes, bytes]]] = []
        self.clock = 0
        self.step()

    def step(self) -> None:
        """Carries what either end has to say to the other until both are silent."""
        silent = 0
        while silent < 2:
            silent = silent + 1 if not (self._to_server() | self._to_client()) else 0

    def _to_server(self) -> bool:
        self.connection.writable()
        try:
            data = self.socket.recv(1 << 20)
        except BlockingIOError:
            return False
        if not data:
            return False
        self.server.receive_data(data)
        for event in self.server.events():
            if isinstance(event, ngh2.RequestReceived):
                self.heard.append([(bytes(n), bytes(v)) for n, v in event.headers])
                self.requests[event.stream_id] = bytearray()
            elif isinstance(event, ngh2.DataReceived):
                self.requests[event.stream_id] += event.data
        return True

    def _to_client(self, limit: int = 1 << 30) -> bool:
        data = self.server.data_to_send()
        for start in range(0, len(data), limit):
            self.socket.sendall(data[start : start + limit])
            while select.select((self.connection.sock,), (), (), 0)[0]:
                self.connection.readable(self.finished)
        return bool(data)

    def ask(self) -> int:
        self.clock += 1
        self.connection.start(self.clock)
        self.step()
        return self.clock

    def answer(
        self, body: bytes = b"answer", trailers: list[tuple[bytes, bytes]] | None = None, limit: int = 1 << 30
    ) -> list[int]:
        """Answers the oldest request; returns the start times of what is finished then."""
        stream = min(self.requests)
        assert bytes(self.requests.pop(stream)) == self.message
        self.server.send_response(stream, HEAD)
        self.server.send_data(stream, framed(body))
        self.server.send_trailers(stream, OK if trailers is None else trailers)
        self._to_client(limit)
        self.step()
        return self.take()

    def take(self) -> list[int]:
        done, self.finished = self.finished, []
        return done

    @property
    def by_bytes(self) -> bool:
        return bool(self.connection._template)

    def warmed_up(self) -> Pair:
        """After enough calls for the connection to have gone over to bytes."""
        for _ in range(3):
            started = self.ask()
            assert self.answer() == [started]
        assert self.by_bytes
        return self


@pytest.fixture
def make_pair() -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(*args: Any) -> Pair:
        made.append(Pair(*args))
        return made[-1]

    yield make
    for pair in made:
        pair.connection.close()
        pair.socket.close()


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    return make_pair()


def test_calls_look_the_same_to_the_server_whoever_writes_them(pair: Pair) -> None:
    pair.warmed_up()
    for _ in range(5):
        started = pair.ask()
        assert pair.answer() == [started]
    assert pair.heard == [FIELDS] * 8
    assert not pair.errors
    assert pair.connection.in_flight == 0


@pytest.mark.parametrize("limit", [1, 5, 9, 10, 13, 1000])
def test_answers_may_come_in_pieces(pair: Pair, limit: int) -> None:
    pair.warmed_up()
    for size in (0, 7, 3000):
        started = pair.ask()
        assert pair.answer(b"x" * size, limit=limit) == [started]


def test_an_error_is_counted_with_its_text_and_the_connection_goes_on(pair: Pair) -> None:
    pair.warmed_up()
    for _ in range(3):
        pair.ask()
        assert pair.answer(trailers=[(b"grpc-status", b"14"), (b"grpc-message", b"queue%20full")]) == [FAILED]
        started = pair.ask()
        assert pair.answer() == [started]
    assert pair.errors == {"grpc-status 14 queue full": 3}


def test_an_error_without_a_message_of_its_own_is_an_error_too(pair: Pair) -> None:
    pair.warmed_up()
    for _ in range(2):
        pair.ask()
        stream = min(pair.requests)
        del pair.requests[stream]
        fields = [*HEAD, (b"grpc-status", b"5"), (b"grpc-message", b"no model")]
        pair.server.send_response(stream, fields, end_stream=True)
        pair.step()
        assert pair.take() == [FAILED]
        started = pair.ask()
        assert pair.answer() == [started]
    assert pair.errors == {"grpc-status 5 no model": 2}


def test_header_tables_that_change_midway_are_followed(pair: Pair) -> None:
    pair.warmed_up()
    for number in range(60):  # each new field pushes the others along in HPACK's table, and old ones out
        started = pair.ask()
        trailers = [(b"grpc-status", b"0"), (b"x-number", b"%d" % number), (b"x-long", b"y" * number * 9)]
        assert pair.answer(trailers=trailers) == [started]
        started = pair.ask()
        assert pair.answer() == [started]
    assert not pair.errors


def test_several_calls_at_once_are_told_apart(pair: Pair) -> None:
    pair.warmed_up()
    started = [pair.ask() for _ in range(6)]
    assert pair.connection.in_flight == 6
    assert [pair.answer() for _ in range(6)] == [[time] for time in started]


def test_calls_begun_before_the_change_end_after_it(pair: Pair) -> None:
    first = [pair.ask() for _ in range(4)]
    assert [pair.answer() for _ in range(3)] == [[time] for time in first[:3]]
    assert pair.by_bytes
    later = pair.ask()
    assert pair.answer() == [first[3]]
    assert pair.answer() == [later]


def test_a_reset_stream_is_an_error(pair: Pair) -> None:
    pair.warmed_up()
    pair.ask()
    stream = min(pair.requests)
    del pair.requests[stream]
    pair.server.reset_stream(stream, int(ngh2.ErrorCode.REFUSED_STREAM))
    pair.step()
    assert pair.take() == [FAILED]
    assert pair.errors == {"stream reset by the server (HTTP/2 error 7)": 1}


def test_a_server_that_says_goodbye_is_left_when_all_is_answered(pair: Pair) -> None:
    pair.warmed_up()
    started = pair.ask()
    pair.server.send_goaway()
    pair.step()
    stream = min(pair.requests)
    pair.server.send_response(stream, HEAD)
    pair.server.send_data(stream, framed(b"last"))
    pair.server.send_trailers(stream, OK)
    with pytest.raises(Lost, match="GOAWAY"):
        pair._to_client()
    assert pair.take() == [started]


@pytest.mark.parametrize("size", [1_000, 30_000, 40_000, 200_000])
def test_large_messages_wait_for_the_servers_window(make_pair: Callable[..., Pair], size: int) -> None:
    """A stream's window has room for a message; the connection's, 65,535 bytes, must be opened again and again."""
    pair = make_pair(b"z" * size, {ngh2.Setting.INITIAL_WINDOW_SIZE: 1 << 20})
    pair.warmed_up()
    started = [pair.ask() for _ in range(5)]
    assert pair.connection.in_flight == 5
    finished: list[int] = []
    while len(finished) < 5:
        finished += pair.answer(b"w" * 100_000)
    assert finished == started


def test_pings_are_answered(pair: Pair) -> None:
    pair.warmed_up()
    pair.server.ping(b"12345678")
    pair._to_client()
    pair.server.receive_data(pair.socket.recv(4096))
    assert any(isinstance(event, ngh2.PingAcknowledged) for event in pair.server.events())


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (b"\x88", True),  # RFC 7541, C.2.4's kind: an indexed field
        (bytes.fromhex("400a637573746f6d2d6b65790d637573746f6d2d686561646572"), False),  # C.2.1: to be indexed
        (bytes.fromhex("040c2f73616d706c652f70617468"), True),  # C.2.2: without indexing
        (bytes.fromhex("100870617373776f726406736563726574"), True),  # C.2.3: never indexed
        (bytes.fromhex("828684418cf1e3c2e5f23a6ba0ab90f4ff"), False),  # C.4.1: three indexed, one to be indexed
        (bytes.fromhex("3fe11f88"), False),  # a new size for the table
        (b"\x04\x0c/sam", False),  # cut off
        (b"", True),
    ],
)
def test_blocks_that_change_the_table_are_known_by_their_first_bits(block: bytes, expected: bool) -> None:
    assert leaves_table_alone(block) is expected
