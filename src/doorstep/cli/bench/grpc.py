"""gRPC for the load loop: one message sent again and again over HTTP/2. Knows no clock and no message's meaning."""

from __future__ import annotations

import socket
import ssl
from collections import Counter
from typing import Any
from urllib.parse import unquote

import ngh2

from doorstep.cli.bench.connection import FAILED, WOULD_BLOCK, LoadConnection, Lost, connect
from doorstep.errors import Unavailable

_READ = 1 << 18  # bytes
_WINDOW = 2**31 - 1  # the server never waits for us
_CALL_TIMEOUT_S = 10.0  # of one question to the server, before the load begins
_Fields = list[tuple[bytes, bytes]]


def request_fields(authority: str, method: str, *, secure: bool = False) -> _Fields:
    """The header fields of a unary call; `method` is /package.Service/Name."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"https" if secure else b"http"),
        (b":path", method.encode()),
        (b":authority", authority.encode()),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"doorstep-bench"),
    ]


def framed(message: bytes) -> bytes:
    """A gRPC message: a flag (not compressed) and four bytes of length, then the message itself."""
    return b"\x00" + len(message).to_bytes(4, "big") + message


class GrpcConnection(LoadConnection):
    def __init__(self, sock: socket.socket, poller: Any, errors: Counter[str], fields: _Fields, message: bytes) -> None:
        super().__init__(sock, poller, errors)
        self._fields = fields
        self._message = message
        self._started: dict[int, int] = {}  # stream → start time
        self._failed: dict[int, str] = {}
        self._leaving = False  # the server takes no more requests on this connection
        self._http2 = _client_side()
        self.write(self._http2.data_to_send())

    @property
    def in_flight(self) -> int:
        return len(self._started)

    def start(self, started_ns: int) -> None:
        http2 = self._http2
        try:
            stream = http2.send_request(self._fields)
            http2.send_data(stream, self._message, end_stream=True)
            self._started[stream] = started_ns
            self.write(http2.data_to_send())
        except ngh2.NGH2Error as error:
            raise Lost(f"HTTP/2: {error}") from None

    def readable(self, done: list[int]) -> None:
        try:
            data = self.sock.recv(_READ)
        except WOULD_BLOCK:
            return
        except OSError as error:
            raise Lost(f"connection lost: {error.strerror or error}") from None
        if not data:
            raise Lost("connection closed by the server")
        self.bytes_in += len(data)
        http2 = self._http2
        try:
            http2.receive_data(data)
        except ngh2.NGH2Error as error:
            raise Lost(f"HTTP/2: {error}") from None
        event: Any
        for event in http2.events():
            kind = type(event)
            if kind is ngh2.TrailersReceived or kind is ngh2.ResponseReceived:
                problem = _problem(event.headers, last=kind is ngh2.TrailersReceived or event.end_stream)
                if problem:
                    self._failed[event.stream_id] = problem
            elif kind is ngh2.StreamClosed:
                self._closed(event, done)
            elif kind is ngh2.GoAwayReceived:
                self._leaving = True
        if self._leaving and not self._started:
            raise Lost("connection closed by the server (GOAWAY)")
        answer = http2.data_to_send()
        if answer:
            self.write(answer)

    def _closed(self, event: Any, done: list[int]) -> None:
        started = self._started.pop(event.stream_id, FAILED)
        problem = self._failed.pop(event.stream_id, "")
        if not problem and event.error_code:
            problem = f"stream reset by the server (HTTP/2 error {event.error_code})"
        if problem:
            self.errors[problem] += 1
            started = FAILED
        done.append(started)


def _client_side() -> ngh2.Connection:
    http2 = ngh2.Connection(ngh2.Role.CLIENT)
    http2.initiate_connection({ngh2.Setting.INITIAL_WINDOW_SIZE: _WINDOW, ngh2.Setting.ENABLE_PUSH: 0})
    http2.set_local_window_size(_WINDOW)
    return http2


def _problem(headers: tuple[tuple[bytes, bytes], ...], *, last: bool) -> str:
    """What is wrong, going by an answer's header or trailer fields; "" where nothing is."""
    status = message = b""
    for name, value in headers:
        if name == b"grpc-status":
            status = value
        elif name == b"grpc-message":
            message = value
        elif name == b":status" and value != b"200":
            return f"HTTP status {value.decode()}"
    if status == b"0" or (not status and not last):
        return ""
    text = unquote(message.decode("latin-1"))
    return f"grpc-status {status.decode() or 'missing'} {text}".strip()


def call(host: str, port: int, tls: ssl.SSLContext | None, method: str, message: bytes) -> bytes:
    """One blocking unary call. Raises Unavailable, with the server's text where it has one."""
    try:
        with connect(host, port, tls, _CALL_TIMEOUT_S) as sock:
            http2 = _client_side()
            stream = http2.send_request(request_fields(f"{host}:{port}", method, secure=tls is not None))
            http2.send_data(stream, framed(message), end_stream=True)
            return _answer(sock, http2)
    except (OSError, ngh2.NGH2Error) as error:
        raise Unavailable(f"cannot reach {host}:{port} over gRPC: {error}; is the server running there?") from error


def _answer(sock: socket.socket, http2: ngh2.Connection) -> bytes:
    body = bytearray()
    problem = ""
    while True:
        sock.sendall(http2.data_to_send())
        data = sock.recv(_READ)
        if not data:
            raise OSError("connection closed")
        http2.receive_data(data)
        for event in http2.events():
            if isinstance(event, ngh2.DataReceived):
                body += event.data
            elif isinstance(event, ngh2.ResponseReceived | ngh2.TrailersReceived):
                last = isinstance(event, ngh2.TrailersReceived) or event.end_stream
                problem = problem or _problem(event.headers, last=last)
            elif isinstance(event, ngh2.StreamClosed):
                if problem or event.error_code:
                    raise Unavailable(problem or f"stream reset (HTTP/2 error {event.error_code})")
                return bytes(body[5:])
