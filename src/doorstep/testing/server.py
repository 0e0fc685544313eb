"""A server in a process of its own, for tests and benchmarks: started on free ports, waited for, logged, stopped.

Knows no protocol beyond one health URL; `ManagedProcess` runs any server, `ServerProcess` runs `doorstep serve`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

POLL_INTERVAL_S = 0.02
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on loopback


class ServerFailed(RuntimeError):
    """The server ended, or was not ready in time. The text carries its log."""


def free_ports(count: int) -> list[int]:
    """TCP ports of 127.0.0.1 that nobody listens on now. Another process may take one before you do; it is rare."""
    held = [socket.socket() for _ in range(count)]
    try:
        for sock in held:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in held]
    finally:
        for sock in held:
            sock.close()


def answers_ok(url: str, timeout_s: float = 5.0) -> bool:
    """True where a GET of `url` answers 200."""
    try:
        with _DIRECT.open(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


class ManagedProcess:
    """One server process. Its output goes to a file, so that a chatty server never blocks on a full pipe.

    Use it as a context manager: entering starts it and waits until `ready_url` answers 200; leaving stops it.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        ready_url: str,
        name: str = "server",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        start_timeout_s: float = 60.0,
    ) -> None:
        self.argv = list(argv)
        self.ready_url = ready_url
        self.name = name
        self.env = {**os.environ, **(env or {})}
        self.cwd = cwd
        self.start_timeout_s = start_timeout_s
        self.started_ns = 0  # monotonic; when the process was created
        self.process: subprocess.Popen[bytes] | None = None
        handle, path = tempfile.mkstemp(prefix=f"{name}-", suffix=".log")
        os.close(handle)
        self.log_path = Path(path)

    def launch(self) -> None:
        """Creates the process and returns at once."""
        assert self.process is None, f"{self} has been started already"
        with self.log_path.open("ab") as log:
            self.started_ns = time.monotonic_ns()
            self.process = subprocess.Popen(  # noqa: S603 - the caller's own command
                self.argv,
                env=self.env,
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # its children can be ended with it, and a terminal's Ctrl-C is not theirs
            )

    def wait_ready(self) -> None:
        """Returns when the server is ready; raises ServerFailed when it ended or took longer than `start_timeout_s`."""
        deadline = time.monotonic() + self.start_timeout_s
        while not answers_ok(self.ready_url):
            code = self._exited(POLL_INTERVAL_S)
            if code is not None:
                raise ServerFailed(f"{self.name} ended with {code} before it was ready; its log:\n{self.logs()}")
            if time.monotonic() > deadline:
                self.kill()
                raise ServerFailed(f"{self.name} not ready after {self.start_timeout_s} s; its log:\n{self.logs()}")

    def start(self) -> Self:
        self.launch()
        self.wait_ready()
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None, f"{self} has not been started"
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Sends a signal to the server itself, not to its children."""
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """The exit code. Kills the server and raises ServerFailed where it does not end in time."""
        assert self.process is not None
        code = self._exited(timeout_s)
        if code is None:
            self.kill()
            raise ServerFailed(f"{self.name} did not end within {timeout_s} s; its log:\n{self.logs()}")
        return code

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, then the exit code."""
        if self.running:
            self.signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def kill(self) -> None:
        """SIGKILL to the server and to whatever it started and left in its session."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.process.wait()

    def logs(self) -> str:
        """All it has written so far, stdout and stderr together."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def _exited(self, timeout_s: float) -> int | None:
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.running:
                self.stop()
        finally:
            self.kill()
            self.log_path.unlink(missing_ok=True)

    def __repr__(self) -> str:
        state = "not started" if self.process is None else "running" if self.running else "ended"
        return f"<{type(self).__name__} {self.name} {state}>"


class ServerProcess(ManagedProcess):
    """`doorstep serve` on three free ports of 127.0.0.1.

    `options` are appended to the command line as they are: `ServerProcess(models, "--model-control-mode=explicit")`.
    `ready` is the health path to wait for; use "live" where a model is meant to fail.
    """

    def __init__(
        self,
        models: Path | str | Iterable[Path | str],
        *options: str,
        ready: str = "ready",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        start_timeout_s: float = 60.0,
        one_port: bool = False,
    ) -> None:
        ports = free_ports(3)
        self.http_port, self.grpc_port, self.metrics_port = [ports[0]] * 3 if one_port else ports
        repositories = [models] if isinstance(models, (str, Path)) else list(models)
        super().__init__(
            [
                *doorstep_command(),
                "serve",
                *(str(repository) for repository in repositories),
                f"--http-port={self.http_port}",
                f"--grpc-port={self.grpc_port}",
                f"--metrics-port={self.metrics_port}",
                *options,
            ],
            ready_url=f"http://127.0.0.1:{self.http_port}/v2/health/{ready}",
            name="doorstep",
            env=env,
            cwd=cwd,
            start_timeout_s=start_timeout_s,
        )

    @property
    def http(self) -> str:
        """host:port, as tritonclient.http wants it."""
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        """host:port, as grpcio and tritonclient.grpc want it."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def url(self, path: str) -> str:
        """An absolute URL of the HTTP listener: `server.url("/v2/models/x/infer")`."""
        return f"http://{self.http}{path}"


def doorstep_command() -> list[str]:
    """The installed `doorstep` of this interpreter's environment."""
    script = Path(sys.executable).with_name("doorstep")
    found = str(script) if script.exists() else shutil.which("doorstep")
    if found is None:
        raise ServerFailed("the command 'doorstep' is not installed in this environment: pip install -e .")
    return [found]
