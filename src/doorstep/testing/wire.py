"""A listener with endpoints of the test's choosing, on a loop in a thread; and a raw client. Knows no model.

For tests of the wire: real sockets, real bytes, and a look at the server's own state afterwards.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import uvloop

from doorstep.wire.context import ListenerContext
from doorstep.wire.limits import WireLimits
from doorstep.wire.listener import Address, Listener
from doorstep.wire.router import Router

Result = TypeVar("Result")
_PATIENCE_S = 20.0  # how long a test waits for something that must happen


class WireServer:
    """A context manager: open inside the block; on leaving, every connection must go away by itself or be broken."""

    def __init__(self, router: Router, limits: WireLimits | None = None, **address: Any) -> None:
        self.context = ListenerContext("http", router, limits)
        self.listener = Listener(self.context, Address(**{"name": "http", **address}), certificate_check_s=0.05)
        self.errors: list[dict[str, Any]] = []  # what reached the loop's exception handler: bugs, all of them
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire-server", daemon=True)

    @property
    def port(self) -> int:
        return self.listener.port

    @property
    def url(self) -> str:
        return self.listener.url

    def __enter__(self) -> Self:
        self._loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self._thread.start()
        try:
            self.run(self.listener.open())
        except BaseException:
            self._end_loop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self.listener.close(0.0))
        self._end_loop()
        assert not self.errors, self.errors

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_PATIENCE_S)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def run(self, coroutine: Any) -> Any:
        """The result of a coroutine, run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_PATIENCE_S)

    def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function, called on the server's loop."""

        async def call() -> Result:
            return function()

        return self.run(call())  # type: ignore[no-any-return]

    def wait_until_empty(self) -> None:
        """Returns when the listener has no connection left; fails the test if that takes too long."""
        self.run(self.context.connections.empty())

    def connect(self) -> RawClient:
        if self.listener.address.path:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.listener.address.path)
        else:
            sock = socket.create_connection(("127.0.0.1", self.port))
        return RawClient(sock)


class RawClient:
    """A socket that sends and receives exact bytes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._buffer = b""
        sock.settimeout(_PATIENCE_S)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_until_refused(self, data: bytes) -> None:
        """Sends as much of `data` as the server puts up with."""
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive_until(self, end: bytes) -> bytes:
        """Bytes up to and including `end`."""
        while end not in self._buffer:
            data = self.sock.recv(65_536)
            if not data:
                raise ConnectionError(f"closed after {self._buffer!r}")
            self._buffer += data
        found, _, self._buffer = self._buffer.partition(end)
        return found + end

    def receive_exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            data = self.sock.recv(1 << 20)
            if not data:
                raise ConnectionError(f"closed after {len(self._buffer)} of {size} bytes")
            self._buffer += data
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def receive_all(self) -> bytes:
        """Bytes until the server closes; a reset counts as closing."""
        try:
            while data := self.sock.recv(1 << 20):
                self._buffer += data
        except ConnectionResetError:
            pass
        found, self._buffer = self._buffer, b""
        return found

    def receive_answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case and body of one answer that has a content-length."""
        head = self.receive_until(b"\r\n\r\n").decode("latin-1")
        line, *fields = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        return int(line.split()[1]), headers, self.receive_exactly(int(headers.get("content-length", "0")))

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
