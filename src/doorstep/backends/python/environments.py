"""Which Python a model runs in: EXECUTION_ENV_PATH, a requirements.txt beside the model, or the server's own.

Says where things are and in which order they count; unpacking is archive.py's, building requirements.py's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doorstep.backends.base import PythonEnvironment
from doorstep.backends.python.archive import unpacked
from doorstep.backends.python.requirements import built
from doorstep.errors import BackendError, InvalidArgument

PARAMETER = "EXECUTION_ENV_PATH"
MODEL_DIRECTORY = "$$TRITON_MODEL_DIRECTORY"
REQUIREMENTS = "requirements.txt"
# Settings of the backend (--backend-config=python,<key>=<value>).
BUILD = "build-environments"  # false: a requirements.txt is only a file
CACHE = "environment-directory"  # where environments are kept
BACKEND_ARCHIVE = "pb_exec_env_model.py.tar.gz"  # beside the model.py of a python-based backend, as in Triton
_UPLOADED = "doorstep-override-"  # the parent of a model whose files came with the load call (repository/overrides.py)


def environment_of(
    proto: Any,
    model_directory: Path,
    version_directory: Path,
    settings: Mapping[str, str],
    backend_directory: Path | None = None,
) -> PythonEnvironment | None:
    """None: the server's. Blocks while an environment is unpacked or built. Raises DoorstepError."""
    written = proto.parameters[PARAMETER].string_value if PARAMETER in proto.parameters else ""
    if written:
        return _at(written.replace(MODEL_DIRECTORY, str(model_directory)), settings)
    if backend_directory is not None:
        archive = backend_directory / BACKEND_ARCHIVE
        return _at(str(archive), settings) if archive.is_file() else None
    if _wants_building(model_directory, settings):
        for folder in (version_directory, model_directory):
            file = folder / REQUIREMENTS
            if file.is_file():
                return _in(built(file, cache_directory(settings)))
    return None


def lacking_environment(proto: Any, model_directory: Path) -> str:
    """The EXECUTION_ENV_PATH that is not there; "" where all is well."""
    written = proto.parameters[PARAMETER].string_value if PARAMETER in proto.parameters else ""
    path = written.replace(MODEL_DIRECTORY, str(model_directory))
    return "" if not path or Path(path).exists() else path


def cache_directory(settings: Mapping[str, str]) -> Path:
    """Survives the server, so that the next start finds what this one has made."""
    if settings.get(CACHE):
        return Path(settings[CACHE])
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "doorstep" / "environments"


def _wants_building(model_directory: Path, settings: Mapping[str, str]) -> bool:
    """Not for files that came over the network: whoever may load a model need not be let run pip as well."""
    value = settings.get(BUILD, "true").lower()
    if value not in ("true", "false", "1", "0", "on", "off"):
        raise InvalidArgument(f"backend config {BUILD}={value}: expected true or false")
    return value in ("true", "1", "on") and not model_directory.parent.name.startswith(_UPLOADED)


def _at(path: str, settings: Mapping[str, str]) -> PythonEnvironment:
    """A folder is an environment; a file is an archive of one."""
    place = Path(path)
    if not place.exists():
        raise BackendError(f"Failed to get the canonical path for {path}. (there is no such file or folder)")
    return _in(place.resolve() if place.is_dir() else unpacked(place.resolve(), cache_directory(settings)))


def _in(prefix: Path) -> PythonEnvironment:
    """A virtual environment, or one of conda's, as it would be activated."""
    executable = prefix / "bin" / "python"
    if not os.access(executable, os.X_OK):
        raise BackendError(
            f"{prefix} is no Python environment: it has no bin/python (pack one with conda-pack, or make one with "
            "`python -m venv --copies`)"
        )
    variables = {"PATH": f"{prefix / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    if (prefix / "pyvenv.cfg").is_file():
        variables["VIRTUAL_ENV"] = str(prefix)
    else:
        variables["CONDA_PREFIX"] = str(prefix)
        # As Triton: libraries of packages that were linked for the environment they came from.
        before = os.environ.get("LD_LIBRARY_PATH", "")
        variables["LD_LIBRARY_PATH"] = f"{prefix / 'lib'}{os.pathsep}{before}" if before else str(prefix / "lib")
    return PythonEnvironment(executable, variables=variables)
