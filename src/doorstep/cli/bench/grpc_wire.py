"""gRPC's unary calls over ngh2: header fields, framing, status; and one blocking call. Knows no load."""

from __future__ import annotations

import socket
import ssl
from urllib.parse import unquote

import ngh2

from doorstep.cli.bench.connection import connect
from doorstep.errors import Unavailable

_READ = 1 << 18  # bytes
_WINDOW = 2**31 - 1  # the server never waits for us
_CALL_TIMEOUT_S = 10.0  # of one question to the server, before the load begins
Fields = list[tuple[bytes, bytes]]


def request_fields(authority: str, method: str, *, secure: bool = False) -> Fields:
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


def client_side() -> ngh2.Connection:
    http2 = ngh2.Connection(ngh2.Role.CLIENT)
    http2.initiate_connection({ngh2.Setting.INITIAL_WINDOW_SIZE: _WINDOW, ngh2.Setting.ENABLE_PUSH: 0})
    http2.set_local_window_size(_WINDOW)
    return http2


def status_problem(headers: tuple[tuple[bytes, bytes], ...], *, last: bool) -> str:
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
            http2 = client_side()
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
                problem = problem or status_problem(event.headers, last=last)
            elif isinstance(event, ngh2.StreamClosed):
                if problem or event.error_code:
                    raise Unavailable(problem or f"stream reset (HTTP/2 error {event.error_code})")
                return bytes(body[5:])
