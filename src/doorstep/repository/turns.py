"""Who may work on a model now, and when a broken one is worth another try. Knows no disk and no loading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from doorstep.repository.source import FoundModel


class Turns:
    """One operation per model at a time, in order of arrival. Touched only from the event loop."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}  # and one entry per operation that holds or waits

    @asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        lock, users = self._locks.setdefault(name, (asyncio.Lock(), []))
        users.append(None)
        try:
            async with lock:
                yield
        finally:
            users.pop()
            if not users:
                del self._locks[name]

    def busy(self, name: str) -> bool:
        return name in self._locks


@dataclass(slots=True)
class _Setback:
    found: FoundModel
    rest: int  # looks at the disk to let pass before the next try
    passed: int = 0


class Setbacks:
    """Models whose present files failed to load. The failure may pass (memory, a slow mount), so they are tried again
    while the files stay the same, but ever more rarely; changed files are tried at once."""

    LONGEST_REST = 64  # looks at the disk

    def __init__(self) -> None:
        self._setbacks: dict[str, _Setback] = {}

    def add(self, found: FoundModel) -> None:
        before = self._setbacks.get(found.name)
        again = before is not None and before.found == found
        rest = min(before.rest * 2, self.LONGEST_REST) if before is not None and again else 1
        self._setbacks[found.name] = _Setback(found, rest)

    def rests(self, found: FoundModel) -> bool:
        """Called once per look at the disk: not now?"""
        setback = self._setbacks.get(found.name)
        if setback is None or setback.found != found:
            return False
        setback.passed += 1
        return setback.passed < setback.rest

    def forget(self, name: str) -> None:
        self._setbacks.pop(name, None)
