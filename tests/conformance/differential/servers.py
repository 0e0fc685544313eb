"""How each of the two servers is started on a repository. Knows no case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.triton import DEFAULT_VENV, VENV_VARIABLE, TritonProcess, find_venv

from doorstep.testing.server import ServerProcess

NO_TRITON = (
    f"no Triton to compare with: run `make peers` (it installs nvidia-pytriton in {DEFAULT_VENV}), "
    f"or set {VENV_VARIABLE} to a virtual environment that has it"
)


def start_triton(repository: Path, options: Sequence[str]) -> TritonProcess:
    venv = find_venv()
    assert venv is not None, NO_TRITON
    return TritonProcess(venv, repository, *options)


def start_doorstep(repository: Path, options: Sequence[str]) -> ServerProcess:
    return ServerProcess(repository, *options)
