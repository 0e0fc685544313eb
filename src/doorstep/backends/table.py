"""Finds a backend by name: ours in one table, others by the entry-point group `doorstep.backends`. Runs none of them.

A backend's library is imported when the first model needs it, so that starting costs only what is used.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.metadata import entry_points

from doorstep.backends.base import Backend
from doorstep.errors import Internal, InvalidArgument

# name → (module, class, what to install when its library is missing)
BACKENDS: dict[str, tuple[str, str, str]] = {
    "onnxruntime": ("doorstep.backends.onnxruntime", "OnnxBackend", "onnxruntime"),
    "python": ("doorstep.backends.python", "PythonBackend", ""),
    "identity": ("doorstep.backends.identity", "IdentityBackend", ""),
}
GROUP = "doorstep.backends"

_loaded: dict[str, Backend] = {}


def backend_names() -> list[str]:
    return sorted({*BACKENDS, *(point.name for point in entry_points(group=GROUP))})


def find_backend(name: str) -> Backend:
    """The one object of that backend. Raises InvalidArgument for an unknown name, Internal for a missing library."""
    found = _loaded.get(name)
    if found is None:
        found = _loaded[name] = _load(name)
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
