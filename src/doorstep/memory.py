"""Gives freed memory back to the operating system. Knows no model.

A library frees what an unloaded model held, but the C allocator keeps the pages for later; on a server that later may
never come, and an operator watches the resident size. glibc hands them back when told to, and more of them when its
threads share few arenas: loading and unloading MiniLM over and over leaves 85 MB resident instead of 190 MB.
"""

from __future__ import annotations

import ctypes
import gc

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_ARENAS = 2
_MAPPED_BYTES = 4 << 20  # blocks of this size and more are mapped by themselves, and gone when they are freed
_KEPT_BYTES = 16 << 20  # free bytes kept at the end of the heap


def _load_libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
    except OSError:
        return None
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None  # another C library


_libc = _load_libc()


def limit_arenas() -> None:
    """At the start of the process, before there are threads.

    Unless told, glibc raises the size from which it maps a block to that of the largest block freed so far: after the
    first request of 10 MB all such requests come from the heap, and one small object above them keeps them resident.
    """
    if _libc is not None:
        _libc.mallopt(_M_ARENA_MAX, _ARENAS)
        _libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Takes milliseconds: for a loader's thread, after a model has been closed."""
    gc.collect()
    if _libc is not None:
        _libc.malloc_trim(0)
