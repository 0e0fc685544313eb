"""`doorstep chat` against a real server, through pipes and in a terminal, and against one that fails as told."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from doorstep.cli.chat import choose_model
from doorstep.cli.chat_stream import Figures, Piece, read_events
from doorstep.errors import NotFound
from doorstep.testing.server import ServerProcess, doorstep_command

pytestmark = pytest.mark.xdist_group("doorstep chat")

NAME = "SmolLM2-135M-Instruct.Q4_1"
FIGURES = r"\d+ tokens?(, \d+\.\d tokens/s)?, first after \d+ ms"
EXACT = ("--temperature", "0", "--max-tokens", "16")
WAIT_S = 60.0


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[ServerProcess]:
    with ServerProcess(smollm2) as running:
        yield running


def chat(url: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [*doorstep_command(), "chat", *arguments]
    env = {**os.environ, "DOORSTEP_URL": url}
    options = {"stdin": subprocess.DEVNULL, **options} if "input" not in options else options
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False, **options)


# Through pipes


def test_a_message_is_answered_once_with_the_figures_on_stderr(server: ServerProcess) -> None:
    done = chat(server.url(""), "-m", "What is 2+2?", *EXACT)
    assert done.returncode == 0, done.stderr
    assert " 4" in done.stdout
    assert done.stdout.count("\n") == 1
    assert re.fullmatch(FIGURES + "\n", done.stderr)


def test_piped_text_is_answered_and_the_system_message_counts(server: ServerProcess) -> None:
    plain = chat(server.url(""), NAME, *EXACT, input="What is 2+2?")
    told = chat(server.url(""), NAME, *EXACT, "--system", "You are a pirate.", input="Who are you?")
    untold = chat(server.url(""), NAME, *EXACT, input="Who are you?")
    assert " 4" in plain.stdout
    assert told.stdout != untold.stdout


def test_a_limit_of_tokens_is_told(server: ServerProcess) -> None:
    done = chat(server.url(""), "-m", "Count to a hundred.", "--max-tokens", "3", "--temperature", "0")
    assert done.stderr.startswith("3 tokens, ")
    assert done.stderr.endswith("; cut off by its limit of tokens\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody", "-m", "x"], f"has no model 'nobody'; there are: {NAME}"),
        (["-m", " "], "there is nothing to answer"),
        (["-m", "x", "--url", "http://127.0.0.1:9"], "is the server running there?"),
        (["-m", "x", "--max-tokens", "999999"], "'max_tokens' is 999999, and the model's context has 4096 tokens"),
        (["-m", "x", "--temperature", "-1"], "'temperature'"),
        ([], "there is nothing to answer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(server: ServerProcess, arguments: list[str], told: str) -> None:
    done = chat(server.url(""), *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("doorstep chat: ")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


# In a terminal


class Terminal:
    """A program on a pseudo-terminal: what it shows is read, what is typed is written."""

    def __init__(self, command: list[str], url: str) -> None:
        self._ours, theirs = pty.openpty()
        env = {**os.environ, "DOORSTEP_URL": url, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
        # The first terminal that the leader of a session opens is the one whose Ctrl-C is a signal to it.
        opening = ["sh", "-c", 'exec "$@" < "$0" > "$0" 2>&1', os.ttyname(theirs)]
        self.process = subprocess.Popen([*opening, *command], env=env, start_new_session=True)
        self._theirs: int | None = theirs
        self._unread = ""
        self.shown = ""

    def _release(self) -> None:
        """Once the program has the other side open: only then is its end the end of what can be read."""
        if self._theirs is not None:
            os.close(self._theirs)
            self._theirs = None

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, pattern: str, again: str = "") -> str:
        """What is shown up to and including what matches, without colours. While nothing is, `again` is typed."""
        deadline = time.monotonic() + WAIT_S
        while not (found := re.search(pattern, self._unread)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {self.shown!r}"
            before = len(self.shown)
            assert self._read(), f"ended without {pattern!r}: {self.shown!r}"
            if again and len(self.shown) == before:
                self.type(again)
        seen, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return seen

    def _read(self) -> bool:
        """False where the program has ended."""
        if not select.select([self._ours], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._ours, 65536).decode(errors="replace")
        except OSError:  # as Linux says that the other side is closed
            return False
        self._release()
        self.shown += data
        self._unread += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data).replace("\r\n", "\n")
        return bool(data)

    def end(self) -> int:
        while self._read():
            pass
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._release()
        os.close(self._ours)


@contextmanager
def terminal(url: str, *arguments: str) -> Iterator[Terminal]:
    opened = Terminal([*doorstep_command(), "chat", *arguments], url)
    try:
        yield opened
    finally:
        opened.close()


def test_a_conversation_in_a_terminal_remembers_and_begins_anew(server: ServerProcess) -> None:
    with terminal(server.url(""), *EXACT) as person:
        head = person.until(r"\n> ")
        assert head.startswith(f"{NAME} at {server.url('')}\n")
        assert "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer" in head
        person.type("What is 2+2?\n")
        first = person.until(FIGURES)
        assert " 4" in first
        person.until(r"\n> ")
        person.type("Repeat your last answer.\n")
        remembered = person.until(FIGURES)
        person.until(r"\n> ")
        person.type("/reset\n")
        person.until("begun anew")
        person.until(r"\n> ")
        person.type("Repeat your last answer.\n")
        forgotten = person.until(FIGURES)
        assert _answer(remembered) != _answer(forgotten)
        person.until(r"\n> ")
        person.type("/nonsense\n")
        person.until("there is no /nonsense; there are /reset and /exit")
        person.until(r"\n> ")
        person.type("/exit\n")
        assert person.end() == 0
        assert "\x1b[2m" in person.shown  # the figures are dim


def _answer(shown: str) -> str:
    return shown.split("\n", 1)[1].rsplit("\n", 1)[0]


def test_ctrl_c_stops_the_answer_and_not_the_program(server: ServerProcess) -> None:
    with terminal(server.url(""), "--temperature", "0", "--max-tokens", "3000") as person:
        person.until(r"\n> ")
        person.type("Write a very long story about a cat.\n")
        person.until(r"story about a cat\.\n.{20}")  # it has begun
        person.type("\x03")
        person.until(FIGURES + "; stopped")
        person.until(r"\n> ")
        person.type("\x03")  # at the prompt. Python's input() overlooks a signal between its prompt and its waiting
        person.until("Ctrl-D or /exit ends", again="\x03")
        person.until(r"\n> ")
        person.type("\x04")
        assert person.end() == 0


# A server that fails as told


def event(**said: object) -> bytes:
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])


ANSWERS = {
    "fails": piece("so far ") + event(error={"message": "the model's process ended"}),
    "breaks off": piece("so far "),
    "escapes": piece("\x1b[2Jclear\x07") + b": ping\n\ndata: [DONE]\n\n",
    "talks nonsense": b"data: nonsense\n\n",
}


class Told(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._say(json.dumps({"data": [{"id": name} for name in ANSWERS]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._say(ANSWERS[body["model"]])

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def failing() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Told) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("model", "shown", "told"),
    [
        ("fails", "so far \n", "the model's process ended"),
        ("breaks off", "so far \n", "broke off before the answer was complete"),
        ("talks nonsense", "", "answers with what is no JSON object"),
    ],
)
def test_an_error_amid_an_answer_is_one_line(failing: str, model: str, shown: str, told: str) -> None:
    done = chat(failing, model, "-m", "x")
    assert (done.returncode, done.stdout) == (1, shown)
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_a_name_where_there_are_several_they_are_listed(failing: str) -> None:
    done = chat(failing, "-m", "x")
    assert done.returncode == 1
    assert f"name one: {', '.join(ANSWERS)}" in done.stderr


def test_a_conversation_goes_on_after_an_error(failing: str) -> None:
    with terminal(failing, "fails") as person:
        person.until(r"\n> ")
        person.type("hello\n")
        person.until(r"so far \ndoorstep chat: the model's process ended")
        person.until(r"\n> ")
        person.type("\x04")
        assert person.end() == 1  # as the last answer was none


def test_an_answer_does_not_steer_the_terminal(failing: str) -> None:
    with terminal(failing, "escapes") as person:
        person.until(r"\n> ")
        person.type("hello\n")
        assert "\x07" not in person.until(r"\[2Jclear\n")
        assert "\x1b[2J" not in person.shown
        person.process.send_signal(signal.SIGKILL)


# Without a server


def test_the_only_generating_model_is_meant_when_none_is_named() -> None:
    listed = [
        {"id": "minilm", "task": "embed"},
        {"id": "chat", "task": "generate", "parent": None},
        {"id": "polite", "task": "generate", "parent": "chat"},
    ]
    assert choose_model(listed, "", "http://h") == "chat"
    assert choose_model(listed, "polite", "http://h") == "polite"
    assert choose_model(listed, "chat:polite", "http://h") == "chat:polite"
    with pytest.raises(NotFound, match=r"has no model 'x'; there are: chat, minilm \(embed\)"):
        choose_model(listed, "x", "http://h")
    with pytest.raises(NotFound, match=r"no model that generates text; there are: minilm \(embed\)"):
        choose_model(listed[:1], "", "http://h")


def test_events_are_read_whatever_stands_between_them() -> None:
    lines = [b": ping\n", b"\n", b"event: x\n", b"data: a\n", b"data:b\r\n", b"\n", b"data: c\n", b"\n", b"data: cut"]
    assert list(read_events(lines)) == ["a\nb", "c"]


def test_figures_are_of_the_tokens_after_the_first() -> None:
    figures = Figures(began=10.0)
    for now, given in ((10.25, Piece("a")), (10.5, Piece("b")), (11.25, Piece("c")), (12.0, Piece(tokens=5))):
        figures.note(given, now)
    assert str(figures) == "5 tokens, 4.0 tokens/s, first after 250 ms"
    assert str(Figures(began=0.0, said=0)) == "0 tokens"
