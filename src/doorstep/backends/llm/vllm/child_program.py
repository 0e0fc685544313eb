"""A program that serves on a socket, as a child of this process: started, logged, ended. Knows no engine.

It cannot outlive this process, however that ends, and neither can what it starts: the kernel kills its process group
once our end of a pipe is closed. (PR_SET_PDEATHSIG would hang on the thread that starts it, and spare its children.)
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from doorstep.errors import BackendError

END_S = 10.0  # from SIGTERM to SIGKILL
_LAST_LINES = 12
_LONGEST_LINE = 4000
# Becomes the program, once the pipe's end means its end; no code of ours runs between a fork and an exec that way.
_GUARD = """
import fcntl, os, select, signal, sys
fd = int(sys.argv[1])
fcntl.fcntl(fd, fcntl.F_SETOWN, -os.getpgrp())
fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGKILL)
fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
if select.select([fd], [], [], 0)[0]:
    os._exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""
# vLLM, uvicorn and Python's logging write a level at the beginning; vLLM may write before it whose line it is.
_LEVEL = re.compile(r"(?:\([^)]*\)\s*)?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_LEVELS = {"DEBUG": "VERBOSE", "CRITICAL": "ERROR"}


def find_program(command: str) -> str:
    """The path of a program: as it is, on the PATH, or beside this Python. Raises BackendError."""
    found = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if found is None:
        raise BackendError(f"there is no program '{command}'")
    return os.path.abspath(found)


class ChildProgram:
    """`on_end(how)` is called in a thread of ours, if it ends before `stop`."""

    def __init__(
        self,
        argv: Sequence[str],
        variables: Mapping[str, str],
        log: Callable[[str, str], None],
        on_end: Callable[[str], None],
    ) -> None:
        """Starts it; `argv` begins with a path. Raises BackendError."""
        self._log = log
        self._on_end = on_end
        self._stopping = False
        self.ended = threading.Event()
        self._lines: deque[str] = deque(maxlen=_LAST_LINES)
        lifeline, self._lifeline = os.pipe()
        try:
            self._popen = subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", _GUARD, str(lifeline), *argv],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(lifeline,),
                process_group=0,
                env={**os.environ, **variables},
            )
        except OSError as error:
            os.close(self._lifeline)
            raise BackendError(f"{argv[0]} cannot be started: {error.strerror}") from None
        finally:
            os.close(lifeline)
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, name="doorstep-child-log", daemon=True)
        self._reader.start()
        threading.Thread(target=self._watch, name="doorstep-child-end", daemon=True).start()

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def last_words(self) -> str:
        """The last lines that it wrote, for an error's text."""
        if self.ended.is_set():
            self._reader.join(1.0)  # unless what it started has its output still
        return "\n".join(self._lines)

    def stop(self) -> None:
        """Ends it and all it started. Returns when it has ended."""
        self._stopping = True
        self._signal(os.kill, signal.SIGTERM)  # it ends what it started; `_watch` ends what is left
        if not self.ended.wait(END_S):
            self._signal(os.killpg, signal.SIGKILL)
            self.ended.wait()
        with suppress(OSError):
            os.close(self._lifeline)

    def _signal(self, send: Callable[[int, int], None], number: int) -> None:
        # Until `_watch` has reaped it, its number is nobody else's.
        if not self.ended.is_set():
            with suppress(ProcessLookupError, PermissionError):
                send(self.pid, number)

    def _watch(self) -> None:
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # what it started and left
        code = self._popen.wait()
        self.ended.set()
        if not self._stopping:
            self._on_end(_how(code))

    def _read(self) -> None:
        assert self._popen.stdout is not None
        level = "INFO"
        with self._popen.stdout as output:
            for raw in output:
                line = raw.decode("utf-8", "replace").rpartition("\r")[2].strip("\n")[:_LONGEST_LINE]  # or a bar's last
                if not line.strip():
                    continue
                if found := _LEVEL.match(line):
                    level = _LEVELS.get(found[1], found[1])
                elif line.startswith("Traceback "):
                    level = "ERROR"  # until a line says otherwise
                elif level != "ERROR" and not line.startswith((" ", "\t")):  # not the rest of a message
                    level = "INFO"
                self._lines.append(line)
                with suppress(OSError):  # the server is gone, and we will be
                    self._log(level, line)


def _how(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
