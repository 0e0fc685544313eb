"""Asking an engine over its socket: whole answers and events, errors, and that leaving closes the connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from doorstep.backends.llm.upstream import Upstream
from doorstep.errors import BackendError, InvalidArgument

PATIENCE_S = 20.0


class Engine:
    """Answers one request with pieces, and then waits until the client leaves, or closes itself."""

    def __init__(self, path: str) -> None:
        self.left = threading.Event()  # the client has closed the connection
        self.stays = True
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._pieces: Sequence[bytes] = ()
        self._thread: threading.Thread | None = None

    def answer(self, *pieces: bytes, stays: bool = True) -> None:
        self._pieces, self.stays = pieces, stays
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            asked = b""
            while not asked.endswith(b"{}"):
                asked += connection.recv(65536)
            for piece in self._pieces:
                connection.sendall(piece)
            if self.stays and not connection.recv(1):
                self.left.set()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join(PATIENCE_S)
        self._listener.close()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    made = Engine("s")
    yield made
    made.close()


def whole(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def upstream() -> Upstream:
    def error_of(status: int, said: Any) -> InvalidArgument:
        return InvalidArgument(f"{status}: {said}")

    return Upstream("s", "key", error_of)


def never() -> bool:
    return False


def test_an_answer_may_come_in_any_pieces(engine: Engine) -> None:
    answer = whole("200 OK", b'{"a": [1, 2]}')
    engine.answer(*(answer[i : i + 1] for i in range(len(answer))))
    assert upstream().ask_while_wanted("/v1/embeddings", {}, never) == {"a": [1, 2]}
    assert engine.left.wait(PATIENCE_S)


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_who_no_longer_wants_an_answer_leaves(engine: Engine, sent: bytes) -> None:
    engine.answer(sent)
    asked = []

    def aborted() -> bool:
        asked.append(1)
        return len(asked) > 2

    assert upstream().ask_while_wanted("/v1/embeddings", {}, aborted) is None
    assert engine.left.wait(PATIENCE_S), "the engine learns of it"


def test_events_come_one_by_one_and_leaving_closes_the_connection(engine: Engine) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    engine.answer(head + b"12\r\ndata: 1\n\ndata: 2\n\n\r\n")
    events = upstream().events("/v1/completions", {}, never)
    assert [next(events), next(events)] == [b"1", b"2"]
    events.close()  # type: ignore[attr-defined]
    assert engine.left.wait(PATIENCE_S)


def ask_whole() -> Any:
    return upstream().ask_while_wanted("/v1/rerank", {}, never)


def ask_events() -> Any:
    return list(upstream().events("/v1/completions", {}, never))


@pytest.mark.parametrize("ask", [ask_whole, ask_events])
@pytest.mark.parametrize(
    ("sent", "error", "text"),
    [
        (whole("400 Bad Request", b'{"a": 1}'), InvalidArgument, "400: {'a': 1}"),
        (whole("400 Bad Request", b"no"), InvalidArgument, "400: no"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", BackendError, "broke off"),
        (b"", BackendError, "broke off"),
        (b"nonsense\r\n\r\n", BackendError, "not HTTP"),
    ],
)
def test_what_is_no_answer_is_an_error(engine: Engine, ask: Any, sent: bytes, error: type, text: str) -> None:
    engine.answer(sent, stays=False)
    with pytest.raises(error, match=text):
        ask()


def test_without_an_engine_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match="does not answer"):
        ask_whole()
