"""What is in the model repositories: models, versions, a stamp of each one's files. Reads no file's content.

    <repository>/<model>/[config.pbtxt][configs/…][labels.txt …]
                        /<version>/…

Everything here blocks on the disk, so it runs off the event loop.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from doorstep.errors import DoorstepError, Internal, NotFound
from doorstep.repository.dependencies import identity, split
from doorstep.repository.reconcile import Stamp

_INT64_MAX = 2**63 - 1
# Beside a model, but no part of it: a change of one of these is no reason to load the model again.
_NOT_THE_MODEL = frozenset({"__pycache__", "deployment.yaml", "history.jsonl", "card.yaml"})
_CONFIG = frozenset({"config.pbtxt", "configs"})
_NOT_A_MODEL = frozenset({"lost+found"})


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model's directory as one look found it. Two looks that are equal saw the same files."""

    name: str  # its identity: with its repository in front where names may repeat
    directory: Path
    common: Stamp  # of everything outside version directories
    versions: Mapping[int, Stamp]
    beside: Stamp = ""  # as `common`, but for the config
    ignored: tuple[str, ...] = ()  # directories that look like versions, but are none: a leading zero


@dataclass(frozen=True, slots=True)
class Listing:
    """All repositories at one time. Every model is in exactly one of the three."""

    models: Mapping[str, FoundModel] = field(default_factory=dict)
    problems: Mapping[str, DoorstepError] = field(default_factory=dict)  # models that cannot be told: duplicates …
    unlisted: Mapping[Path, str] = field(default_factory=dict)  # repositories that could not be listed, and why

    @property
    def names(self) -> set[str]:
        return {*self.models, *self.problems}


class DuplicateModel(DoorstepError):
    """The same model in several repositories: nobody can tell which is meant."""

    def __init__(self, name: str) -> None:
        super().__init__(f"failed to poll model '{name}': not unique across all model repositories")


class Source:
    """Directories that hold models. Immutable; may be called from any thread."""

    def __init__(self, repositories: Sequence[Path | str], *, namespaced: bool = False) -> None:
        self._namespaced = namespaced
        # Absolute, so that a later chdir changes nothing; not resolved, so that a symbolic link may be switched over.
        self.repositories = tuple(dict.fromkeys(Path(os.path.abspath(r)) for r in repositories))

    def missing(self) -> list[Path]:
        """Repositories that are not directories."""
        return [r for r in self.repositories if not r.is_dir()]

    def names(self) -> tuple[set[str], dict[Path, str]]:
        """The names of all models, and the repositories that could not be listed. One directory read each."""
        directories, unlisted = self._directories()
        return set(directories), unlisted

    def scan(self) -> Listing:
        """Looks at everything. A model that cannot be read, or is in several repositories, becomes a problem."""
        directories, unlisted = self._directories()
        models: dict[str, FoundModel] = {}
        problems: dict[str, DoorstepError] = {}
        for name, places in directories.items():
            try:
                models[name] = _look(name, places)
            except NotFound:
                pass  # it went between the two looks
            except DoorstepError as error:
                problems[name] = error
        return Listing(models, problems, unlisted)

    def find(self, name: str) -> FoundModel:
        """Looks at one model. Raises NotFound, DuplicateModel, or Internal where it cannot be read."""
        hidden = name.startswith(".") or name in _NOT_A_MODEL or "\0" in name
        if self._namespaced:
            namespace, bare = split(name)
            repositories = [r for r in self.repositories if str(r) == namespace]
        else:
            bare, repositories = name, list(self.repositories)
        places = [] if hidden else [r / bare for r in repositories if os.path.isdir(r / bare)]
        return _look(name, places)

    def identities(self, name: str) -> list[str]:
        """The models of that name."""
        return [self._identity(r, name) for r in self.repositories if os.path.isdir(r / name)]

    def _identity(self, repository: Path, name: str) -> str:
        return identity(str(repository), name) if self._namespaced else name

    def _directories(self) -> tuple[dict[str, list[Path]], dict[Path, str]]:
        found: dict[str, list[Path]] = {}
        unlisted: dict[Path, str] = {}
        for repository in self.repositories:
            try:
                with os.scandir(repository) as entries:
                    for entry in entries:
                        if not entry.name.startswith(".") and entry.name not in _NOT_A_MODEL and _is_directory(entry):
                            name = self._identity(repository, entry.name)
                            found.setdefault(name, []).append(repository / entry.name)
            except OSError as error:
                unlisted[repository] = _why(error)
        return dict(sorted(found.items())), unlisted


def _look(name: str, places: Sequence[Path]) -> FoundModel:
    if len(places) > 1:
        raise DuplicateModel(name)
    if not places:
        raise NotFound(f"failed to poll model '{name}': model not found in any model repository.")
    directory = places[0]
    versions: dict[int, Stamp] = {}
    ignored: list[str] = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not (entry.name.isascii() and entry.name.isdigit() and entry.is_dir()):
                    continue
                if (entry.name[0] == "0" and entry.name != "0") or int(entry.name) > _INT64_MAX:
                    ignored.append(entry.name)
                    continue
                try:
                    versions[int(entry.name)] = _stamp(directory / entry.name)
                except FileNotFoundError:
                    pass  # removed meanwhile
        without = {*map(str, versions), *ignored}
        common = _stamp(directory, without=without)
        beside = _stamp(directory, without=without | _CONFIG)
    except FileNotFoundError:
        raise NotFound(f"failed to poll model '{name}': model not found in any model repository.") from None
    except OSError as error:
        where = os.path.relpath(error.filename, directory.parent) if isinstance(error.filename, str) else name
        raise Internal(f"failed to poll model '{name}': cannot read {where}: {_why(error)}") from None
    return FoundModel(name, directory, common, dict(sorted(versions.items())), beside, tuple(sorted(ignored)))


def _stamp(directory: Path, without: set[str] | frozenset[str] = frozenset()) -> Stamp:
    """Of the names, times, sizes and inodes of all files under `directory`; links are followed, loops are not.

    The inode tells a file that was replaced by one of the same size and time.
    """
    digest = blake2b(digest_size=12)
    seen: set[tuple[int, int]] = set()

    def add(path: str, prefix: str) -> None:
        at = os.stat(path)
        if (at.st_dev, at.st_ino) in seen:
            return
        seen.add((at.st_dev, at.st_ino))
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda e: e.name)
        for entry in entries:
            name = entry.name
            if name.startswith(".") or name in _NOT_THE_MODEL or (not prefix and name in without):
                continue
            label = os.fsencode(prefix + name)
            try:
                if entry.is_dir():
                    digest.update(b"d%b\0" % label)
                    add(entry.path, f"{prefix}{name}/")
                else:
                    at = entry.stat()
                    digest.update(b"f%b\0%d %d %d\0" % (label, at.st_mtime_ns, at.st_size, at.st_ino))
            except FileNotFoundError:  # removed meanwhile, or a link to nowhere
                digest.update(b"-%b\0" % label)

    add(str(directory), "")
    return digest.hexdigest()


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to where we may not look: let whoever looks at that model say so
        return True


def _why(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
