"""Gets lines onto a file descriptor without ever making the caller wait. Knows no record and no format.

Writing to a pipe whose reader is slow, or to a slow disk, blocks; on the event loop that would hold up every request.
So a thread writes, fed by a bounded queue: when it is full, lines are dropped and counted, and the count is said as
soon as there is room again. Memory stays bounded, and so does the wait at exit.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

CAPACITY = 4096  # lines
_BATCH = 256  # lines per write


class LineWriter:
    """`write` may be called from any thread, and from a signal handler."""

    def __init__(self, path: str = "", *, capacity: int = CAPACITY, notice: Callable[[int], str] | None = None) -> None:
        """Writes to standard error, or appends to `path`, which is opened here (OSError).

        `notice(count)` words the line that says how many lines were dropped."""
        self._path = path
        self._capacity = capacity
        self._notice = notice
        self._queue: SimpleQueue[bytes | Callable[[], None]] = SimpleQueue()
        self._dropped = 0  # a race between two threads may lose one of the count
        self._descriptor = _open(path) if path else 2
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._stopped = False

    def write(self, line: str) -> None:
        """Queues one line, without its end."""
        if self._queue.qsize() >= self._capacity:
            self._dropped += 1
            return
        self._queue.put(line.encode("utf-8", "backslashreplace") + b"\n")
        if self._thread is None:
            self._start()

    def flush(self, timeout_s: float) -> bool:
        """Waits until what was queued is written. False: it is not, after `timeout_s`."""
        if self._thread is None:
            return True
        written = threading.Event()
        self._queue.put(written.set)
        return written.wait(timeout_s)

    def reopen(self) -> None:
        """Goes on in a new file of the same name: a log rotator has renamed the old one. Safe in a signal handler."""
        if self._path:
            self._queue.put(self._reopen)

    def close(self, timeout_s: float) -> bool:
        """Writes what was queued, and lets go of the file. False: it did not come to that, after `timeout_s`."""
        if self._thread is not None:
            self._queue.put(self._stop)
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
        if self._path and not self._stopped:
            self._stop()
        return True

    def _stop(self) -> None:
        self._stopped = True
        if self._path:
            os.close(self._descriptor)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="doorstep-log", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        queue = self._queue
        while not self._stopped:
            item = queue.get()
            batch: list[bytes] = []
            while True:
                if isinstance(item, bytes):
                    batch.append(item)
                if not isinstance(item, bytes) or len(batch) == _BATCH:
                    break
                try:
                    item = queue.get_nowait()
                except Empty:
                    break
            if self._dropped and self._notice is not None:
                count, self._dropped = self._dropped, 0
                batch.append(self._notice(count).encode() + b"\n")
            self._put(b"".join(batch), len(batch))
            if not isinstance(item, bytes):
                item()

    def _put(self, data: bytes, lines: int) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # somebody made the terminal or pipe non-blocking
                select.select([], [self._descriptor], [])
            except OSError:  # the reader has gone, the disk is full: nobody is left to be told
                self._dropped += lines
                return

    def _reopen(self) -> None:
        try:
            fresh = _open(self._path)
        except OSError as error:
            self._put(f"cannot reopen {self._path}: {error.strerror}\n".encode(), 1)
            return
        os.close(self._descriptor)
        self._descriptor = fresh


def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
