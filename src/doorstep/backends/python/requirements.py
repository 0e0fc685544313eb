"""Builds the virtual environment that a requirements.txt asks for, once per text and Python. Knows no model.

Runs the server's own pip, so the environment needs none: `python -m pip --python <environment> install -r …`. Where
packages come from is pip's business (pip.conf, PIP_INDEX_URL, options in the file).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import venv
from collections import deque
from pathlib import Path

from doorstep.backends.python.environment_cache import made_once
from doorstep.errors import BackendError

logger = logging.getLogger("doorstep.model")

LAST_LINES = 8  # of pip, in the error
_WORTH_SAYING = ("Collecting", "Downloading", "Building", "Installing", "Successfully")


def built(file: Path, cache: Path) -> Path:
    """The environment's folder. Blocks while pip runs. Raises BackendError with pip's last words."""
    text = file.read_bytes()
    python = f"{sys.version} {sys.base_prefix}"
    key = hashlib.sha256(text + b"\0" + python.encode()).hexdigest()[:32]
    return made_once(cache, f"venv-{key}", lambda folder: _build(file, folder))


def _build(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise BackendError(
            f"{file} asks for packages, and the server's Python has no pip to install them: install pip, or build an "
            "environment and name it in the parameter EXECUTION_ENV_PATH, or switch this off "
            "(--backend-config=python,build-environments=false)"
        )
    name = f"{file.parent.name}/{file.name}"
    logger.info("building a Python environment for %s", file)
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    command = [
        *(sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "off", "-r", file.name),
    ]
    last: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(  # noqa: S603 (our own interpreter, and a file of the repository's)
        command,
        cwd=file.parent,  # paths in the file are relative to it
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            line = line.rstrip()
            if line:
                last.append(line)
            if line.lstrip().startswith(_WORTH_SAYING):
                logger.info("pip for %s: %s", name, line.strip())
    if pip.returncode != 0:
        raise BackendError(f"pip cannot install {name} (exit code {pip.returncode}): " + " | ".join(last))
