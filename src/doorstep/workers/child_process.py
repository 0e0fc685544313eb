"""What a worker process arranges for itself: its name, its end, its log. Knows no socket and no model."""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path


def print_traceback(error: BaseException) -> None:
    try:
        traceback.print_exception(error)
    except Exception:  # noqa: S110 (model code closed or replaced stderr: nobody is left to tell)
        pass


class LogHandler(logging.Handler):
    """What doorstep's own code logs in this process goes to the server as it is."""

    _LEVELS = {"DEBUG": "VERBOSE", "CRITICAL": "ERROR"}

    def __init__(self, log: Callable[[str, str], None]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        level = self._LEVELS.get(record.levelname, record.levelname)
        self._log(level, self.format(record))


def name_process(name: str) -> None:
    """What `ps` and `top` call it."""
    try:
        Path("/proc/self/comm").write_text(f"ds:{name}"[:15])
    except OSError:
        pass


def end_with_the_server(lifeline: int) -> None:
    """The kernel kills this process as soon as the server's end of the pipe is closed, however the server ended.

    Unlike PR_SET_PDEATHSIG this does not depend on the thread that started the process; unlike reading the pipe, it
    works while model code holds the interpreter's lock.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:
        os._exit(0)  # it ended while we started
