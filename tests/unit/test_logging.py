"""The log: formats, switches, lines that cannot be forged, and a writer that never makes the server wait."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doorstep.config.options import ServerOptions
from doorstep.errors import InvalidArgument
from doorstep.observability.access import AccessLine, access_hook
from doorstep.observability.log_format import FORMATTERS, LONGEST_MESSAGE, one_line
from doorstep.observability.log_writer import LineWriter
from doorstep.observability.logging import ACCESS_LOGGER, set_up_logging
from doorstep.request import InferenceRequest
from doorstep.wire.exchange import ConnectionInfo, Exchange
from doorstep.wire.request_id import request_id, with_request_id
from doorstep.workers.loading import log_to_model

OPTIONS = ServerOptions(model_repositories=())
CREATED = 1763832000.180638  # 2025-11-22 17:20:00.180638 UTC


def record(message: Any = "loading: %s:%s", *args: Any, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    args = args or (("resnet", "1") if message == "loading: %s:%s" else ())
    made = logging.LogRecord("doorstep.repository", level, "/src/repository.py", 88, message, args, None)
    made.created, made.msecs = CREATED, 180.0
    vars(made).update(extra)
    return made


def lines(format_name: str, made: logging.LogRecord) -> list[str]:
    return FORMATTERS[format_name]().format(made).split("\n")


# ---- formats


def test_default_format_is_tritons() -> None:
    """I1122 17:08:22.180638 <pid> <file>:<line>] "message" (triton common, logging.cc)."""
    assert lines("default", record()) == [f'I1122 17:20:00.180638 {os.getpid()} repository.py:88] "loading: resnet:1"']
    letters = {logging.DEBUG: "V", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E", logging.CRITICAL: "E"}
    for level, letter in letters.items():
        assert lines("default", record(level=level))[0].startswith(f"{letter}1122 ")


def test_iso8601_format_is_tritons() -> None:
    assert lines("ISO8601", record()) == [f'2025-11-22T17:20:00Z I {os.getpid()} repository.py:88] "loading: resnet:1"']


def test_text_format_says_when_how_bad_and_what(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(
        r"2025-11-2\d \d\d:\d0:00\.180 WARNING disk is full", *lines("text", record("disk is full", level=30))
    )
    made = record("slow callback", level=30)
    made.name = "asyncio"
    assert lines("text", made)[0].endswith(" WARNING asyncio: slow callback"), "a library's lines say whose they are"


def test_json_format_is_one_object_per_line_with_what_the_event_says_of_itself() -> None:
    (line,) = lines("json", record(model="resnet", version="1", seconds=0.25, request_id="a b"))
    assert json.loads(line) == {
        "ts": "2025-11-22T17:20:00.180638Z", "level": "info", "logger": "doorstep.repository",
        "message": "loading: resnet:1", "model": "resnet", "version": "1", "seconds": 0.25, "request_id": "a b",
    }  # fmt: skip


FORGERIES = [
    "a\nI1122 fake] line",
    "a\r\nb",
    "a\x1b[2Jb",
    "a\x00b",
    "a\u2028b",
    "a\x85b",
    "a\u202eb",
    'a"b\\c',
    "a\x7fb",
]


@pytest.mark.parametrize("text", FORGERIES)
@pytest.mark.parametrize("format_name", FORMATTERS)
def test_no_text_of_a_client_begins_a_line_or_steers_a_terminal(format_name: str, text: str) -> None:
    written = FORMATTERS[format_name]().format(record("no model '%s'", text, model=text))
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029\u202e" for c in written.replace("\n", ""))
    if format_name == "json":
        assert json.loads(written)["message"] == f"no model '{text}'"
    assert len(written.splitlines()) == 1


@pytest.mark.parametrize("format_name", FORMATTERS)
def test_lone_surrogates_and_odd_values_can_be_logged(format_name: str, tmp_path: Path) -> None:
    written = FORMATTERS[format_name]().format(
        record("no \ud800 model", where=tmp_path, what={1: {2}}, nan=float("nan"))
    )
    assert written.encode("utf-8", "backslashreplace").count(b"\n") == 0
    if format_name == "json":
        assert json.loads(written)["where"] == str(tmp_path)


@pytest.mark.parametrize("format_name", FORMATTERS)
def test_a_traceback_belongs_visibly_to_its_line(format_name: str) -> None:
    try:
        raise ValueError("first\nI1122 fake] second")
    except ValueError:
        made = record("it failed", level=logging.ERROR)
        made.exc_info = sys.exc_info()
    first, *rest = lines(format_name, made)
    assert "it failed" in first
    if format_name == "json":
        assert "ValueError: first\nI1122 fake] second" in json.loads(first)["exception"]
        assert rest == []
    else:
        assert all(line.startswith("  | ") for line in rest)
        assert rest[0] == "  | Traceback (most recent call last):"


@pytest.mark.parametrize("format_name", FORMATTERS)
def test_a_message_without_end_is_cut(format_name: str) -> None:
    (line,) = lines(format_name, record("x" * 1_000_000))
    assert len(line) < LONGEST_MESSAGE + 300
    assert "(983616 more characters)" in line


def test_ordinary_text_stays_as_it_is() -> None:
    text = "café 模型 'x' → 1.5 ms\\n"
    assert one_line(text) == text


# ---- set up


@pytest.fixture
def restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("doorstep")
    before = root.handlers[:], root.level, ours.level, signal.getsignal(signal.SIGHUP)
    root.handlers[:] = []  # pytest's own: they are not ours to close
    yield
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.handlers[:], root.level, ours.level = before[0], before[1], before[2]
    signal.signal(signal.SIGHUP, before[3])
    logging.captureWarnings(False)
    logging.getLogger().manager._clear_cache()  # type: ignore[attr-defined]


def logged(path: Path, options: ServerOptions) -> list[str]:
    """What stands in the log after one event of each kind."""
    handler = set_up_logging(replace(options, log_file=str(path)))
    ours = logging.getLogger("doorstep.some.room")
    ours.debug("verbose")
    ours.info("info")
    ours.warning("warning")
    ours.error("error")
    ours.critical("critical")
    logging.getLogger("library").info("library info")
    logging.getLogger("library").warning("library warning")
    logging.getLogger(ACCESS_LOGGER).info("access")
    assert handler.writer.flush(30)
    return [line.split(" ", 3)[3] for line in path.read_text().splitlines()]


EVENTS = ["info", "warning", "error", "critical", "library: library warning", "access"]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OPTIONS, EVENTS),
        (replace(OPTIONS, log_verbose=1), ["verbose", *EVENTS]),
        (replace(OPTIONS, log_info=False), EVENTS[1:]),
        (replace(OPTIONS, log_warning=False), ["info", "error", "critical", "access"]),
        (replace(OPTIONS, log_error=False), ["info", "warning", "library: library warning", "access"]),
        (replace(OPTIONS, log_info=False, log_warning=False, log_error=False), ["access"]),
    ],
)
def test_each_switch_concerns_its_own_level(tmp_path: Path, options: ServerOptions, expected: list[str]) -> None:
    assert logged(tmp_path / "log", options) == expected


@pytest.mark.usefixtures("restored")
def test_warnings_of_libraries_are_in_the_log(tmp_path: Path) -> None:
    handler = set_up_logging(replace(OPTIONS, log_file=str(tmp_path / "log")))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("old interface", DeprecationWarning, stacklevel=1)
        logging.captureWarnings(False)
    assert handler.writer.flush(30)
    assert "DeprecationWarning: old interface" in (tmp_path / "log").read_text()


@pytest.mark.usefixtures("restored")
def test_a_log_file_that_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=r"--log-file=.*/missing/log: cannot be opened: No such file or directory"
    ):
        set_up_logging(replace(OPTIONS, log_file=str(tmp_path / "missing" / "log")))


ROTATED = """
import logging, pathlib, signal, sys
from doorstep.config.options import ServerOptions
from doorstep.observability.logging import set_up_logging

path = pathlib.Path(sys.argv[1])
handler = set_up_logging(ServerOptions(model_repositories=(), log_file=str(path)))
logging.getLogger("doorstep").info("before")
assert handler.writer.flush(30)
path.rename(path.with_suffix(".1"))
signal.raise_signal(signal.SIGHUP)
logging.getLogger("doorstep").info("after")
assert handler.writer.flush(30)
"""


def test_sighup_goes_on_in_a_new_file(tmp_path: Path) -> None:
    """In a process of its own: whatever else is loaded in this one may have its own mind about signals."""
    path = tmp_path / "log"
    subprocess.run([sys.executable, "-c", ROTATED, str(path)], check=True, timeout=60)
    assert (tmp_path / "log.1").read_text().splitlines()[-1].endswith("INFO before")
    (line,) = path.read_text().splitlines()
    assert line.endswith("INFO after")


# ---- the writer


def test_lines_of_many_threads_are_whole_and_in_each_threads_order(tmp_path: Path) -> None:
    writer = LineWriter(str(tmp_path / "log"), capacity=100_000)

    def write(thread: int) -> None:
        for number in range(500):
            writer.write(f"{thread} {number}")

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.close(30)
    written = [tuple(map(int, line.split())) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(written) == 4000
    for thread in range(8):
        assert [number for t, number in written if t == thread] == list(range(500))


def test_a_reader_that_does_not_read_costs_lines_not_time_nor_memory() -> None:
    reader, end = os.pipe()
    writer = LineWriter(capacity=100, notice=lambda count: f"{count} lines were dropped")
    writer._descriptor = end
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, b"\n")  # until the pipe is full
    os.set_blocking(end, True)
    for number in range(20_000):
        writer.write(f"{number:06d} {'x' * 90}")
    assert writer._queue.qsize() <= 100
    assert not writer.flush(0.01), "the reader still does not read"
    read = b""
    while not read.endswith(b"lines were dropped\n"):
        read += os.read(reader, 65_536)
    numbers = [int(line[:6]) for line in read.splitlines() if line and b"dropped" not in line]
    dropped = [int(line.split()[0]) for line in read.splitlines() if b"dropped" in line]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + sum(dropped) == 20_000
    assert writer.close(30)
    os.close(reader)
    os.close(end)


def test_a_reader_that_went_away_ends_nothing() -> None:
    reader, end = os.pipe()
    os.close(reader)
    writer = LineWriter()
    writer._descriptor = end
    writer.write("to nobody")
    assert writer.flush(30)
    writer.write("to nobody again")
    assert writer.close(30)
    assert writer._dropped == 2
    os.close(end)


def test_a_descriptor_that_does_not_block_gets_every_line_all_the_same() -> None:
    reader, end = os.pipe()
    os.set_blocking(end, False)
    writer = LineWriter(capacity=10_000)
    writer._descriptor = end
    for number in range(5000):
        writer.write(f"{number:06d} {'x' * 90}")
    read = bytearray()
    while len(read) < 5000 * 98:
        read += os.read(reader, 65_536)
    assert [int(line[:6]) for line in read.splitlines()] == list(range(5000))
    assert writer.close(30)
    os.close(reader)
    os.close(end)


def test_a_writer_that_never_wrote_needs_no_thread(tmp_path: Path) -> None:
    writer = LineWriter(str(tmp_path / "log"))
    assert writer.flush(0)
    assert writer.close(0)
    assert writer._thread is None


# ---- the access log


class FakeExchange(Exchange):
    """What the hook looks at, and no connection."""

    def __init__(self, path: str = "/v2/models/resnet/versions/3/infer", **headers: str) -> None:
        self.method, self.path, self.query = "POST", path, ""
        self.params = {"name": "resnet", "version": "3"}
        self.headers = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
        self.body = b"x" * 100
        self.received_ns = 1_000_000_000
        self.state = None
        self.connection = ConnectionInfo("http", "127.0.0.1:50122")

    disconnected = False

    def respond(self, *_: Any) -> None: ...
    def start(self, *_: Any) -> None: ...
    def write(self, *_: Any) -> bool:
        return True

    def end(self, *_: Any) -> None: ...
    def reset(self) -> None: ...
    def consume(self, size: int) -> None: ...


def access_line(exchange: Exchange, status: int = 200, grpc_status: int | None = None) -> AccessLine:
    return AccessLine(exchange, status, 456, grpc_status, 1_001_234_567)


def test_an_access_line_says_who_what_how_much_and_how_long() -> None:
    line = access_line(FakeExchange(x_request_id="abc-1"))
    assert str(line) == (
        '127.0.0.1:50122 "POST /v2/models/resnet/versions/3/infer HTTP/1.1" 200 in=100 out=456 1.235ms '
        "model=resnet version=3 id=abc-1"
    )
    assert line.fields() == {
        "message": "POST /v2/models/resnet/versions/3/infer 200",
        "peer": "127.0.0.1:50122", "method": "POST", "path": "/v2/models/resnet/versions/3/infer",
        "http_version": "1.1", "status": 200, "bytes_in": 100, "bytes_out": 456, "duration_ms": 1.235,
        "model": "resnet", "version": "3", "request_id": "abc-1",
    }  # fmt: skip


def test_a_grpc_call_is_named_after_its_request() -> None:
    exchange = FakeExchange("/inference.GRPCInferenceService/ModelInfer")
    exchange.params = {}
    exchange.connection = ConnectionInfo("grpc", "127.0.0.1:50122", http_version="2")
    assert str(access_line(exchange, grpc_status=5)) == (
        '127.0.0.1:50122 "POST /inference.GRPCInferenceService/ModelInfer HTTP/2" 200 grpc=5 in=100 out=456 1.235ms'
    )
    exchange.state = InferenceRequest("bert", {}, None, id="17")  # type: ignore[arg-type]
    assert str(access_line(exchange, grpc_status=0)).endswith(" grpc=0 in=100 out=456 1.235ms model=bert id=17")


def test_the_requests_own_id_comes_before_the_headers() -> None:
    exchange = FakeExchange(x_request_id="from-the-header")
    exchange.state = InferenceRequest("resnet", {}, None, id="from the body", model_version="3")  # type: ignore[arg-type]
    assert str(access_line(exchange)).endswith('model=resnet version=3 id="from the body"')
    exchange.state.id = ""
    assert str(access_line(exchange)).endswith("version=3 id=from-the-header")


def test_what_a_client_puts_in_its_names_stays_one_word_of_one_line() -> None:
    exchange = FakeExchange('/v2/models/"x" 200\\')
    exchange.params = {"name": '" 200 out=0\n'}
    text = str(access_line(exchange))
    assert '"POST /v2/models/\\"x\\" 200\\\\ HTTP/1.1"' in text
    assert text.endswith('model="\\" 200 out=0\n"')
    assert len(FakeExchange("/" + "x" * 60_000).path) > len(access_line(FakeExchange("/" + "x" * 60_000)).path) == 2048


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_hook_writes_one_line_per_answer(tmp_path: Path, log_format: str) -> None:
    path = tmp_path / "log"
    handler = set_up_logging(replace(OPTIONS, log_file=str(path), log_format=log_format, log_info=False))
    hook = access_hook(clock=lambda: 1_002_000_000)
    hook(FakeExchange(), 200, 1, None)
    hook(FakeExchange(), 503, 2, None)
    assert handler.writer.flush(30)
    written = path.read_text().splitlines()
    assert len(written) == 2
    if log_format == "json":
        assert [json.loads(line)["status"] for line in written] == [200, 503]
        assert json.loads(written[0])["logger"] == "doorstep.access"
    else:
        assert written[1].endswith('HTTP/1.1" 503 in=100 out=2 2.000ms model=resnet version=3')


# ---- request ids


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"abc-123", b"abc-123"),
        (b"x" * 128, b"x" * 128),
        (b"x" * 129, b""),
        (b"", b""),
        (b"two words", b""),
        (b"tab\there", b""),
        (b"caf\xc3\xa9", b""),
        (b"a\r\nset-cookie: b", b""),
    ],
)
def test_a_request_id_is_visible_ascii_or_nothing(value: bytes, found: bytes) -> None:
    assert request_id({b"x-request-id": value}) == found
    headers = ((b"content-type", b"application/json"),)
    echoed = with_request_id({b"x-request-id": value}, headers)
    assert tuple(echoed) == (*headers, *([(b"x-request-id", found)] if found else []))


def test_no_request_id_is_made_up() -> None:
    assert request_id({}) == b""
    headers = ((b"content-type", b"application/json"),)
    assert with_request_id({}, headers) is headers


def test_what_a_model_says_is_not_said_by_a_file_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "doorstep.model"):
        log_to_model("INFO", "add_sub_0 | loading")
    [said] = caplog.records
    assert lines("default", said)[0].endswith('model.py:0] "add_sub_0 | loading"')
