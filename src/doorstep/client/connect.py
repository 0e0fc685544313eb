"""Where a server is, and one HTTP/1.1 answer off the wire. Opens no connection itself: sync.py and aio.py do.

The request is written, and the answer is read by llhttp's parser, the same for both.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from doorstep.client.binary import Buffer
from doorstep.client.messages import Answer, Call
from doorstep.errors import InvalidArgument, Unavailable


class TimedOut(Unavailable):
    """No answer within the time given. The server may still be at work on the request."""


class Disconnected(Exception):
    """The connection ended before the answer was complete."""

    def __init__(self, answer_begun: bool) -> None:
        super().__init__("connection closed")
        self.answer_begun = answer_begun


@dataclass(frozen=True, slots=True)
class Target:
    host: str
    port: int
    tls: ssl.SSLContext | None
    url: str
    head: bytes = field(repr=False)  # the header fields that every request has

    @classmethod
    def parse(cls, url: str, headers: Mapping[str, str] | None = None, tls: ssl.SSLContext | None = None) -> Target:
        """`url` is http://host:port, https://host:port or host:port. Raises InvalidArgument."""
        full = url if "://" in url else f"http://{url}"
        parts = urlsplit(full)
        try:
            port = parts.port
        except ValueError as error:
            raise InvalidArgument(f"{url} is no address of a server: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise InvalidArgument(f"{url} is no address of a server; write http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        context = (tls or ssl.create_default_context()) if secure else None
        shown = parts.netloc.rpartition("@")[2]
        lines = [f"Host: {shown}", *(f"{_safe(name)}: {_safe(value)}" for name, value in (headers or {}).items())]
        head = "".join(f"{line}\r\n" for line in lines).encode("latin-1")
        default = 443 if secure else 8000
        return cls(parts.hostname, port or default, context, f"{parts.scheme}://{shown}", head)

    def cannot_reach(self, error: Exception) -> Unavailable:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return Unavailable(f"cannot reach {self.url}: {why}; is the server running there?")


def _safe(text: str) -> str:
    if "\r" in text or "\n" in text:
        raise InvalidArgument("a header may not hold a line break")
    return text


def request_bytes(target: Target, call: Call) -> list[Buffer]:
    """The request as buffers to write one after the other; the body is not copied."""
    lines = [f"{call.method} {call.path} HTTP/1.1", *(f"{name}: {value}" for name, value in call.headers)]
    if call.method != "GET":
        lines.append(f"Content-Length: {sum(memoryview(part).nbytes for part in call.body)}")
    head = "\r\n".join(lines).encode("latin-1") + b"\r\n" + target.head + b"\r\n"
    small = sum(memoryview(part).nbytes for part in call.body) <= 65_536
    return [b"".join((head, *call.body))] if small else [head, *call.body]


class AnswerReader:
    """Feed it bytes until `answer` is there. One per request."""

    __slots__ = ("_body", "_headers", "_parser", "answer", "begun", "keep_alive")

    def __init__(self) -> None:
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self.answer: Answer | None = None
        self.begun = False
        self.keep_alive = False

    def feed(self, data: bytes) -> None:
        """Raises Unavailable for what is not HTTP."""
        self.begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise Unavailable(f"the server does not answer in HTTP/1.1: {error}") from None

    def feed_eof(self) -> None:
        """An answer without a length ends with the connection."""
        if self.begun and self.answer is None and "content-length" not in self._headers and self._headers:
            self._finish()
        if self.answer is None:
            raise Disconnected(self.begun)

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:  # 100 Continue: the answer is still to come
            self._headers.clear()
            return
        self.keep_alive = self._parser.should_keep_alive()
        self._finish()

    def _finish(self) -> None:
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self.answer = Answer(self._parser.get_status_code(), self._headers, body)
