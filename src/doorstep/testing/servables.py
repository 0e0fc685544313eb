"""Stand-ins for loaded models and for what loads them, under a test's control. Knows no library and runs nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf import text_format

from doorstep import proto
from doorstep.errors import ConfigError, Problem
from doorstep.repository.base import VersionSpec


class FakeServable:
    """Counts the requests that a test begins and ends on it, and says what became of it."""

    def __init__(self, spec: VersionSpec, content: str = "") -> None:
        self.spec = spec
        self.content = content  # of the version's file `model`, as it was when it was loaded
        self.inflight_count = 0
        self.stopped = False
        self.closed = threading.Event()
        self._idle: asyncio.Event | None = None

    def begin(self) -> None:
        assert not self.stopped, f"{self} was asked to run after it was stopped"
        assert not self.closed.is_set(), f"{self} was asked to run after it was closed"
        self.inflight_count += 1

    def end(self) -> None:
        assert not self.closed.is_set(), f"{self} was closed with a request in flight"
        self.inflight_count -= 1
        if self._idle is not None and not self.inflight_count:
            self._idle.set()

    def stop(self) -> None:
        self.stopped = True

    async def drain(self) -> None:
        if self.inflight_count:
            self._idle = asyncio.Event()
            await self._idle.wait()

    def close(self) -> None:
        assert not self.closed.is_set(), f"{self} was closed twice"
        self.closed.set()

    def __repr__(self) -> str:
        return f"<FakeServable {self.spec.name}:{self.spec.version} {self.content!r}>"


class FakeLoader:
    """A `load_model` that makes FakeServables; a test may make it fail, or wait, for a version."""

    def __init__(self) -> None:
        self.made: list[FakeServable] = []
        self.calls: list[str] = []  # "name:version", in order
        self.failures: dict[str, Callable[[], BaseException]] = {}
        self._gates: dict[str, threading.Event] = {}
        self._entered: dict[str, threading.Event] = {}

    def __call__(self, spec: VersionSpec) -> FakeServable:
        key = f"{spec.name}:{spec.version}"
        self.calls.append(key)
        if key in self._gates:
            self._entered[key].set()
            assert self._gates[key].wait(60), f"nobody opened the gate of {key}"
        if key in self.failures:
            raise self.failures[key]()
        file = spec.version_directory / "model"
        servable = FakeServable(spec, file.read_text() if file.exists() else "")
        self.made.append(servable)
        return servable

    def hold(self, key: str) -> None:
        """From now on loading `key` waits for `let_go`."""
        self._gates[key] = threading.Event()
        self._entered[key] = threading.Event()

    async def entered(self, key: str) -> None:
        """Returns when a load of `key` is waiting."""
        assert await asyncio.to_thread(self._entered[key].wait, 60)

    def let_go(self, key: str) -> None:
        self._gates.pop(key).set()


def read_config(model_directory: Path, name: str) -> Any:
    """The message in config.pbtxt, or an empty one; ConfigError for one that cannot be parsed."""
    message = proto.ModelConfig()
    try:
        text_format.Parse((model_directory / "config.pbtxt").read_text(), message)
    except FileNotFoundError:
        pass
    except text_format.ParseError as error:
        raise ConfigError(name, [Problem(f"{name}/config.pbtxt", str(error))]) from None
    return message


def write_version(
    repository: Path, name: str, version: int | str, content: str = "", config: str | None = None
) -> Path:
    """Puts a version of a model into a repository, or changes it. Returns the version's directory."""
    directory = repository / name / str(version)
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / "model.new"
    fresh.write_text(content)
    fresh.replace(directory / "model")  # a new inode, as a careful copy would make
    if config is not None:
        (repository / name / "config.pbtxt").write_text(config)
    return directory
