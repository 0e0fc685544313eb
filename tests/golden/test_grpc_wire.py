"""gRPC as grpcio speaks it: a real client for every rule of the protocol the server has to keep."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from test_tls import Authority

from doorstep import proto
from doorstep.errors import InvalidArgument, NotFound, Unavailable
from doorstep.protocols import grpc_health, grpc_reflection
from doorstep.testing.http2_client import DATA, END_STREAM, Http2Client, frame, request
from doorstep.testing.wire import WireServer
from doorstep.wire.answers import refusal
from doorstep.wire.exchange import Exchange, Refusal
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.grpc_call import StreamCall, UnaryCall
from doorstep.wire.grpc_compression import CompressionLevel
from doorstep.wire.http2_exchange import Http2Exchange
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router
from doorstep.wire.tls import TlsOptions

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
PATIENCE_S = 20.0


class Service:
    """Methods, and what they saw."""

    def __init__(self, **options: Any) -> None:
        self.waiting: list[Any] = []
        self.calls: list[Any] = []
        self.statuses: list[int | None] = []  # of calls that were answered, in order
        self.cancelled = threading.Event()
        self.called = threading.Event()
        self.grpc = server = GrpcServer(**options)
        server.add_unary("/test.Test/Echo", self.echo)
        server.add_unary(
            "/test.Test/Parts", lambda call: call.respond((b"ab", memoryview(b"c" * 50_000), bytearray(b"d")))
        )
        server.add_unary("/test.Test/Metadata", self.metadata)
        server.add_unary("/test.Test/Wait", self.wait)
        server.add_unary("/test.Test/Fail", self.fail)
        server.add_unary("/test.Test/Refuse", lambda call: call.fail(9, bytes(call.message).decode()))
        server.add_unary("/test.Test/Coroutine", self.coroutine)
        server.add_stream("/test.Test/Stream", self.stream)
        server.add_stream("/test.Test/Late", self.late)
        server.add_stream("/test.Test/Count", self.count)
        server.add_stream("/test.Test/WaitStream", self.wait_stream)
        server.add_stream("/test.Test/FailStream", self.fail_stream)
        self.router = Router()
        self.router.add("GET", "/hello", lambda e: e.respond(200, (), b"hello"))
        server.install(self.router)

    def echo(self, call: UnaryCall) -> None:
        self.calls.append(call)
        call.respond(call.message)

    def metadata(self, call: UnaryCall) -> None:
        call.initial_metadata = [(b"x-initial", call.metadata[b"x-key"])]
        call.trailing_metadata = [(b"x-trailing-bin", call.metadata[b"x-bytes-bin"])]
        call.respond(b"")

    def wait(self, call: UnaryCall) -> None:
        call.on_cancel = self.cancelled.set
        self.waiting.append(call)
        self.called.set()

    def fail(self, call: UnaryCall) -> None:
        raise {
            b"not found": NotFound("no such thing: ÄÖ%\n"),
            b"invalid": InvalidArgument("bad"),
            b"unavailable": Unavailable("later"),
            b"bug": RuntimeError("secret"),
        }[bytes(call.message)]

    async def coroutine(self, call: UnaryCall) -> None:
        if call.message == b"wait":
            self.called.set()
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if call.message == b"raise":
            raise RuntimeError("secret")
        call.respond(call.message)

    def stream(self, call: StreamCall) -> None:
        """Everything back, as it comes."""
        self.calls.append(call)
        call.on_half_close = call.finish
        call.on_message = lambda message: call.send(message) and None

    async def late(self, call: StreamCall) -> None:
        """Is interested only after the messages have come."""
        messages: list[bytes] = []
        ended = asyncio.Event()
        call.on_half_close = ended.set
        call.on_message = lambda message: messages.append(bytes(message))
        await ended.wait()
        call.send(b",".join(messages))
        call.finish()

    def count(self, call: StreamCall) -> None:
        """As many messages of 100,000 bytes as the client asks for, never more than it reads."""

        def begin(message: Any) -> None:
            self.left = int(bytes(message))
            go_on()

        def go_on() -> None:
            while self.left:
                self.left -= 1
                if not call.send(bytes(100_000)):
                    return
            call.finish()

        call.on_drain = go_on
        call.on_message = begin

    def wait_stream(self, call: StreamCall) -> None:
        call.on_cancel = self.cancelled.set
        call.on_message = lambda message: self.called.set()

    def fail_stream(self, call: StreamCall) -> None:
        def on_message(message: Any) -> None:
            call.send(message)
            if message == b"bug":
                raise RuntimeError("secret")
            call.trailing_metadata = [(b"x-why", b"because")]
            call.finish(8, "enough")

        call.on_message = on_message


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def server(service: Service) -> Iterator[WireServer]:
    server = WireServer(service.router, name="grpc")
    server.context.on_access = lambda exchange, status, size, grpc_status: service.statuses.append(grpc_status)
    with server:
        yield server
        server.wait_until_empty()
        assert server.context.held_bytes == 0
        assert server.call(lambda: len(service.grpc.deadlines)) == 0


@pytest.fixture
def channel(server: WireServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=UNLIMITED) as channel:
        yield channel


def unary(channel: grpc.Channel, method: str) -> Callable[..., Any]:
    call = channel.unary_unary(f"/test.Test/{method}")
    return lambda message=b"", **options: call(message, **{"timeout": PATIENCE_S, **options})


def stream(channel: grpc.Channel, method: str) -> Callable[..., Any]:
    call = channel.stream_stream(f"/test.Test/{method}")
    return lambda messages, **options: call(iter(messages), **{"timeout": PATIENCE_S, **options})


def error_of(call: Callable[..., Any], *args: Any, **options: Any) -> grpc.RpcError:
    try:
        result = call(*args, **options)
        if not isinstance(result, bytes):
            list(result)
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"no error, but {result!r}")


# Unary calls


@pytest.mark.parametrize("size", [0, 1, 16_378, 16_379, 16_380, 65_536, 602_112, 9_000_000, 40_000_000])
def test_message_of_any_size_comes_back(channel: grpc.Channel, size: int) -> None:
    message = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    assert unary(channel, "Echo")(message) == message


def test_answer_may_be_several_buffers(channel: grpc.Channel) -> None:
    assert unary(channel, "Parts")() == b"ab" + b"c" * 50_000 + b"d"


def test_hundred_calls_at_once_get_their_own_answers(channel: grpc.Channel) -> None:
    echo = channel.unary_unary("/test.Test/Echo")
    messages = [os.urandom(1 + 997 * i) for i in range(100)]
    futures = [echo.future(message, timeout=PATIENCE_S) for message in messages]
    assert [future.result() for future in futures] == messages


def test_metadata_goes_both_ways(channel: grpc.Channel) -> None:
    call = channel.unary_unary("/test.Test/Metadata")
    _, done = call.with_call(b"", metadata=(("x-key", "value"), ("x-bytes-bin", b"\x00\xff\x01")), timeout=PATIENCE_S)
    assert ("x-initial", "value") in done.initial_metadata()
    assert ("x-trailing-bin", b"\x00\xff\x01") in done.trailing_metadata()


@pytest.mark.parametrize(
    ("message", "code", "details"),
    [
        (b"not found", grpc.StatusCode.NOT_FOUND, "no such thing: ÄÖ%\n"),
        (b"invalid", grpc.StatusCode.INVALID_ARGUMENT, "bad"),
        (b"unavailable", grpc.StatusCode.UNAVAILABLE, "later"),
        (b"bug", grpc.StatusCode.INTERNAL, "internal error: RuntimeError"),
    ],
)
def test_exception_becomes_its_status(
    channel: grpc.Channel, message: bytes, code: grpc.StatusCode, details: str
) -> None:
    error = error_of(unary(channel, "Fail"), message)
    assert (error.code(), error.details()) == (code, details)


def test_handler_may_choose_status_and_text(channel: grpc.Channel) -> None:
    error = error_of(unary(channel, "Refuse"), "größer als 100 %".encode())
    assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "größer als 100 %")


def test_very_long_error_text_arrives_cut(channel: grpc.Channel) -> None:
    error = error_of(unary(channel, "Refuse"), "ä".encode() * 10_000)
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert error.details().startswith("ääää")


def test_unknown_method_is_unimplemented(channel: grpc.Channel) -> None:
    error = error_of(unary(channel, "Nothing"))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    error = error_of(stream(channel, "Nothing"), [b"x"])
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


def test_unary_method_called_with_two_messages_or_none_is_unimplemented(channel: grpc.Channel) -> None:
    call = channel.stream_unary("/test.Test/Echo")
    for messages in ([], [b"a", b"b"], [b"a" * 20_000, b"b"]):
        error = error_of(call, iter(messages), timeout=PATIENCE_S)
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED, messages


def test_coroutine_handler_answers_fails_and_is_cancelled(channel: grpc.Channel, service: Service) -> None:
    coroutine = unary(channel, "Coroutine")
    assert coroutine(b"x") == b"x"
    assert error_of(coroutine, b"raise").details() == "internal error: RuntimeError"
    future = channel.unary_unary("/test.Test/Coroutine").future(b"wait")
    assert service.called.wait(PATIENCE_S)
    future.cancel()
    assert service.cancelled.wait(PATIENCE_S)


# Deadlines and cancellation


def test_handler_hears_that_the_client_has_cancelled(channel: grpc.Channel, service: Service) -> None:
    future = channel.unary_unary("/test.Test/Wait").future(b"")
    assert service.called.wait(PATIENCE_S)
    future.cancel()
    assert service.cancelled.wait(PATIENCE_S)
    service.waiting[0].respond(b"nobody hears this")


def test_handler_knows_the_deadline(channel: grpc.Channel, service: Service) -> None:
    unary(channel, "Echo")(b"", timeout=10)
    (call,) = service.calls
    assert 9e9 < call.deadline_ns - call.exchange.received_ns <= 10.1e9
    channel.unary_unary("/test.Test/Echo")(b"")
    assert service.calls[1].deadline_ns == 0


def test_server_ends_a_call_whose_deadline_has_passed(server: WireServer, service: Service) -> None:
    """A client without a timer of its own: frames by hand, so that it is the server that ends the call."""
    with server.connect() as raw:
        client = Http2Client(raw)
        extra = ((b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-timeout", b"50m"))
        client.send(request(1, b"/test.Test/Wait", b"\0\0\0\0\0", extra=extra))
        assert client.answer(1) == (200, b"")
        assert service.cancelled.is_set()
    assert service.statuses == [4], "DEADLINE_EXCEEDED"


def test_deadline_also_ends_a_stream(channel: grpc.Channel, service: Service) -> None:
    error = error_of(stream(channel, "WaitStream"), [b"x"], timeout=0.2)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert service.cancelled.wait(PATIENCE_S)


@pytest.mark.parametrize("timeout", [b"", b"5", b"m", b"123456789m", b"1x", b"-1m", b"1.5S"])
def test_malformed_timeout_is_an_error(server: WireServer, service: Service, timeout: bytes) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        extra = ((b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-timeout", timeout))
        client.send(request(1, b"/test.Test/Echo", b"\0\0\0\0\1x", extra=extra))
        assert client.answer(1) == (200, b"")
    assert service.statuses == [13], "INTERNAL"


# Streams


def test_messages_of_a_stream_come_back_in_order(channel: grpc.Channel) -> None:
    messages = [os.urandom(size) for size in (1, 0, 10, 16_384, 5, 300_000, 10_000_000, 3)]
    assert list(stream(channel, "Stream")(messages)) == messages


def test_thousand_small_messages_come_back(channel: grpc.Channel) -> None:
    messages = [b"%d" % i for i in range(1000)]
    assert list(stream(channel, "Stream")(messages)) == messages


def test_client_sees_an_answer_before_it_sends_the_next_message(channel: grpc.Channel) -> None:
    answered = threading.Semaphore(1)

    def messages() -> Iterator[bytes]:
        for i in range(20):
            assert answered.acquire(timeout=PATIENCE_S)
            yield b"%d" % i

    seen = []
    for message in channel.stream_stream("/test.Test/Stream")(messages(), timeout=PATIENCE_S):
        seen.append(int(message))
        answered.release()
    assert seen == list(range(20))


def test_messages_wait_for_a_handler_that_is_not_ready(channel: grpc.Channel) -> None:
    assert list(stream(channel, "Late")([b"a", b"b", b"c"])) == [b"a,b,c"]


def test_stream_of_more_than_a_client_reads_is_sent_as_it_reads(channel: grpc.Channel, service: Service) -> None:
    answers = stream(channel, "Count")([b"300"])
    assert next(answers) == bytes(100_000)
    assert sum(1 for _ in answers) == 299


def test_stream_ends_with_its_status_after_what_was_sent(channel: grpc.Channel) -> None:
    call = stream(channel, "FailStream")([b"x"])
    assert next(call) == b"x"
    error = error_of(lambda: next(call))
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")
    assert ("x-why", "because") in error.trailing_metadata()


def test_exception_in_a_stream_becomes_its_status(channel: grpc.Channel) -> None:
    call = stream(channel, "FailStream")([b"bug"])
    assert next(call) == b"bug"
    error = error_of(lambda: next(call))
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error: RuntimeError")


def test_stream_handler_hears_that_the_client_has_cancelled(channel: grpc.Channel, service: Service) -> None:
    call = stream(channel, "WaitStream")([b"x"])
    assert service.called.wait(PATIENCE_S)
    call.cancel()
    assert service.cancelled.wait(PATIENCE_S)


def test_calls_are_forgotten_without_the_garbage_collector(channel: grpc.Channel, server: WireServer) -> None:
    def left() -> list[Any]:
        return [thing for thing in gc.get_objects() if issubclass(type(thing), UnaryCall | StreamCall | Http2Exchange)]

    gc.collect()
    gc.disable()
    try:
        for size in (10, 100_000):
            unary(channel, "Parts")(bytes(size))
            error_of(stream(channel, "FailStream"), [b"x"])
            list(stream(channel, "Count")([b"3"]))
        assert server.call(left) == []
    finally:
        gc.enable()


# Compression


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("size", [0, 100, 3_000_000])
def test_compressed_messages_are_understood(channel: grpc.Channel, compression: grpc.Compression, size: int) -> None:
    message = b"tensor " * (size // 7)
    assert unary(channel, "Echo")(message, compression=compression) == message
    messages = [message, b"x", message]
    assert list(stream(channel, "Stream")(messages, compression=compression)) == messages


@pytest.mark.parametrize("level", [CompressionLevel.LOW, CompressionLevel.MEDIUM, CompressionLevel.HIGH])
def test_answers_are_compressed_where_the_server_is_told_to(level: CompressionLevel) -> None:
    service = Service(compression=level)
    message = b"tensor " * 500
    large = b"tensor " * 500_000
    with WireServer(service.router, name="grpc") as server:
        sizes: list[int] = []
        server.context.on_access = lambda exchange, status, size, grpc_status: sizes.append(size)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=UNLIMITED) as channel:
            _, call = channel.unary_unary("/test.Test/Echo").with_call(message)
            assert ("grpc-encoding", "gzip") in call.initial_metadata() or sizes[0] < len(message)
            assert unary(channel, "Echo")(large) == large
            incompressible = os.urandom(1000)
            assert unary(channel, "Echo")(incompressible) == incompressible
            assert list(stream(channel, "Stream")([message, large])) == [message, large]
        server.wait_until_empty()
    assert sizes[0] < 200
    assert sizes[1] < 100_000
    assert sizes[2] == 1005, "what does not shrink is sent as it is"


def test_unknown_encoding_is_unimplemented_and_says_what_is_accepted(server: WireServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", "--http2-prior-knowledge", "-D", "-", "-X", "POST", "-H", "te: trailers"]
    command += ["-H", "content-type: application/grpc", "-H", "grpc-encoding: snappy", f"{server.url}/test.Test/Echo"]
    head = subprocess.run(command, capture_output=True, check=True, timeout=PATIENCE_S).stdout.decode()
    assert "grpc-status: 12" in head
    assert "grpc-accept-encoding: identity, deflate, gzip" in head
    assert "grpc-message: Compression algorithm 'snappy' is not supported" in head


# Limits


def test_message_beyond_the_limit_is_resource_exhausted() -> None:
    service = Service(limits=WireLimits(grpc_message_bytes=20_000))
    with WireServer(service.router, name="grpc") as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", options=UNLIMITED) as channel:
            assert len(unary(channel, "Echo")(bytes(20_000))) == 20_000
            for size in (20_001, 3_000_000):
                error = error_of(unary(channel, "Echo"), bytes(size))
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert error.details() == f"Received message larger than max ({size} vs. 20000)"
                error = error_of(stream(channel, "Stream"), [b"x", bytes(size)])
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            error = error_of(unary(channel, "Echo"), bytes(3_000_000), compression=grpc.Compression.Gzip)
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "a small message that becomes a large one"
            error = error_of(unary(channel, "Parts"))
            assert error.details() == "Sent message larger than max (50003 vs. 20000)"
        server.wait_until_empty()
        assert server.context.held_bytes == 0


# What is not gRPC


def test_other_content_types_are_415_and_http1_is_426(server: WireServer) -> None:
    url = f"{server.url}/test.Test/Echo"
    assert requests.post(url, b"x", headers={"content-type": "application/json"}, timeout=PATIENCE_S).status_code == 415
    answer = requests.post(url, b"x", headers={"content-type": "application/grpc"}, timeout=PATIENCE_S)
    assert answer.status_code == 426
    assert "HTTP/2" in answer.json()["error"]


def test_missing_te_is_an_error(server: WireServer, service: Service) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        client.send(request(1, b"/test.Test/Echo", b"\0\0\0\0\0", extra=((b"content-type", b"application/grpc"),)))
        assert client.answer(1) == (200, b"")
    assert service.statuses == [13], "INTERNAL"


def test_http_and_grpc_share_a_connection(server: WireServer) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        extra = ((b"content-type", b"application/grpc+proto"), (b"te", b"trailers"))
        client.send(request(1, b"/test.Test/Echo", b"\0\0\0\0\3abc", extra=extra))
        assert client.answer(1) == (200, b"\0\0\0\0\3abc")
        client.send(request(3, b"/hello"))
        assert client.answer(3) == (200, b"hello")


@pytest.mark.parametrize("cuts", [(1,), (3, 5, 6), (5,), (1, 2, 3, 4, 5, 6, 7), ()])
def test_message_may_be_cut_into_any_frames(server: WireServer, cuts: tuple[int, ...]) -> None:
    body = b"\0\0\0\0\3abc"
    with server.connect() as raw:
        client = Http2Client(raw)
        extra = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
        client.send(request(1, b"/test.Test/Echo", extra=extra, method=b"POST", end=False))
        edges = [0, *cuts, len(body)]
        for start, end in pairwise(edges):
            client.send(frame(DATA, END_STREAM if end == len(body) else 0, 1, body[start:end]))
        assert client.answer(1) == (200, body)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"\0", id="no length"),
        pytest.param(b"\0\0\0\0", id="half a length"),
        pytest.param(b"\0\0\0\0\5abc", id="small message cut short"),
        pytest.param(b"\0\0\0\x80\0" + bytes(20_000), id="large message cut short"),
        pytest.param(b"\2\0\0\0\1x", id="unknown flag"),
        pytest.param(b"\1\0\0\0\1x", id="compressed without an encoding"),
        pytest.param(b"\0\0\0\0\1x\0\0", id="a message and a half"),
    ],
)
def test_broken_message_is_an_internal_error(server: WireServer, service: Service, body: bytes) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        extra = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))
        client.send(request(1, b"/test.Test/Echo", body, extra=extra))
        assert client.answer(1) == (200, b"")
        client.send(request(3, b"/test.Test/Stream", body, extra=extra))
        client.answer(3)
    assert service.statuses == [13, 13]


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
@pytest.mark.parametrize("size", [10, 100_000])
def test_garbage_instead_of_compressed_data_is_an_internal_error(
    server: WireServer, service: Service, encoding: bytes, size: int
) -> None:
    with server.connect() as raw:
        client = Http2Client(raw)
        extra = ((b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"grpc-encoding", encoding))
        for stream_id, method in ((1, b"/test.Test/Echo"), (3, b"/test.Test/Stream")):
            body = b"\1" + size.to_bytes(4, "big") + b"x" * size
            client.send(request(stream_id, method, body, extra=extra))
            assert client.answer(stream_id) == (200, b"")
    assert service.statuses == [13, 13]


def test_gate_answers_grpc_clients_in_grpc(service: Service) -> None:
    def gate(exchange: Exchange) -> Refusal | None:
        return refusal(403, "restricted: ü", grpc_status=14)

    server = WireServer(service.router, name="grpc")
    server.context.gates.append(gate)
    with server, grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for call in (unary(channel, "Echo"), unary(channel, "Nothing")):
            error = error_of(call, b"")
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "restricted: ü")


def test_calls_in_flight_finish_while_the_listener_drains(
    channel: grpc.Channel, server: WireServer, service: Service
) -> None:
    future = channel.unary_unary("/test.Test/Wait").future(b"", timeout=PATIENCE_S)
    assert service.called.wait(PATIENCE_S)
    server.call(server.context.drain)
    server.call(lambda: service.waiting[0].respond(b"finished"))
    assert future.result() == b"finished"


def test_access_hook_gets_the_grpc_status(channel: grpc.Channel, server: WireServer) -> None:
    seen: list[tuple[str, int, int, int | None]] = []

    def on_access(exchange: Exchange, status: int, size: int, grpc_status: int | None) -> None:
        seen.append((exchange.path, status, size, grpc_status))

    server.context.on_access = on_access
    unary(channel, "Echo")(b"abc")
    error_of(unary(channel, "Fail"), b"invalid")
    assert seen == [("/test.Test/Echo", 200, 8, 0), ("/test.Test/Fail", 200, 0, 3)]


def test_asyncio_client_gets_its_answers(server: WireServer) -> None:
    async def call() -> list[bytes]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=UNLIMITED) as channel:
            echo = channel.unary_unary("/test.Test/Echo")
            return list(await asyncio.gather(*(echo(b"%d" % i * 1000, timeout=PATIENCE_S) for i in range(50))))

    assert asyncio.run(call()) == [b"%d" % i * 1000 for i in range(50)]


def test_messages_of_any_size_pass_through_tls(service: Service, tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("server")
    with WireServer(service.router, name="grpc", tls=TlsOptions(str(certificate), str(key))) as server:
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, options=UNLIMITED) as channel:
            for size in (0, 100, 20_000, 602_112, 20_000_000):
                message = os.urandom(size)
                assert unary(channel, "Echo")(message) == message
                assert list(stream(channel, "Stream")([message, b"x"])) == [message, b"x"]
        server.wait_until_empty()
        assert server.context.held_bytes == 0


# Health and reflection


class Readiness:
    ready = True
    models = {"resnet": True, "bert": False}

    def model_ready(self, name: str, version: str = "") -> bool:
        try:
            return self.models[name]
        except KeyError:
            raise NotFound(name) from None


@pytest.fixture
def readiness() -> Readiness:
    return Readiness()


@pytest.fixture
def described(readiness: Readiness) -> Iterator[tuple[WireServer, grpc_health.Health, grpc.Channel]]:
    service = Service()
    health = grpc_health.register(service.grpc, readiness)
    grpc_reflection.register(service.grpc)
    service.grpc.add_unary("/inference.GRPCInferenceService/ServerLive", service.echo)
    router = Router()
    service.grpc.install(router)
    with WireServer(router, name="grpc") as server:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, health, channel
        server.wait_until_empty()


Described = tuple[WireServer, grpc_health.Health, grpc.Channel]
HealthRequest = proto.message("grpc.health.v1.HealthCheckRequest")
HealthResponse = proto.message("grpc.health.v1.HealthCheckResponse")


def test_health_of_the_server_and_of_models(described: Described, readiness: Readiness) -> None:
    check = described[2].unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=HealthRequest.SerializeToString,
        response_deserializer=HealthResponse.FromString,
    )
    serving, not_serving = 1, 2
    for service, status in (
        ("", serving),
        ("inference.GRPCInferenceService", serving),
        ("resnet", serving),
        ("bert", not_serving),
    ):
        assert check(HealthRequest(service=service)).status == status, service
    assert error_of(check, HealthRequest(service="nothing")).code() is grpc.StatusCode.NOT_FOUND
    readiness.ready = False
    assert check(HealthRequest()).status == not_serving


def test_watcher_hears_of_changes(described: Described, readiness: Readiness) -> None:
    server, health, channel = described
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=HealthRequest.SerializeToString,
        response_deserializer=HealthResponse.FromString,
    )
    call = watch(HealthRequest(), timeout=PATIENCE_S)
    assert next(call).status == 1
    readiness.ready = False
    server.call(health.changed)
    assert next(call).status == 2
    readiness.ready = True
    assert next(call).status == 1, "it is asked for every second, too"
    call.cancel()
    unknown = watch(HealthRequest(service="nothing"), timeout=PATIENCE_S)
    assert next(unknown).status == 3
    unknown.cancel()


@pytest.mark.parametrize("package", ["grpc.reflection.v1", "grpc.reflection.v1alpha"])
def test_reflection_lists_services_and_hands_out_their_files(described: Described, package: str) -> None:
    from google.protobuf import descriptor_pb2, descriptor_pool

    request_class = proto.message("grpc.reflection.v1.ServerReflectionRequest")
    ask = described[2].stream_stream(
        f"/{package}.ServerReflection/ServerReflectionInfo",
        request_serializer=request_class.SerializeToString,
        response_deserializer=proto.message("grpc.reflection.v1.ServerReflectionResponse").FromString,
    )
    requests_ = [
        request_class(list_services=""),
        request_class(file_containing_symbol="inference.GRPCInferenceService"),
        request_class(file_containing_symbol=f"{package}.ServerReflection"),
        request_class(file_containing_symbol="inference.ModelInferRequest.inputs"),
        request_class(file_by_filename="health.proto"),
        request_class(file_containing_symbol="nothing"),
        request_class(all_extension_numbers_of_type="inference.ModelInferRequest"),
    ]
    answers = list(ask(iter(requests_), timeout=PATIENCE_S))
    names = [service.name for service in answers[0].list_services_response.service]
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health", f"{package}.ServerReflection"} <= set(names)
    for answer, service in (
        (answers[1], "inference.GRPCInferenceService"),
        (answers[2], f"{package}.ServerReflection"),
    ):
        pool = descriptor_pool.DescriptorPool()
        for data in reversed(answer.file_descriptor_response.file_descriptor_proto):
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
        assert pool.FindServiceByName(service).methods
    assert len(answers[3].file_descriptor_response.file_descriptor_proto) == 2
    assert len(answers[4].file_descriptor_response.file_descriptor_proto) == 1
    assert answers[5].error_response.error_code == 5
    assert answers[6].all_extension_numbers_response.base_type_name == "inference.ModelInferRequest"
    assert answers[6].original_request == requests_[6]
