"""Writes trace files without ever making a request wait. Knows Triton's files, and nothing of who is traced.

A thread formats and writes, fed by a queue bounded in records and in bytes of tensors; what does not fit is dropped,
and the log says how many. A file is a whole JSON array after every write, so that it can be read while the server runs
and after it was killed; Triton's is one only when the server has ended.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from doorstep.observability.trace_format import record_text
from doorstep.trace import Record
from doorstep.types import BYTES

logger = logging.getLogger("doorstep.trace")

MOST_RECORDS = 8192  # that wait to be written
MOST_BYTES = 256 << 20  # of tensors in those
_GATHERED = 16 << 20  # characters; more are written to an indexed file before it has its number of traces


class TraceFile:
    """One path: the file itself, and those with a number after its name. Touched only from the writer's thread."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._descriptor = -1
        self._index = 0

    def append(self, text: str) -> None:
        """Raises OSError. The first write replaces what was there before the server started."""
        if self._descriptor < 0:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                _write_all(self._descriptor, f"[{text}]".encode())
            except OSError:  # the disk is full: the next one begins it again
                self.close()
                raise
            return
        end = os.lseek(self._descriptor, -1, os.SEEK_END)  # over the bracket
        try:
            _write_all(self._descriptor, f",{text}]".encode())
        except OSError:  # the disk is full: as it was. Where nothing was written, the bracket is still there
            os.ftruncate(self._descriptor, end + 1)
            with suppress(OSError):
                os.pwrite(self._descriptor, b"]", end)
            raise

    def write_indexed(self, text: str) -> None:
        """Raises OSError."""
        path = f"{self.path}.{self._index}"
        self._index += 1
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write_all(descriptor, f"[{text}]".encode())
        finally:
            os.close(descriptor)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


class _Gathered:
    """What has been formatted under one setting and is not in a file yet."""

    __slots__ = ("count", "size", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.count = 0
        self.size = 0


class TraceFileWriter:
    """A sink for records (trace_settings.Sink). Its methods are called on the event loop; the rest is the thread's."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._held = 0  # bytes of tensors that wait; written by both sides, under the lock
        self._lock = threading.Lock()
        self._dropped = 0
        self._files: dict[str, TraceFile] = {}
        self._gathered: dict[Any, _Gathered] = {}
        self._failed: set[str] = set()  # paths whose failure the log has been told of

    # On the event loop

    def write(self, record: Record, ends_file: bool) -> None:
        size = _tensor_bytes(record) if record.tensors else 0
        if self._queue.qsize() >= MOST_RECORDS or self._held + size > MOST_BYTES:
            self._dropped += 1
            return
        with self._lock:
            self._held += size
        self._put(lambda: self._take(record, size, ends_file))

    def settle(self, setting: Any) -> None:
        if self._thread is not None:
            self._put(lambda: self._finish(setting))

    def close(self, timeout_s: float) -> bool:
        """Writes what was gathered. False: it did not come to that, after `timeout_s`."""
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _put(self, job: Callable[[], None]) -> None:
        self._queue.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="doorstep-trace", daemon=True)
            self._thread.start()

    # In the thread

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("a trace cannot be written")
            if self._dropped:
                count, self._dropped = self._dropped, 0
                logger.warning("%d traces were dropped: they come faster than they can be written", count)
        for setting in list(self._gathered):
            self._finish(setting)
        for file in self._files.values():
            file.close()

    def _take(self, record: Record, size: int, ends_file: bool) -> None:
        try:
            text = record_text(record)
        finally:
            with self._lock:
                self._held -= size
        if not text:
            return
        setting = record.setting
        frequency = setting.values.log_frequency
        if not frequency and not ends_file and setting.count < 0:
            self._save(setting.file, text, indexed=False)
            return
        gathered = self._gathered.setdefault(setting, _Gathered())
        gathered.texts.append(text)
        gathered.count += 1
        gathered.size += len(text)
        if ends_file or (frequency and gathered.count >= frequency) or gathered.size > _GATHERED:
            del self._gathered[setting]
            self._save(setting.file, ",".join(gathered.texts), indexed=ends_file or bool(frequency))

    def _finish(self, setting: Any) -> None:
        """No more comes under this setting."""
        gathered = self._gathered.pop(setting, None)
        if gathered is not None:
            self._save(setting.file, ",".join(gathered.texts), indexed=bool(setting.values.log_frequency))

    def _save(self, path: str, text: str, *, indexed: bool) -> None:
        file = self._files.setdefault(path, TraceFile(path))
        try:
            if indexed:
                file.write_indexed(text)
            else:
                file.append(text)
        except OSError as error:
            if path not in self._failed:
                self._failed.add(path)
                logger.error("failed creating trace file: %s: %s", path, error.strerror)
        else:
            self._failed.discard(path)


def _tensor_bytes(record: Record) -> int:
    total = 0
    for trace in record.traces:
        for kept in trace.tensors:
            array = kept.tensor.array
            total += sum(map(len, array.flat)) if kept.tensor.datatype is BYTES else array.nbytes
    return total
