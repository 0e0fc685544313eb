"""Folders that are made once and then shared: by threads, by servers, by later starts. Knows not what is in them.

A folder counts only with its marker, which is written last; whoever finds one without it makes it anew. So a server
that is killed half way leaves nothing that another would take for whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from doorstep.errors import BackendError

MARKER = ".doorstep-complete"
_lock = threading.Lock()
_locks: dict[Path, threading.Lock] = {}


def made_once(cache: Path, key: str, make: Callable[[Path], None]) -> Path:
    """`<cache>/<key>`, after `make(folder)` where it is not there yet. Raises what `make` raises."""
    folder = cache / key
    if (folder / MARKER).is_file():
        return folder
    with _lock:
        own = _locks.setdefault(folder, threading.Lock())
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with own, open(cache / f"{key}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # another server may be making it; gone with the file
            if (folder / MARKER).is_file():
                return folder
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
            try:
                make(folder)
                (folder / MARKER).touch()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except OSError as error:
        raise BackendError(
            f"cannot keep a Python environment in {cache}: {error.strerror or error} (another folder: "
            "--backend-config=python,environment-directory=<folder>)"
        ) from error
    return folder


_digests: dict[Path, tuple[tuple[int, int, int], str]] = {}  # of large files: path → (size, time, inode), digest


def digest_of_file(path: Path) -> str:
    """Of its content; read again only where the file has changed."""
    status = os.stat(path)
    stamp = (status.st_size, status.st_mtime_ns, status.st_ino)
    known = _digests.get(path)
    if known is not None and known[0] == stamp:
        return known[1]
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    _digests[path] = (stamp, digest)
    return digest
