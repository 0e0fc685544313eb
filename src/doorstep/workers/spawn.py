"""Starts a worker process, talks with it while it loads, and ends it. Blocking. Knows no event loop and no batch.

The process is a fresh interpreter in a session of its own (Ctrl-C in the terminal does not reach it before the server
has drained), inherits four descriptors and no more, and cannot outlive the server.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import doorstep
from doorstep.backends.base import PythonEnvironment
from doorstep.errors import BackendError, ConfigError, DoorstepError, ErrorCode, Problem
from doorstep.workers.frames import FrameBuffer, Kind, ProtocolError, frame
from doorstep.workers.output import LineBudget, LineReader
from doorstep.workers.shared_memory import make_memory

FLAG_BYTES = 16384  # as in child.py, which must not be imported here
Log = Callable[[str, str], None]

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)


_STACK = re.compile(r"\s|Traceback |Current thread |Thread 0x|Extension modules:")  # Python's, and faulthandler's
_FRAME_OF_MODEL = re.compile(r'\s+File "[^"]*?([^/"]+/[0-9]+/[^/"]+)"(, line .*)')


class ProcessEnded(BackendError):
    """The process ended where it should have answered."""


class Process:
    """A worker process and our ends of all that connects us. One owner at a time: a loader's thread, then the loop."""

    def __init__(self, name: str, log: Log, *, threads: int = 0, python: PythonEnvironment | None = None) -> None:
        """Starts it; the process is importing when this returns. Raises OSError."""
        self.name = name
        self.threads = threads
        self.python = python
        self.budget = LineBudget(lambda level, line: log(level, f"{self.name} | {line}"))
        self.frames = FrameBuffer()
        self._arrived: list[tuple[int, Any, bytearray]] = []
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        side, side_theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        lifeline_theirs, self._lifeline = os.pipe()
        out, out_theirs = os.pipe()
        err, err_theirs = os.pipe()
        flags_fd = make_memory(FLAG_BYTES, "doorstep-flags")
        given = (theirs.fileno(), side_theirs.fileno(), flags_fd, lifeline_theirs)
        try:
            self.flags = mmap.mmap(flags_fd, FLAG_BYTES)
            self._popen = subprocess.Popen(  # noqa: S603
                [*_command(python), *map(str, given)],
                stdin=subprocess.DEVNULL,
                stdout=out_theirs,
                stderr=err_theirs,
                pass_fds=given,
                start_new_session=True,
                env=_environment(threads, python),
            )
        except BaseException:
            ours.close()
            side.close()
            for fd in (self._lifeline, out, err):
                os.close(fd)
            raise
        finally:
            theirs.close()
            side_theirs.close()
            for fd in (flags_fd, lifeline_theirs, out_theirs, err_theirs):
                os.close(fd)
        self.sock = ours
        self.sock.setblocking(False)
        side.setblocking(False)
        self._side: socket.socket | None = side
        self.pid = self._popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.streams = [
            LineReader(out, lambda line: self.budget("INFO", line)),
            LineReader(err, lambda line: self.budget("WARNING", line)),
        ]

    def __repr__(self) -> str:
        return f"<Process {self.pid} of {self.name}>"

    def take_side(self) -> socket.socket:
        """The side socket, for its one owner on the event loop."""
        side, self._side = self._side, None
        assert side is not None
        return side

    def ask(self, kind: Kind, meta: Any, data: bytes = b"", *, timeout: float) -> tuple[int, Any, bytearray]:
        """Sends a frame and waits for the answer, while what the process prints is logged.

        Raises the error the process answered with, ProcessEnded, or TimeoutError."""
        message = memoryview(frame(kind, meta, data))
        deadline = time.monotonic() + timeout
        while message:
            try:
                message = message[self.sock.send(message) :]
            except BlockingIOError:
                _poll((self.sock.fileno(),), 1.0, select.POLLOUT)
                if time.monotonic() > deadline:
                    raise TimeoutError from None
            except OSError:
                break  # it has ended: the answer says so
        return self.answer(deadline)

    def answer(self, deadline: float) -> tuple[int, Any, bytearray]:
        """The next frame but for log messages. Raises as `ask` does."""
        while True:
            found = self._next()
            if found is not None:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            ready = self._poll(left, self.sock.fileno(), self.pidfd)
            ended = self.pidfd in ready
            if self.sock.fileno() in ready and not self.receive():
                ended = True
            if ended:
                self._receive_all()
                found = self._next()
                if found is not None:
                    return found
                raise ProcessEnded(f"the process of '{self.name}' ended: {self.end()}{self.last_words()}")

    def _poll(self, seconds: float, *fds: int) -> set[int]:
        """Waits for any of `fds`, or for something the process prints, and logs that. Which of `fds` are ready."""
        streams = {stream.fd: stream for stream in self.streams if stream.fd >= 0}
        ready = _poll((*fds, *streams), seconds)
        for fd in ready:
            if fd in streams and not streams[fd].read():
                streams[fd].close()
        return ready

    def _next(self) -> tuple[int, Any, bytearray] | None:
        while self._arrived:
            kind, meta, data = self._arrived.pop(0)
            if kind == Kind.LOG:
                self.budget(*log_line(meta))
            elif kind == Kind.FAILED:
                raise failure(meta)
            else:
                return kind, meta, data
        return None

    def receive(self) -> bool:
        """Receives once, without waiting. False at the end."""
        try:
            count = self.sock.recv_into(self.frames.space())
        except BlockingIOError:
            return True
        except OSError:
            return False
        if count:
            self._arrived.extend(self.frames.received(count))
        return count > 0

    def _receive_all(self) -> None:
        while True:
            before = len(self._arrived)
            if not self.receive() or len(self._arrived) == before:
                return

    def last_words(self) -> str:
        """What it last printed to stderr, as the end of an error's text."""
        for stream in self.streams:
            stream.close()
        lines = [told for line in self.streams[1].last if (told := _for_clients(line))]
        return "; its last output: " + " | ".join(lines)[-2000:] if lines else ""

    def signal(self, number: int) -> None:
        """To the process and all it has started. Not once it is reaped: its number may be somebody else's."""
        if self._popen.returncode is not None:
            return
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def wait(self, seconds: float) -> bool:
        """Waits for its end; logs what it prints meanwhile. False if it is still there."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self.pidfd in self._poll(left, self.pidfd):
                return True
        return self.pidfd in _poll((self.pidfd,), 0)

    def end(self) -> str:
        """Kills what is left of it and reaps it. In words: how it ended. May be called twice."""
        self.signal(signal.SIGKILL)
        code = self._popen.wait()
        return how_ended(code)

    def close(self) -> None:
        """Ends it, if need be, and gives back everything."""
        self.end()
        if self.pidfd < 0:
            return
        for stream in self.streams:
            stream.close()
        self.budget.flush()
        self.sock.close()
        if self._side is not None:
            self._side.close()
        os.close(self.pidfd)
        os.close(self._lifeline)
        self.pidfd = self._lifeline = -1

    def where_it_hangs(self) -> str:
        """Ends a process that does not answer; faulthandler in it prints every thread's stack first."""
        self.signal(signal.SIGABRT)
        self.wait(2.0)
        self.end()
        return self.last_words()


def _poll(fds: Iterable[int], seconds: float, events: int = select.POLLIN) -> set[int]:
    """Which of `fds` are ready. (Not `select`: a busy server has descriptors above 1023.)"""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, events)
    return {fd for fd, _ in poll.poll(math.ceil(max(0.0, seconds) * 1000))}


def _for_clients(line: str) -> str:
    """A line of stderr as clients may read it: of stacks only the frames in the model's own files.

    The log has all of it."""
    if frame_ := _FRAME_OF_MODEL.fullmatch(line):
        return frame_[1] + frame_[2]
    return "" if _STACK.match(line) else line


def _command(python: PythonEnvironment | None) -> list[str]:
    if python is None:
        return [sys.executable, "-P", "-m", "doorstep.workers.child"]
    package = Path(doorstep.__file__).parent
    told = {
        "first": python.paths,
        "last": [str(package.parent), *(path for path in sys.path if os.path.isabs(path) and os.path.isdir(path))],
        "package": str(package),
        "version": sys.version_info[:2],
    }
    executable = str(python.executable or sys.executable)
    return [executable, str(package / "workers" / "boot.py"), json.dumps(told)]


def _environment(threads: int, python: PythonEnvironment | None) -> Mapping[str, str]:
    env = dict(os.environ)
    if python is not None:
        if python.executable is not None:
            for name in ("PYTHONHOME", "__PYVENV_LAUNCHER__"):  # they say where another Python's library is
                env.pop(name, None)
        env.update(python.variables)
    if threads > 0:
        for name in _THREAD_VARIABLES:
            env.setdefault(name, str(threads))
    return env


def how_ended(code: int) -> str:
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


def log_line(meta: Any) -> tuple[str, str]:
    """Level and text of a LOG frame."""
    try:
        level, message = meta
    except (TypeError, ValueError):
        raise ProtocolError("a log message that is none") from None
    return str(level), str(message)[:65536]


def failure(meta: Any) -> DoorstepError:
    """The error a FAILED frame speaks of."""
    try:
        if "problems" in meta:
            return ConfigError(meta["model"], [Problem(*map(str, row)) for row in meta["problems"]])
        return BackendError(str(meta["message"]), code=ErrorCode(meta["code"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"an error that is none: {error!r}") from None
