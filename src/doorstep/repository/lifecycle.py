"""The life of every model version, from LOADING to UNAVAILABLE, as one table. Loads nothing, publishes nothing.

    LOADING ──▶ READY ──▶ UNLOADING ──▶ UNAVAILABLE
       │                      ▲              ▲
       ├── never published ───┘              │
       └── failed ───────────────────────────┘

A `Life` is one loading of one version; a version that is reloaded has a new one, while the old one still serves. The
index shows the life in the foreground: the one that serves, else the newest.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from doorstep.repository.base import ModelState, Servable, VersionSpec
from doorstep.repository.overrides import OverrideDirectory
from doorstep.repository.reconcile import Stamp

logger = logging.getLogger("doorstep.repository")
S = TypeVar("S", bound=Servable)

# A life begins in LOADING and ends in UNAVAILABLE.
TRANSITIONS: dict[ModelState, frozenset[ModelState]] = {
    ModelState.LOADING: frozenset({ModelState.READY, ModelState.UNLOADING, ModelState.UNAVAILABLE}),
    ModelState.READY: frozenset({ModelState.UNLOADING}),
    ModelState.UNLOADING: frozenset({ModelState.UNAVAILABLE}),
    ModelState.UNAVAILABLE: frozenset(),
}
UNLOADED = "unloaded"  # the reason of a version that was taken down on purpose, as Triton's index says it


@dataclass(frozen=True, slots=True)
class StateChange:
    """A life went from one state to the next."""

    name: str
    version: str
    state: ModelState
    reason: str
    seconds: float  # it was in the state before; for READY this is how long loading took
    serving: bool  # this version answers requests now, be it through another life


Listener = Callable[[StateChange], None]


class Life(Generic[S]):
    """One loading of one version. Touched only from the event loop."""

    __slots__ = ("files", "reason", "servable", "since", "spec", "stamp", "state", "version")

    def __init__(self, spec: VersionSpec, stamp: Stamp, now: float) -> None:
        self.spec = spec
        self.version = int(spec.version)
        self.stamp = stamp
        self.state = ModelState.LOADING
        self.reason = ""
        self.since = now
        self.servable: S | None = None  # from the end of loading to the end of closing
        self.files: OverrideDirectory | None = None  # what it was loaded from, where that came with the load call

    def __repr__(self) -> str:
        return (
            f"<Life {self.spec.name}:{self.spec.version} {self.state.value}{f' ({self.reason})' * bool(self.reason)}>"
        )


class ModelLifecycle(Generic[S]):
    """All lives in the foreground, by name and version. Touched only from the event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.listeners: list[Listener] = []
        self._clock = clock
        self._table: dict[str, dict[int, Life[S]]] = {}

    def begin(self, spec: VersionSpec, stamp: Stamp) -> Life[S]:
        """A new life in LOADING: in the foreground, unless the version serves."""
        life: Life[S] = Life(spec, stamp, self._clock())
        versions = self._table.setdefault(spec.identity, {})
        shown = versions.get(life.version)
        if shown is None or shown.state is not ModelState.READY:
            versions[life.version] = life
        self._tell(life, 0.0)
        return life

    def change(self, life: Life[S], state: ModelState, reason: str = "") -> None:
        """The next state. READY brings the life to the foreground."""
        assert state in TRANSITIONS[life.state], f"{life} cannot become {state.value}"
        now = self._clock()
        seconds, life.since = now - life.since, now
        life.state, life.reason = state, reason
        if state is ModelState.READY:
            self._table[life.spec.identity][life.version] = life
        self._tell(life, seconds)

    def ready(self, name: str) -> dict[int, Life[S]]:
        """The lives of a model that serve, by version."""
        return {v: life for v, life in self._table.get(name, {}).items() if life.state is ModelState.READY}

    def known(self, name: str) -> Collection[int] | None:
        """Every version there has been of a model; None for a model there has never been."""
        return self._table.get(name)

    def names(self) -> Collection[str]:
        return self._table.keys()

    def shown(self, name: str) -> Iterator[Life[S]]:
        """A model's lives in the foreground, lowest version first."""
        for _, life in sorted(self._table.get(name, {}).items()):
            yield life

    def _tell(self, life: Life[S], seconds: float) -> None:
        shown = self._table[life.spec.identity][life.version]
        change = StateChange(
            life.spec.identity, life.spec.version, life.state, life.reason, seconds, shown.state is ModelState.READY
        )
        _log(change)
        for listener in self.listeners:
            try:
                listener(change)
            except Exception:
                logger.exception("%r could not be told of %s", listener, life)


def _log(change: StateChange) -> None:
    extra = {"model": change.name, "version": change.version}
    match change.state:
        case ModelState.LOADING:
            logger.info("loading: %s:%s", change.name, change.version, extra=extra)
        case ModelState.READY:
            line = "successfully loaded '%s' version %s in %.3f s"
            logger.info(line, change.name, change.version, change.seconds, extra={**extra, "seconds": change.seconds})
        case ModelState.UNLOADING:
            logger.info("unloading: %s:%s", change.name, change.version, extra=extra)
        case ModelState.UNAVAILABLE if change.reason == UNLOADED:
            logger.info("successfully unloaded '%s' version %s", change.name, change.version, extra=extra)
        case _:
            logger.error("failed to load '%s' version %s: %s", change.name, change.version, change.reason, extra=extra)
