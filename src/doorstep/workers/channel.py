"""The worker process's end of the socket: blocking, one reader, any thread may send. Knows no model and no tensor."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from typing import Any

from doorstep.workers.frames import FrameBuffer, Kind, frame

_ANCILLARY_BYTES = socket.CMSG_SPACE(8 * 4)


class Channel:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = FrameBuffer()
        self._frames: deque[tuple[int, Any, bytearray]] = deque()
        self._descriptors: deque[int] = deque()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def receive(self, awake_ns: int = 0) -> tuple[int, Any, bytearray]:
        """The next frame: kind, meta, data. Raises EOFError when the server is gone.

        For `awake_ns` it looks again and again instead of sleeping: being woken takes longer than a small batch."""
        frames = self._frames
        while not frames:
            if awake_ns:
                self._stay_awake(awake_ns)
                awake_ns = 0
            count, ancillary, _, _ = self._sock.recvmsg_into((self._buffer.space(),), _ANCILLARY_BYTES)
            if not count:
                raise EOFError
            for level, type, data in ancillary:
                if level == socket.SOL_SOCKET and type == socket.SCM_RIGHTS:
                    for at in range(0, len(data) - len(data) % 4, 4):
                        self._descriptors.append(int.from_bytes(data[at : at + 4], "little"))
            frames.extend(self._buffer.received(count))
        return frames.popleft()

    def _stay_awake(self, awake_ns: int) -> None:
        """Returns when something has come, or the time is over. Others that want the core get it at once."""
        until = time.monotonic_ns() + awake_ns
        peek, flags = self._sock.recv, socket.MSG_PEEK | socket.MSG_DONTWAIT
        while time.monotonic_ns() < until:
            try:
                peek(1, flags)
                return
            except BlockingIOError:
                os.sched_yield()

    def wait(self, seconds: float | None) -> bool:
        """Whether `receive` would give something without waiting, after waiting at most so long for it."""
        if self._frames or seconds is None:
            return True
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def descriptor(self) -> int:
        """The next descriptor that came beside the frames."""
        return self._descriptors.popleft()

    def send(self, kind: Kind, meta: Any, data: bytes | bytearray = b"") -> None:
        self.send_raw(frame(kind, meta, data))

    def send_raw(self, message: bytes) -> None:
        if os.getpid() != self._pid:  # model code forked and let the copy return: only one may answer
            os._exit(0)
        with self._lock:
            self._sock.sendall(message)
