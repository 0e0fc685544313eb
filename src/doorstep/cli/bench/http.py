"""HTTP/1.1 for the load loop: the same bytes again and again, answers recognised rather than parsed. Knows no clock.

Answers of a server under load differ little: when the head is byte for byte the one before, its length is known too.
Whatever is new goes through llhttp's parser once.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Any

import httptools
import orjson

from doorstep.cli.bench.connection import FAILED, WOULD_BLOCK, LoadConnection, Lost

_HEAD_READ = 16_384  # bytes; an answer of an ordinary size comes in one read
_scratch = bytearray(1 << 20)  # bodies are counted, not kept


class HttpConnection(LoadConnection):
    def __init__(self, sock: socket.socket, poller: Any, errors: Counter[str], request: bytes) -> None:
        super().__init__(sock, poller, errors)
        self._request = request
        self._started = 0
        self._waiting = False
        self._left = 0  # bytes of the body that are still to come
        self._known_head = b""
        self._known_size = -1  # of head and body
        self._slow: _Parser | None = None

    @property
    def in_flight(self) -> int:
        return int(self._waiting)

    def start(self, started_ns: int) -> None:
        self._started = started_ns
        self._waiting = True
        self.write(self._request)

    def readable(self, done: list[int]) -> None:
        try:
            if self._left:
                self._read_body(done)
                return
            data = self.sock.recv(_HEAD_READ)
        except WOULD_BLOCK:
            return
        except OSError as error:
            raise Lost(f"connection lost: {error.strerror or error}") from None
        size = len(data)
        self.bytes_in += size
        if size == self._known_size and data.startswith(self._known_head):
            self._waiting = False
            done.append(self._started)
            return
        self._read_new(data, done)

    def _read_body(self, done: list[int]) -> None:
        while self._left:
            size = self.sock.recv_into(_scratch, min(self._left, len(_scratch)))
            if not size:
                raise Lost("connection closed in the middle of an answer")
            self.bytes_in += size
            self._left -= size
        self._waiting = False
        done.append(self._started)

    def _read_new(self, data: bytes, done: list[int]) -> None:
        """An answer unlike the one before: another head, an error, or only a part of one."""
        if not data:
            raise Lost("connection closed by the server")
        if not self._waiting:
            raise Lost("the server sent something that nobody asked for")
        if self._slow is None and self._known_head and data.startswith(self._known_head):
            self._left = self._known_size - len(data)
            if self._left > 0:
                try:
                    self._read_body(done)
                except WOULD_BLOCK:
                    pass
                return
        parser = self._slow = self._slow or _Parser()
        self._left, self._known_size = 0, -1
        parser.feed(data)
        if not parser.complete:
            return
        self._slow = None
        self._waiting = False
        if parser.status == 200:
            self._known_head, self._known_size = parser.head, parser.size
            done.append(self._started)
        else:
            self.errors[parser.error_text()] += 1
            done.append(FAILED)
        if not parser.keep_alive:
            raise Lost("")


class _Parser:
    """One answer, with its head kept."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._seen = bytearray()
        self._body = bytearray()
        self._body_size = 0
        self.complete = False
        self.keep_alive = True
        self.status = 0

    def feed(self, data: bytes) -> None:
        if len(self._seen) < 65_536:
            self._seen += data
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise Lost(f"not an HTTP/1.1 answer: {error}") from None

    def on_body(self, body: bytes) -> None:
        if len(self._body) < 4096:
            self._body += body
        self._body_size += len(body)

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.keep_alive = self._parser.should_keep_alive()
        self.complete = self.status >= 200

    @property
    def head(self) -> bytes:
        """Up to and including the empty line; b"" where the head says no length, so that it promises nothing."""
        head, found, _ = bytes(self._seen).partition(b"\r\n\r\n")
        return head + found if b"\r\ncontent-length:" in head.lower() else b""

    @property
    def size(self) -> int:
        return len(self.head) + self._body_size if self.head else -1

    def error_text(self) -> str:
        try:
            text = str(orjson.loads(bytes(self._body))["error"])
        except (ValueError, KeyError, TypeError):
            text = bytes(self._body[:200]).decode(errors="replace").strip()
        return f"{self.status} {text}".strip()
