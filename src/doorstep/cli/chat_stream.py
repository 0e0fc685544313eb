"""Asks a server of OpenAI's API for an answer and reads it piece by piece. Knows server-sent events, no terminal."""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from doorstep.client.connect import Target
from doorstep.errors import DoorstepError, NotFound, Unavailable

_LONGEST_LINE = 16 << 20  # bytes of one event


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to the answer."""

    text: str = ""
    reasoning: str = ""
    finish: str = ""  # stop, length …; of the last piece
    tokens: int = 0  # of the whole answer; of the event that says it


@dataclass(slots=True)
class Figures:
    """How long an answer was, and how fast. Times are of `clock`, in seconds."""

    began: float
    first: float | None = None  # when the first piece came
    last: float = 0.0
    pieces: int = 0
    said: int = 0  # tokens, as the server counts them

    def note(self, piece: Piece, now: float) -> None:
        self.said = piece.tokens or self.said
        if piece.text or piece.reasoning:
            self.first = now if self.first is None else self.first
            self.last = now
            self.pieces += 1

    def __str__(self) -> str:
        tokens = self.said or self.pieces  # of an answer that was stopped, the server says nothing
        words = [f"{tokens} token{'' if tokens == 1 else 's'}"]
        if self.first is not None:
            took = self.last - self.first
            if tokens > 1 and took > 0:
                words.append(f"{(tokens - 1) / took:.1f} tokens/s")
            words.append(f"first after {(self.first - self.began) * 1e3:.0f} ms")
        return ", ".join(words)


class ChatServer:
    """One server. Each question has a connection of its own, so that closing it stops the answer.

    `timeout` is in seconds, of silence. Errors are `doorstep.errors`: the server's own, Unavailable where it cannot be
    reached or breaks off.
    """

    def __init__(
        self, url: str, *, timeout: float, headers: Mapping[str, str], tls: ssl.SSLContext | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._target = Target.parse(url, headers, tls)
        self._headers = {"Content-Type": "application/json", **headers}
        self._timeout = timeout
        self.clock = clock
        self.url = self._target.url

    def models(self) -> list[dict[str, Any]]:
        """What GET /v1/models lists."""
        try:
            with self._answer("GET", "/v1/models") as response:
                said = _json(response.read(_LONGEST_LINE))
        except NotFound as error:
            raise NotFound(f"{self.url} has no OpenAI API (GET /v1/models: {error})") from None
        listed = said.get("data")
        return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []

    def ask(self, body: Mapping[str, Any]) -> Generator[Piece]:
        """The pieces of the answer to a chat, as they come. Closing the iterator stops it."""
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._answer("POST", "/v1/chat/completions", orjson.dumps(streamed)) as response:
            for event in read_events(iter(lambda: response.readline(_LONGEST_LINE), b"")):
                if event == "[DONE]":
                    return
                yield piece_of(event)
        raise Unavailable(f"{self.url} broke off before the answer was complete")

    @contextmanager
    def _answer(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        target = self._target
        connection = (
            http.client.HTTPSConnection(target.host, target.port, timeout=self._timeout, context=target.tls)
            if target.tls
            else http.client.HTTPConnection(target.host, target.port, timeout=self._timeout)
        )
        try:
            connection.request(method, path, body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _refused(self.url, response.status, response.read(_LONGEST_LINE))
            yield response
        except TimeoutError:
            raise Unavailable(f"{self.url} said nothing for {self._timeout:g} s (--timeout)") from None
        except OSError as error:
            raise target.cannot_reach(error) from None
        except http.client.HTTPException as error:
            raise Unavailable(f"{self.url} broke off, or does not speak HTTP: {error!r}") from None
        finally:
            connection.close()


def read_events(lines: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event (WHATWG's HTML, 9.2), its lines joined. Comments and other fields count for
    nothing."""
    data: list[str] = []
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            if data:
                yield "\n".join(data)
            data = []
            continue
        field, _, value = text.partition(":")
        if field == "data":
            data.append(value.removeprefix(" "))


def piece_of(event: str) -> Piece:
    """Raises DoorstepError where the event is an error's."""
    said = _json(event.encode("utf-8", "replace"))
    if (error := said.get("error")) is not None:
        raise DoorstepError(_message(error))
    usage = said.get("usage") or {}
    choice: dict[str, Any] = next(iter(said.get("choices") or ()), {})
    delta = choice.get("delta") or {}
    return Piece(
        delta.get("content") or "",
        delta.get("reasoning_content") or "",
        choice.get("finish_reason") or "",
        usage.get("completion_tokens") or 0,
    )


def _json(body: bytes) -> dict[str, Any]:
    try:
        said = orjson.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise Unavailable(f"the server answers with what is no JSON object: {body[:80]!r}")
    return said


def _refused(url: str, status: int, body: bytes) -> DoorstepError:
    try:
        message = _message(_json(body).get("error"))
    except DoorstepError:
        message = f"{url} answers with status {status}"
    if status == 404:
        return NotFound(message)
    return DoorstepError(message)


def _message(error: object) -> str:
    if isinstance(error, dict):
        error = error.get("message")
    return str(error) if error else "the server says that something went wrong, and not what"
