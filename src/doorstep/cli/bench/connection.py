"""What the load loop asks of a connection, and what both protocols need for it. Knows no protocol and no clock."""

from __future__ import annotations

import select
import socket
import ssl
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

READABLE = select.POLLIN
WRITABLE = select.POLLOUT
FAILED = -1  # in place of a start time: the request ended in an error
WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Lost(Exception):
    """The connection is gone."""


class LoadConnection(ABC):
    """One connection that sends the same request again and again. Touched only by its load loop."""

    def __init__(self, sock: socket.socket, poller: Any, errors: Counter[str]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.errors = errors
        self.bytes_in = 0
        self.bytes_out = 0
        self._poller = poller
        self._unsent: memoryview | None = None
        poller.register(self.fd, READABLE)

    @property
    @abstractmethod
    def in_flight(self) -> int: ...

    @abstractmethod
    def start(self, started_ns: int) -> None:
        """Sends one request. `started_ns` comes back with its answer. Raises Lost."""

    @abstractmethod
    def readable(self, done: list[int]) -> None:
        """Reads what is there; appends the start time of each request that is answered, or FAILED. Raises Lost."""

    def writable(self) -> None:
        """The rest of what the socket would not take at once."""
        unsent = self._unsent
        if unsent is not None:
            self._unsent = None
            self.write(unsent)
        if self._unsent is None:
            self._poller.modify(self.fd, READABLE)

    def write(self, data: bytes | memoryview) -> None:
        if self._unsent is not None:
            self._unsent = memoryview(bytes(self._unsent) + bytes(data))
            return
        size = len(data)
        try:
            sent = self.sock.send(data)
        except WOULD_BLOCK:
            sent = 0
        except OSError as error:
            raise Lost(f"connection lost: {error.strerror or error}") from None
        self.bytes_out += sent
        if sent < size:
            self._unsent = memoryview(data)[sent:]
            self._poller.modify(self.fd, READABLE | WRITABLE)

    def close(self) -> None:
        try:
            self._poller.unregister(self.fd)
        except (KeyError, OSError, ValueError):
            pass  # closed already
        self.sock.close()


def connect(host: str, port: int, tls: ssl.SSLContext | None, timeout_s: float) -> socket.socket:
    """A connected socket, its TLS handshake done. Raises OSError."""
    sock = socket.create_connection((host, port), timeout_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return tls.wrap_socket(sock, server_hostname=host) if tls is not None else sock
