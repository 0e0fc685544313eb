"""Finds a backend by name: ours in one table, others by the entry-point group `doorstep.backends`, and those that are a
model.py in a folder of `--backend-directory` (Triton's python-based backends). Runs none of them.

A backend's library is imported when the first model needs it, so that starting costs only what is used.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path

from doorstep.backends.base import Backend
from doorstep.errors import Internal, InvalidArgument

# name → (module, class, what to install when its library is missing)
BACKENDS: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("doorstep.backends.onnxruntime", "OnnxBackend", "onnxruntime"),
    "python": ("doorstep.backends.python", "PythonBackend", ""),
    "llamacpp": ("doorstep.backends.llm", "LlamaCppBackend", "xllamacpp"),
    "transformers": ("doorstep.backends.llm", "TransformersBackend", "doorstep[transformers]"),
    "vllm": ("doorstep.backends.llm", "VllmBackend", "doorstep[vllm]"),
    "openvino": ("doorstep.backends.llm", "OpenVinoBackend", "doorstep[openvino]"),
    "identity": ("doorstep.backends.identity", "IdentityBackend", ""),
}
GROUP = "doorstep.backends"
DIRECTORY = "backend-directory"  # among the settings of every backend, as in Triton
RUNTIME = "model.py"  # what `runtime` says of a python-based backend

_loaded: dict[str, Backend] = {}
_based: dict[Path, Backend] = {}


def backend_names(directory: str = "") -> list[str]:
    """`directory` is --backend-directory."""
    based = {file.parent.name for file in Path(directory).glob(f"*/{RUNTIME}")} if directory else set()
    return sorted({*BACKENDS, *(point.name for point in entry_points(group=GROUP)), *based})


def find_backend(name: str, settings: Mapping[str, str] | None = None) -> Backend:
    """The one object of that backend; `settings` say where python-based ones are. Raises InvalidArgument for an unknown
    name, Internal for a missing library."""
    found = _loaded.get(name)
    if found is None:
        file = python_based(name, settings)
        if file is not None:
            return _find_based(file)
        found = _loaded[name] = _load(name)
    return found


def python_based(name: str, settings: Mapping[str, str] | None) -> Path | None:
    """The model.py of a python-based backend; None: `name` is none, or belongs to a backend of ours or of a package."""
    directory = (settings or {}).get(DIRECTORY, "")
    if not directory or name in BACKENDS or not name or Path(name).name != name:
        return None
    file = Path(directory) / name / RUNTIME
    if not file.is_file() or any(point.name == name for point in entry_points(group=GROUP)):
        return None
    return file.absolute()


def check_runtime(model: str, name: str, runtime: str, settings: Mapping[str, str]) -> None:
    """Whether the config's `runtime` is that of its backend. Raises InvalidArgument, in Triton's words."""
    based = python_based(name, settings)
    if not runtime or runtime == (RUNTIME if based else f"libtriton_{name}.so"):
        return
    directory = settings.get(DIRECTORY, "/opt/tritonserver/backends")
    if runtime == RUNTIME:
        raise InvalidArgument(
            f"unable to find Python backend based backend library '{RUNTIME}' for model '{model}', searched: "
            f"'{directory}/{name}/{RUNTIME}'"
        )
    raise InvalidArgument(
        f"unable to find backend library '{runtime}' for model '{model}': a runtime is {RUNTIME}, for a backend in a "
        "folder of --backend-directory, or left out"
    )


def _find_based(file: Path) -> Backend:
    found = _based.get(file)
    if found is None:
        from doorstep.backends.python import PythonBackend

        found = _based[file] = PythonBackend(file)
    return found


def _load(name: str) -> Backend:
    row = BACKENDS.get(name)
    if row is None:
        return _load_entry_point(name)
    module, attribute, install = row
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        raise Internal(f"backend '{name}' needs {error.name}: pip install '{install or error.name}'") from error
    assert isinstance(made, Backend)
    return made


def _load_entry_point(name: str) -> Backend:
    for point in entry_points(group=GROUP):
        if point.name == name:
            try:
                made = point.load()()
            except Exception as error:  # somebody else's code; it must not take the server with it
                raise Internal(f"backend '{name}' ({point.value}) cannot be loaded: {error}") from error
            if not isinstance(made, Backend):
                raise Internal(f"backend '{name}' ({point.value}) is not a doorstep.backends.base.Backend")
            return made
    names = backend_names()
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise InvalidArgument(f"unknown backend '{name}'{hint} (there are: {', '.join(names)})")
