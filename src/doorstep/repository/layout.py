"""What somebody meant by a folder that is not laid out as a repository, and how to mend it. Opens no file.

<repository>/<model>/<version>/model.onnx
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from doorstep.errors import Problem

# The name a model's file must have to be found without a config, by its suffix.
FILE_NAMES = {".onnx": "model.onnx", ".py": "model.py", ".gguf": "model.gguf"}


def mistaken(path: Path) -> Problem | None:
    """Why `path` cannot be a repository, and what to name instead; None where it can."""
    if path.is_file():
        return Problem(str(path), "is a file, not a folder of models", _put_and_serve(path))
    if not path.is_dir():
        near = _near(path)
        return Problem(
            str(path), "there is no such folder", f"did you mean {near}?" if near else "name a folder of models"
        )
    if is_model(path):
        return Problem(str(path), "is a model, not a folder of models", f"name {_parent(path)}")
    if path.name.isdecimal() and is_model(path.absolute().parent):
        fix = f"name {_parent(_parent(path))}"
        return Problem(str(path), "is a version of a model, not a folder of models", fix)
    return None


def is_model(path: Path) -> bool:
    """Whether it is a model itself: it has versions, and none of these has any."""
    folders = _folders(path)
    if any(_versions(folder) for folder in folders):
        return False
    return any(folder.name.isdecimal() for folder in folders) or (path / "config.pbtxt").is_file()


def without_models(path: Path) -> Problem | None:
    """What to say of a repository in which nothing would be found; None where something would."""
    if _folders(path):
        return None
    fix = "a model is a folder such as resnet/1/model.onnx"
    for file in _files(path):
        if file.suffix in FILE_NAMES:
            fix = _move(file, path / _model_name(file) / "1")
            break
    return Problem(str(path), "there is no model here", fix)


def without_versions(directory: Path, *, is_ensemble: bool = False) -> str:
    """What to do about a model in which no version was found."""
    if is_ensemble:
        return (
            f"make the folder {directory.name}/1/; an ensemble's is empty (git keeps no empty folder: put a file in it)"
        )
    for file in _files(directory):
        if file.suffix in FILE_NAMES:
            return _move(file, directory / "1")
    name = directory.name
    for folder in _folders(directory):
        if any(file.suffix in FILE_NAMES for file in _files(folder)):
            return f"rename {name}/{folder.name} to {name}/1: a version is a number"
    return f"put the model's file in {name}/1/"


def _put_and_serve(file: Path) -> str:
    wanted = FILE_NAMES.get(file.suffix)
    if wanted is None:
        return "name a folder of models"
    directory = file.absolute().parent
    if file.name == wanted and directory.name.isdecimal():
        return f"name the folder of models that it is in: {directory.parent.parent}"
    folder = Path("models") / _model_name(file) / "1"
    return f"a model has a folder: mkdir -p {folder} && cp {file} {folder / wanted} && doorstep serve models"


def _move(file: Path, version: Path) -> str:
    """Both from the model's folder, or the repository, on."""
    root = file.parent.parent
    return f"move {file.relative_to(root)} to {(version / FILE_NAMES[file.suffix]).relative_to(root)}"


def _model_name(file: Path) -> str:
    return file.stem if file.stem != "model" else "my_model"


def _near(path: Path) -> str:
    beside = path.absolute().parent
    close = difflib.get_close_matches(path.name, [folder.name for folder in _folders(beside)], n=1)
    return str(path.parent / close[0]) if close else ""


def _parent(path: Path) -> Path:
    """As it was written, where that is possible."""
    return path.absolute().parent if path.name in ("", "..") or len(path.parts) < 2 else path.parent


def _versions(directory: Path) -> Sequence[Path]:
    return [folder for folder in _folders(directory) if folder.name.isdecimal()]


def _folders(directory: Path) -> list[Path]:
    return [entry for entry in _entries(directory) if entry.is_dir()]


def _files(directory: Path) -> list[Path]:
    return [entry for entry in _entries(directory) if entry.is_file()]


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(entry for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError:  # whoever reads it says so
        return []
