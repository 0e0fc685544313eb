"""Finds a Python model's file, imports it, and finds the class in it. Knows no tensor, and of a config the file name.

Errors say file, line, what and what to do, because whoever reads them has just edited that file.
"""

from __future__ import annotations

import builtins
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from doorstep.backends.python import triton_compat
from doorstep.backends.python.api import Model
from doorstep.errors import ConfigError, Problem

TRITON_CLASS = "TritonPythonModel"
_PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "bs4": "beautifulsoup4",
}
_sources: dict[Path, Source] = {}


@dataclass(frozen=True, slots=True)
class Source:
    path: Path
    module: ModuleType
    model: type[Any]  # a doorstep.Model, or Triton's TritonPythonModel
    model_directory: Path  # what pb_utils.get_model_dir says: where model.py is, but for a python-based backend

    @property
    def model_name(self) -> str:
        return self.model.__qualname__


def load_source(proto: Any, model_directory: Path, version_directory: Path, backend_file: Path | None = None) -> Source:
    """Imports the model's file, or its backend's, once per process. Raises ConfigError."""
    path = backend_file or find_file(proto, model_directory, version_directory)
    source = _sources.get(path)
    if source is None:
        module = _import_backend(proto.name, path) if backend_file else _import(proto.name, path, version_directory)
        own = version_directory if backend_file else path.parent
        source = _sources[path] = Source(path, module, _find_class(proto.name, path, module), own)
    return source


def find_file(proto: Any, model_directory: Path, version_directory: Path) -> Path:
    """In the version's folder, else in the model's: Triton's order."""
    filename = proto.default_model_filename or "model.py"
    places = [version_directory / filename, model_directory / filename]
    for place in places:
        if place.is_file():
            return place.resolve()
    raise ConfigError(
        proto.name,
        [Problem(shown(places[0]), f"Python model file not found in '{shown(places[0])}'", "put the model there")],
    )


def _import(model: str, path: Path, version_directory: Path) -> ModuleType:
    """As Triton does: the module is `<version>.<stem>`; files beside it and in the model's folder can be imported."""
    _give_triton()
    for folder in (version_directory, version_directory.parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    package = ModuleType(version_directory.name)
    package.__path__ = [str(version_directory)]
    sys.modules[package.__name__] = package
    return _execute(model, f"{package.__name__}.{path.stem}", path)


def _give_triton() -> None:
    """Both names that Triton's models import; there the second is the part written in C++."""
    sys.modules["triton_python_backend_utils"] = sys.modules["c_python_backend_utils"] = triton_compat


def _import_backend(model: str, path: Path) -> ModuleType:
    """The model.py of a python-based backend: what lies beside it can be imported, and nothing of the model's."""
    _give_triton()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    return _execute(model, path.stem, path)


def _execute(model: str, name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(model, [Problem(shown(path), "is no Python file", "its name must end in .py")])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit too
        raise ConfigError(model, [problem_of(error, path)]) from error
    return module


def problem_of(error: BaseException, path: Path) -> Problem:
    """What went wrong in model code: at its own last line, not where a library noticed."""
    if isinstance(error, SyntaxError) and error.filename:
        return Problem(
            f"{shown(Path(error.filename))}:{error.lineno}", f"{type(error).__name__}: {error.msg}", "correct that line"
        )
    where = location_of(error, path)
    what = describe(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = _PACKAGES.get(error.name, error.name.partition(".")[0])
        return Problem(where, what, f"pip install {package}, in the environment that doorstep runs in")
    if isinstance(error, FileNotFoundError) and error.filename and not Path(str(error.filename)).is_absolute():
        return Problem(where, what, "a file beside model.py is Path(__file__).parent / its name")
    return Problem(where, what)


def location_of(error: BaseException, path: Path) -> str:
    """file:line of the innermost frame of the error that is in the model's folder."""
    found = shown(path)
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if file == path or file.is_relative_to(path.parent):
            found = f"{shown(file)}:{line}"
    return found


def shown(path: Path) -> str:
    """`path` from the model's folder on: clients read these texts too, and the rest of it is not their business."""
    return "/".join(path.parts[-3:] if path.parent.name.isdecimal() else path.parts[-2:])


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _find_class(model: str, path: Path, module: ModuleType) -> type[Any]:
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, builtins.type) and issubclass(value, Model) and value is not Model
    ]
    defined_here = [value for value in own if value.__module__ == module.__name__]
    found = defined_here or own
    if len(found) > 1:
        found = [value for value in found if value.__name__ == "Model"] or found
        # Of a class and those derived from it the last one is meant.
        found = [value for value in found if not any(value in other.__mro__[1:] for other in found)]
    triton = getattr(module, TRITON_CLASS, None)
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(sorted(value.__name__ for value in found))
        raise ConfigError(
            model,
            [Problem(shown(path), f"several classes derive from doorstep.Model: {names}", "name one of them Model")],
        )
    if isinstance(triton, builtins.type):
        return triton
    raise ConfigError(
        model,
        [
            Problem(
                shown(path),
                "has no model class",
                f"write `class Model(doorstep.Model)` with a `predict` method, or Triton's `class {TRITON_CLASS}`",
            )
        ],
    )
