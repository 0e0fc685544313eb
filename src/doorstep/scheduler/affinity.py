"""Which instance has most of a prompt's beginning in its cache: a guess from what each was given lately. Pure.

A prompt is cut into blocks, and a block is known by the hash of all that stands before its end; so two prompts share as
many first blocks as they begin alike. (An engine chooses among its own slots by itself.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar
from zlib import crc32

W = TypeVar("W")
BLOCK_BYTES = 512
MOST_BLOCKS = 64  # of one prompt: 32 KB of beginning decide
REMEMBERED = 4096  # blocks per instance


def blocks_of(text: bytes) -> list[int]:
    """The hashes of the whole blocks at the beginning of `text`."""
    found: list[int] = []
    value = 0
    for start in range(0, min(len(text) - BLOCK_BYTES + 1, BLOCK_BYTES * MOST_BLOCKS), BLOCK_BYTES):
        value = crc32(text[start : start + BLOCK_BYTES], value)
        found.append(value)
    return found


class Affinity:
    """What each instance was given lately. Touched only from the event loop."""

    def __init__(self) -> None:
        self._known: dict[object, OrderedDict[int, None]] = {}

    def choose(self, blocks: Sequence[int], free: Sequence[W], load: Sequence[int]) -> W:
        """The instance of `free` that knows most of `blocks`; of those that know as much, the least loaded one."""
        best = max(range(len(free)), key=lambda i: (self._shared(blocks, free[i]), -load[i]))
        return free[best]

    def note(self, blocks: Sequence[int], worker: object) -> None:
        known = self._known.setdefault(worker, OrderedDict())
        for block in blocks:
            known[block] = None
            known.move_to_end(block)
        while len(known) > REMEMBERED:
            known.popitem(last=False)

    def forget(self, worker: object) -> None:
        self._known.pop(worker, None)

    def _shared(self, blocks: Sequence[int], worker: object) -> int:
        known = self._known.get(worker, ())
        return next((i for i, block in enumerate(blocks) if block not in known), len(blocks))
