"""Gives freed memory back to the operating system. Knows no model.

A library frees what an unloaded model held, but the C allocator keeps the pages for later; on a server that later may
never come, and an operator watches the resident size. glibc hands them back when told to, and more of them when its
threads share few arenas: loading and unloading MiniLM over and over leaves 85 MB resident instead of 190 MB.
"""

from __future__ import annotations

import ctypes
import gc

_M_ARENA_MAX = -8  # malloc.h
_ARENAS = 2


def _load_libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None  # another C library


_libc = _load_libc()


def limit_arenas() -> None:
    """At the start of the process, before there are threads."""
    if _libc is not None:
        _libc.mallopt(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """Takes milliseconds: for a loader's thread, after a model has been closed."""
    gc.collect()
    if _libc is not None:
        _libc.malloc_trim(0)
