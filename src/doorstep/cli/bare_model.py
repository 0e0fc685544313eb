"""A model that is not in a repository: a GGUF file, or a folder as Hugging Face or OpenVINO lay it out. What it is
called, what it consists of, and a temporary repository that holds nothing but links to it. Starts no server.
"""

from __future__ import annotations

import difflib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from doorstep.backends.llm.llamacpp.gguf import MAGIC, read_head
from doorstep.config.complete import ARTEFACTS
from doorstep.errors import BackendError, Problem
from doorstep.repository.layout import mistaken

_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.ASCII)
_SNAPSHOT = re.compile(r"models--.+--(?P<name>.+)")  # in the cache of Hugging Face's hub

# The same model in another format may lie in the folder, too: its file would say that another backend runs it.
_OTHER_ARTEFACTS = {a.filename for a in ARTEFACTS} - {"openvino_model.xml", "config.json"}


@dataclass(frozen=True, slots=True)
class BareModel:
    name: str
    files: Mapping[str, Path]  # in the version's folder → where it is


def recognise(path: Path) -> BareModel | Problem | None:
    """The model that `path` is, or what is wrong with it; None where it is no model, but perhaps a repository."""
    if path.is_file():
        return _gguf(path) if path.suffix.lower() == ".gguf" or _begins_with_magic(path) else None
    if path.suffix.lower() == ".gguf" and not path.exists():
        return _no_such_file(path)
    if not path.is_dir() or mistaken(path) is not None:
        return None
    return _folder(path)


def _folder(path: Path) -> BareModel | Problem | None:
    """Only what lies in the folder itself counts: a repository's models are in folders of their own."""
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError:  # whoever reads the repository says so
        return None
    names = {entry.name for entry in entries}
    weights = {entry.suffix for entry in entries if entry.is_file()}
    if "openvino_model.xml" in names or ("config.json" in names and ".safetensors" in weights):
        files = {entry.name: entry.absolute() for entry in entries if entry.name not in _OTHER_ARTEFACTS}
        return BareModel(_cleaned(_folder_name(path)), files)
    if "config.json" in names:
        why = "has a model's config.json, but no weights that can be served (*.safetensors, openvino_model.xml)"
        return Problem(str(path), why, "fetch the model's whole folder, or name a .gguf file of it")
    if ".gguf" in weights and not any(entry.is_dir() for entry in entries):
        found = [entry for entry in entries if entry.suffix == ".gguf"]
        if len({_without_part(file) for file in found}) == 1:
            return _gguf(found[0])
        fix = f"name one of them, as in doorstep serve {found[0]}"
        return Problem(str(path), f"holds {len(found)} GGUF files, and no folder of a model", fix)
    return None


def _gguf(path: Path) -> BareModel | Problem:
    files = _parts(path)
    if isinstance(files, Problem):
        return files
    for file in files:
        if file.stat().st_size == 0:
            return Problem(str(file), "is empty", "fetch it again")
    try:
        read_head(files[0])  # of a model in parts, the first says what it is
    except BackendError as error:
        why = error.message.removeprefix(f"{files[0].name} ")
        fix = "" if _begins_with_magic(files[0]) else "fetch the file itself, not a page about it or a pointer to it"
        return Problem(str(path.with_name(files[0].name)), why, fix)
    if len(files) > 1:  # the engine finds the others by their names
        return BareModel(_cleaned(_without_part(path)), {file.name: file for file in files})
    folder = path.absolute().parent
    in_repository = path.name == "model.gguf" and folder.name.isdecimal()
    return BareModel(_cleaned(folder.parent.name if in_repository else path.stem), {"model.gguf": files[0]})


def _parts(path: Path) -> list[Path] | Problem:
    """All files of a model, of which `path` is one."""
    part = _PART.fullmatch(path.stem)
    if part is None:
        return [path.absolute()]
    count = int(part["count"])
    files = [
        path.absolute().with_name(f"{part['name']}-{number:05}-of-{part['count']}{path.suffix}")
        for number in range(1, count + 1)
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        what = f"is one of {count} parts, and {len(missing)} are not there: {', '.join(missing[:3])}"
        return Problem(str(path), what, f"put them into {path.absolute().parent}")
    return files


def _begins_with_magic(path: Path) -> bool:
    """Ollama's files, for one, have no suffix."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def _no_such_file(path: Path) -> Problem:
    beside = path.absolute().parent
    near = difflib.get_close_matches(path.name, [file.name for file in beside.glob("*.gguf")], n=1)
    if near:
        return Problem(str(path), "there is no such file", f"did you mean {path.parent / near[0]}?")
    return Problem(str(path), "there is no such file", "name a .gguf file, or a folder of models")


def _without_part(path: Path) -> str:
    part = _PART.fullmatch(path.stem)
    return part["name"] if part else path.stem


def _folder_name(path: Path) -> str:
    folder = path.absolute().resolve() if path.name in ("", "..") else path.absolute()
    snapshot = _SNAPSHOT.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return snapshot["name"] if snapshot else folder.name


def _cleaned(name: str) -> str:
    """Nothing that a URL or a shell would have to quote."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def same_names(models: Sequence[BareModel]) -> Problem | None:
    names = [model.name for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is None:
        return None
    paths = [str(next(iter(model.files.values()))) for model in models if model.name == twice]
    return Problem(" and ".join(paths), f"would both be called '{twice}'", "rename one, or lay out a repository")


@contextmanager
def repository_of(models: Sequence[BareModel]) -> Iterator[Path]:
    """A folder of these models, gone at the end. Their files stay where they are."""
    with tempfile.TemporaryDirectory(prefix="doorstep-", ignore_cleanup_errors=True) as folder:
        for model in models:
            version = Path(folder, model.name, "1")
            version.mkdir(parents=True)
            for name, target in model.files.items():
                (version / name).symlink_to(target)
        yield Path(folder)
