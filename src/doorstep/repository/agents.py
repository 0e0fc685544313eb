"""Repository agents: what a model's config wants done to its files before they are loaded. Loads no model.

Triton's agents are shared libraries; of those it ships, `checksum`, the one there is, is here. Others are functions in
the entry-point group `doorstep.repository_agents`. Everything here blocks on the disk, so it runs off the event loop.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from doorstep.errors import DoorstepError, Internal, InvalidArgument, Unsupported

GROUP = "doorstep.repository_agents"

# agent(model_directory, parameters): raises a DoorstepError for a model that must not be loaded
Agent = Callable[[Path, Mapping[str, str]], None]


def run_agents(config: Any, model_directory: Path) -> None:
    """Everything that model_repository_agents asks for, in order. Raises what the first that refuses raises."""
    for agent in config.model_repository_agents.agents:
        _find(agent.name)(model_directory, dict(agent.parameters))


def check_agents(config: Any, model_directory: Path) -> None:
    """What can be told before a load: every agent is there, and files have their sums. Runs nobody else's agent."""
    for agent in config.model_repository_agents.agents:
        if _find(agent.name) is check_sums:
            check_sums(model_directory, dict(agent.parameters))


def check_sums(model_directory: Path, parameters: Mapping[str, str]) -> None:
    """`checksum`: `MD5:<path in the model's folder>` → the digest in hexadecimal."""
    for key, expected in parameters.items():
        algorithm, colon, path = key.partition(":")
        if not colon:
            raise InvalidArgument(f"failed to parse key: {key}")
        if algorithm.lower() != "md5":
            raise Unsupported(f"Unsupported checksum algorithm: {algorithm}")
        try:
            with _own_file(model_directory, path).open("rb") as file:
                got = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError):
                error = OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            why = os.strerror(error.errno) if error.errno else str(error)
            raise InvalidArgument(f"failed to open text file for read {path}: {why}") from None
        if got != expected:
            raise InvalidArgument(f"Mismatched MD5 hash for file {path}, expect: {expected}, got: {got}")


def _own_file(model_directory: Path, path: str) -> Path:
    """A file in the model's folder: whoever may load a model need not learn what others hold. Raises OSError."""
    file = model_directory / path.lstrip("/")
    if not file.resolve().is_relative_to(model_directory.resolve()):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    if not file.is_file() and file.exists():  # a pipe or a device may never end
        raise OSError(errno.EINVAL, "it is not a file")
    return file


def _find(name: str) -> Agent:
    if name == "checksum":
        return check_sums
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                agent: Agent = point.load()
            except Exception as error:  # somebody else's code
                raise Internal(f"repo agent '{name}' ({point.value}) cannot be loaded: {error}") from error
            return _contained(name, agent)
    raise InvalidArgument(
        f"unable to find 'libtritonrepoagent_{name}.so' for repo agent '{name}', searched: checksum, and the Python "
        f"packages that offer one in the entry-point group {GROUP}"
    )


def _contained(name: str, agent: Agent) -> Agent:
    def run(model_directory: Path, parameters: Mapping[str, str]) -> None:
        try:
            agent(model_directory, parameters)
        except DoorstepError:
            raise
        except Exception as error:
            raise Internal(f"repo agent '{name}' failed: {error}") from error

    return run
