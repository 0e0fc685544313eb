"""The cache in the server's own memory: so many bytes, and the least recently used goes first."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable

from doorstep.cache.base import CacheNumbers, Entry

logger = logging.getLogger("doorstep.cache")


class LocalCache:
    """See the module. Touched only from the event loop."""

    name = "local"
    shared = False
    at_once = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.numbers = CacheNumbers()
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # the least recently used first
        self._used = 0

    def get(self, key: bytes) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def find(self, key: bytes, then: Callable[[Entry | None], None]) -> None:
        then(self.get(key))

    def put(self, key: bytes, entry: Entry) -> bool:
        if key in self._entries:  # two requests that missed together
            return False
        if entry.size > self.size:
            self.numbers.refused += 1
            if self.numbers.refused == 1:
                logger.warning(
                    "a response of %d bytes does not fit the response cache of %d bytes; such are not kept "
                    "(said once; --cache-config=local,size=…)",
                    entry.size,
                    self.size,
                )
            return True
        while self._used + entry.size > self.size:
            _, old = self._entries.popitem(last=False)
            self._used -= old.size
            self.numbers.evictions += 1
        self._entries[key] = entry
        self._used += entry.size
        return True

    def usage(self) -> tuple[int, float] | None:
        return len(self._entries), self._used / self.size

    async def close(self) -> None:
        self._entries.clear()
        self._used = 0

    def __repr__(self) -> str:
        return f"<LocalCache {len(self._entries)} entries, {self._used} of {self.size} bytes>"
