"""What a worker process prints, as log lines: bounded in length, number and bytes. Knows no process and no logger.

A model that prints megabytes must neither grow the server nor keep its loop busy: lines over the budget are counted and
dropped, and a reader over its byte budget asks not to be called again before the second is over.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable

LINE_BYTES = 8192  # the rest of a longer line is dropped
LINES_PER_SECOND = 500
BYTES_PER_SECOND = 8 * 1024 * 1024
CHUNK_BYTES = 64 * 1024
LAST_LINES = 20


class LineBudget:
    """How many lines per second one process may log; shared by all its streams."""

    def __init__(self, emit: Callable[[str, str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._second = 0.0
        self._lines = 0
        self.dropped = 0

    def __call__(self, level: str, line: str) -> None:
        now = self._clock()
        if now - self._second >= 1.0:
            self._start(now)
        self._lines += 1
        if self._lines <= LINES_PER_SECOND:
            self._emit(level, line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Tells how many lines were dropped, if any. Called when the second is over, or the process has ended."""
        self._start(self._clock())

    def _start(self, now: float) -> None:
        dropped, self.dropped = self.dropped, 0
        self._second = now
        self._lines = 0
        if dropped:
            self._emit("WARNING", f"{dropped} lines not shown: over {LINES_PER_SECOND} in a second")


class LineReader:
    """One stream of a process: a pipe's end in, lines out."""

    def __init__(self, fd: int, emit: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """Takes `fd`."""
        self.fd = fd
        self.last: deque[str] = deque(maxlen=LAST_LINES)
        self._emit = emit
        self._clock = clock
        self._rest = b""
        self._skipping = False  # in the rest of a line that was too long
        self._second = 0.0
        self._bytes = 0
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Reads what is there, up to a chunk. False at the end of the stream."""
        try:
            data = os.read(self.fd, CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            data = b""
        if not data:
            if self._rest:
                self._line(self._rest)
                self._rest = b""
            return False
        self.feed(data)
        return True

    def feed(self, data: bytes) -> None:
        now = self._clock()
        if now - self._second >= 1.0:
            self._second = now
            self._bytes = 0
        self._bytes += len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            if self._skipping:
                self._skipping = False
            else:
                self._line(line)
        self._rest = rest
        if self._skipping:
            self._rest = b""
        elif len(rest) > LINE_BYTES:
            self._line(rest)
            self._skipping = True
            self._rest = b""

    def over_budget(self) -> bool:
        """Whether it has read more in this second than it should."""
        return self._bytes > BYTES_PER_SECOND and self._clock() - self._second < 1.0

    def close(self) -> None:
        """Reads what is left, and closes."""
        if self.fd < 0:
            return
        for _ in range(16):  # a pipe holds no more than that; a grandchild may still be writing
            if not self.read() or len(self._rest) == 0:
                break
        os.close(self.fd)
        self.fd = -1

    def _line(self, line: bytes) -> None:
        text = line[:LINE_BYTES].decode("utf-8", "backslashreplace").rstrip()
        if "\r" in text:
            text = text.rsplit("\r", 1)[1]  # a progress bar: what a terminal would show
        if len(line) > LINE_BYTES:
            text += " … (line cut)"
        if not text:
            return
        if not text.isprintable():
            text = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)
        self.last.append(text)
        self._emit(text)
