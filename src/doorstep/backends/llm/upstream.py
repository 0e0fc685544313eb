"""Asks an engine that serves HTTP on a Unix socket: JSON in, JSON or server-sent events out. Knows no engine.

Blocking, one connection per call: closing it is how an engine learns that nobody wants the answer any more, in the
middle of a prompt too."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httptools
import orjson

from doorstep.errors import BackendError, DoorstepError

POLL_S = 0.05  # how often a silent engine's caller is asked whether it still waits
LONGEST_EVENT = 64 << 20
LONGEST_ANSWER = 1 << 30  # thousands of vectors, in decimal
_ASK_TIMEOUT_S = 600.0
_PREFIX = "doorstep-"
_LONGEST_FOLDER = 50  # a socket's path has 107 bytes at most, of which our names take up to 50


def socket_folder(engine: str) -> str:
    """A new folder for a socket, which only this user can enter. Those of processes that were killed are removed."""
    prefix = f"{_PREFIX}{engine}-"
    places = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp"]  # noqa: S108 (only ours can enter)
    place = next((p for p in places if 0 < len(p) <= _LONGEST_FOLDER and os.path.isdir(p)), None)
    if place is None:
        raise BackendError(f"no folder for a socket: {places[0]} is too long for one; set TMPDIR to a shorter one")
    for folder in Path(place).glob(f"{prefix}*"):
        pid = folder.name.removeprefix(prefix).split("-")[0]
        if pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place)


class Upstream:
    """`error_of(status, body)` makes the error of an answer that is none; `key` is the bearer token."""

    def __init__(self, path: str, key: str, error_of: Callable[[int, Any], DoorstepError]) -> None:
        self.path = path
        self._key = key
        self._error_of = error_of

    def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float = _ASK_TIMEOUT_S) -> Any:
        """The JSON of the answer, or its text. Raises what `error_of` makes, or BackendError."""
        status, data = self._exchange(method, path, body, timeout_s)
        try:
            said = orjson.loads(data)
        except orjson.JSONDecodeError:
            said = data.decode("utf-8", "replace")
        if status != 200:
            raise self._error_of(status, said)
        return said

    def _exchange(self, method: str, path: str, body: Any, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("engine")
        try:
            connection.sock = self._connect(timeout_s)
            data = None if body is None else orjson.dumps(body)
            connection.request(
                method, path, data, {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(f"the engine does not answer: {error or type(error).__name__}") from None
        finally:
            connection.close()

    def ask_while_wanted(self, path: str, body: Any, aborted: Callable[[], bool]) -> Any:
        """As `ask`, of a POST; None once `aborted()`: the engine, whose connection is closed, gives the work up."""
        answer = _Answer(LONGEST_ANSWER)
        with closing(self._post(path, body, aborted, answer)) as pieces:
            for _ in pieces:
                pass
        return self._said(answer) if answer.complete else None

    def events(self, path: str, body: Any, aborted: Callable[[], bool]) -> Iterator[bytes]:
        """The data of each event, `[DONE]` left out; ends early once `aborted()`. Closing it closes the connection."""
        answer = _Answer(LONGEST_EVENT)
        with closing(self._post(path, body, aborted, answer)) as pieces:
            for _ in pieces:
                for event in answer.events() if answer.status == 200 else ():
                    if aborted():
                        return
                    yield event
        if answer.complete and answer.status != 200:
            self._said(answer)

    def _post(self, path: str, body: Any, aborted: Callable[[], bool], answer: _Answer) -> Generator[None, None, None]:
        """Turns up after each piece of the answer; ends early once `aborted()`."""
        data = orjson.dumps(body)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: engine\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        try:
            sock = self._connect(None)
        except OSError as error:
            raise BackendError(f"the engine does not answer: {error}") from None
        with sock:
            try:
                sock.sendall(head.encode() + data)
                sock.settimeout(POLL_S)
                while not answer.complete:
                    try:
                        received = sock.recv(65536)
                    except TimeoutError:
                        if aborted():
                            return
                        continue
                    if not received:
                        raise BackendError("the engine broke off its answer")
                    answer.feed(received)
                    yield
            except OSError as error:
                raise BackendError(f"the engine broke off its answer: {error}") from None

    def _said(self, answer: _Answer) -> Any:
        try:
            said = orjson.loads(bytes(answer.rest))
        except orjson.JSONDecodeError:
            said = bytes(answer.rest).decode("utf-8", "replace")
        if answer.status != 200:
            raise self._error_of(answer.status, said)
        return said

    def wait_until_up(self, path: str, alive: Callable[[], bool], timeout_s: float) -> None:
        """Until `GET path` is answered 200. Raises BackendError when `alive()` is not, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not alive():
                raise BackendError("the engine's process ended while it started")
            if os.path.exists(self.path):
                try:
                    if self._exchange("GET", path, None, 5.0)[0] == 200:
                        return
                except BackendError:
                    pass
            if time.monotonic() > deadline:
                raise BackendError(f"the engine was not up after {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def _connect(self, timeout_s: float | None) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return sock


class _Answer:
    """An HTTP answer as it arrives: its status, and the events of its body."""

    def __init__(self, longest: int) -> None:
        self._longest = longest  # bytes, of an event, or of the whole
        self.status = 0
        self.complete = False
        self.rest = bytearray()
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            raise BackendError(f"the engine's answer is not HTTP: {error}") from None

    # What the parser calls

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.rest += data
        if len(self.rest) > self._longest:
            raise BackendError(f"the engine's answer has over {self._longest} bytes in one piece")

    def on_message_complete(self) -> None:
        self.complete = True

    def events(self) -> Iterator[bytes]:
        while (end := self.rest.find(b"\n\n")) >= 0:
            event = bytes(self.rest[:end])
            del self.rest[: end + 2]
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data != b"[DONE]":
                        yield data
