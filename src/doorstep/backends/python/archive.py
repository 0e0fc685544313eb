"""Unpacks the archive of a Python environment (conda-pack's .tar.gz), once, trusting nothing in it.

An archive may come from anywhere. Nothing is written outside the folder, nothing in it leads out, it holds only files,
folders and links, and what it unpacks to is bounded. Knows no model.
"""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
from pathlib import Path, PurePosixPath

from doorstep.backends.python.environment_cache import digest_of_file, made_once
from doorstep.errors import BackendError

logger = logging.getLogger("doorstep.model")

LARGEST_BYTES = 32 << 30  # unpacked; environments with CUDA libraries have 10 GB
MOST_MEMBERS = 2_000_000


def unpacked(archive: Path, cache: Path) -> Path:
    """The folder with the archive's content. Raises BackendError for one that cannot be trusted or read."""

    def make(folder: Path) -> None:
        logger.info("unpacking the Python environment %s", archive)
        try:
            unpack(archive, folder)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise BackendError(f"the Python environment {archive} cannot be unpacked: {error}") from error

    return made_once(cache, f"archive-{digest_of_file(archive)}", make)


def unpack(archive: Path, folder: Path, *, largest: int = LARGEST_BYTES, most: int = MOST_MEMBERS) -> None:
    """Raises BackendError, TarError or OSError; what is written by then is the caller's to remove."""
    left, count = largest, 0
    links: list[Path] = []
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            count += 1
            left -= member.size
            if left < 0 or count > most:
                raise _refuse(archive, member, f"with it the archive has over {largest} bytes or {most} members")
            target = folder / _inside(archive, member, member.name)
            _check_parents(archive, member, folder, target)
            if member.isdir():
                target.mkdir(mode=0o755, exist_ok=True)
            elif member.isreg() and not member.issparse():
                _write(tar, member, target)
            elif member.issym():
                _inside(archive, member, str(PurePosixPath(member.name).parent / member.linkname), member.linkname)
                _make_room(target)
                target.symlink_to(member.linkname)
                links.append(target)
            elif member.islnk():
                source = folder / _inside(archive, member, member.linkname)
                _check_parents(archive, member, folder, source)
                if source.is_symlink() or not source.is_file():
                    raise _refuse(archive, member, "it is a link to what is no file of the archive")
                _make_room(target)
                os.link(source, target)
            else:
                raise _refuse(archive, member, "it is a device, a pipe or another thing that no environment has")
    root = folder.resolve()
    for link in links:  # each alone led nowhere; together they might
        if not link.resolve().is_relative_to(root):
            raise BackendError(f"{archive}: '{link.relative_to(folder)}' is a link that leads out of the archive")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None
    _make_room(target)
    with source, open(target, "xb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    target.chmod(0o755 if member.mode & 0o111 else 0o644)
    os.utime(target, (member.mtime, member.mtime))  # Python compares it with that of a .pyc


def _make_room(target: Path) -> None:
    """A later member of the same name replaces the earlier one; a link is removed, never written through."""
    target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if target.is_symlink() or target.is_file():
        target.unlink()


def _inside(archive: Path, member: tarfile.TarInfo, path: str, shown: str = "") -> PurePosixPath:
    """`path` without its dots. Raises BackendError where it leads out."""
    parts: list[str] = []
    outside = path.startswith("/") or shown.startswith("/") or "\0" in path
    for part in PurePosixPath(path).parts:
        if part == "..":
            outside = outside or not parts
            del parts[-1:]
        else:
            parts.append(part)
    if outside:
        what = f"it is a link to '{shown}'" if shown else "its path"
        raise _refuse(archive, member, f"{what}, which leads out of the archive")
    return PurePosixPath(*parts)


def _check_parents(archive: Path, member: tarfile.TarInfo, folder: Path, target: Path) -> None:
    """No member lies behind a link, wherever that leads."""
    parent = target.parent
    while parent != folder and parent.is_relative_to(folder):
        if parent.is_symlink():
            raise _refuse(archive, member, "its path goes through a link")
        parent = parent.parent


def _refuse(archive: Path, member: tarfile.TarInfo, why: str) -> BackendError:
    return BackendError(f"{archive}: '{member.name[:200]}' is not unpacked: {why}")
