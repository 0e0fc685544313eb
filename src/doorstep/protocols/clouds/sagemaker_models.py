"""The models that a SageMaker multi-model endpoint has loaded, by the names it gave them. Knows no HTTP.

A model lies in /opt/ml/models/<hash>/model, or in the one folder (of an ensemble: the ensemble's) below that; it is
served under the name of its target model. Rules and texts are Triton's (server, sagemaker_server.cc).
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from doorstep.errors import AlreadyExists, DoorstepError, InvalidArgument
from doorstep.repository.base import LoadRequest
from doorstep.repository.turns import Turns

if TYPE_CHECKING:
    from doorstep.server import InferenceServer

_OUT_OF_MEMORY = (
    "CUDA out of memory", "CUDA_OUT_OF_MEMORY", "Out of memory", "Out Of Memory", "out of memory", "MemoryError",
    "OutOfMemory", "OOM", "Dst tensor is not initialized", "Src tensor is not initialized",
    "CNMEM_STATUS_OUT_OF_MEMORY", "CUDNN_STATUS_NOT_INITIALIZED", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "Failed to allocate memory", "failed to allocate memory",
    "No space left on device",
)  # fmt: skip
_FORBIDDEN = ("/dev/", "/proc/", "/sys/")
ROOT = "/opt/ml/models"
_PATH = r"({root}/[0-9A-Za-z._]+)/(model)/?([0-9A-Za-z._]+)?"
_ENSEMBLE = re.compile(r'platform:\s*"ensemble"')
_NAME = re.compile(r'^\s*name\s*:\s*(?:"[^"]*"|\'[^\']*\')\s*;?', re.MULTILINE)


def out_of_memory(message: str) -> bool:
    """Whether an error says so, in the words of one framework or another."""
    return any(words in message for words in _OUT_OF_MEMORY)


class HostedModels:
    """Touched only from the event loop; what looks at the disk runs in a thread."""

    def __init__(self, server: InferenceServer, root: str = ROOT) -> None:
        self.urls: dict[str, str] = {}  # model name, as SageMaker calls it → its repository
        self._server = server
        self._path = re.compile(_PATH.format(root=re.escape(root)))
        self._loaded: dict[str, tuple[str, Path]] = {}  # model name → its target, the folder that is its repository
        self._turns = Turns()

    def listing(self) -> list[dict[str, str]]:
        """Every model loaded here; an empty row for one that is not ready, as Triton has it."""
        return [{"modelName": name, "modelUrl": url} if self._ready(name) else {} for name, url in self.urls.items()]

    def _ready(self, name: str) -> bool:
        try:
            return self._server.model_ready(name, "1")
        except DoorstepError:
            return False

    async def load(self, name: str, url: str, target: str) -> None:
        """Serves the model at `url` as `target`. Raises AlreadyExists, or whatever loading raises."""
        if name in self.urls:
            raise AlreadyExists(f"model '{name}' is loaded already, from '{self.urls[name]}'")
        self.urls[name] = url  # nobody else may take the name meanwhile
        async with self._turns.take(name):
            try:
                place, self.urls[name] = await asyncio.to_thread(_lay_out, self._path, url, target)
                try:
                    self._server.repository.add_repository(place)
                    await self._server.load(target, LoadRequest())
                except BaseException:
                    await self._remove(place)
                    raise
            except BaseException:
                del self.urls[name]
                raise
            self._loaded[name] = target, place

    async def unload(self, name: str, target: str) -> bool:
        """Ceases to serve it, and what only it needed, once it is loaded. False: there is nothing of that name."""
        async with self._turns.take(name):
            if name not in self._loaded:
                return False
            self.check_target(name, target)
            await self._server.unload(target, unload_dependents=True)
            del self.urls[name]
            await self._remove(self._loaded.pop(name)[1])
            return True

    def check_target(self, name: str, target: str) -> None:
        """What is done to one model is not done to another. Raises InvalidArgument."""
        if name in self._loaded and self._loaded[name][0] != target:
            raise InvalidArgument(f"model '{name}' was not loaded as target model '{target}'")

    async def _remove(self, place: Path) -> None:
        self._server.repository.remove_repository(place)
        await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)


def _lay_out(pattern: re.Pattern[str], url: str, target: str) -> tuple[Path, str]:
    """A folder of links in which the model at `url` is called `target`, and the repository that SageMaker is told.

    Raises InvalidArgument for a path that is not SageMaker's."""
    path = os.path.normpath(os.path.join(os.sep, url)) if url else os.getcwd()
    if (path + "/").startswith(_FORBIDDEN):
        raise InvalidArgument(f"Invalid repository path: {url}")
    match = pattern.fullmatch(path)
    if match is None:
        raise InvalidArgument(
            f"Invalid \"url\" '{url}': expected a path of the form /opt/ml/models/<hash>/model[/<subdir>]"
        )
    if not target or "/" in target or "\0" in target or target in (".", ".."):
        raise InvalidArgument(f"invalid model name '{target}', model name must not contain path traversal characters")
    place = None
    try:
        if os.path.isfile(f"{path}/config.pbtxt"):
            parent, chosen = match[1], match[2]
        else:
            parent, chosen = path, _choose(path)
        place = Path(tempfile.mkdtemp(prefix="doorstep-sagemaker-"))
        for entry in os.scandir(parent):
            if entry.is_dir() and entry.name != chosen and parent == path:
                (place / entry.name).symlink_to(entry.path)
        _link(Path(parent, chosen), place / target)
    except (OSError, UnicodeError) as error:
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        why = error.strerror if isinstance(error, OSError) else "a name or a config.pbtxt is not UTF-8 text"
        raise InvalidArgument(f"repository path '{url}' cannot be read: {why}") from None
    return place, parent


def _choose(path: str) -> str:
    """The model among the folders of a repository: the only one, or the ensemble."""
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir())
    for name in folders:
        try:
            text = _text(Path(path, name, "config.pbtxt"), errors="replace")
        except OSError:
            continue
        if _ENSEMBLE.search(text):
            return name
    if not folders:
        raise InvalidArgument(f"there is no model in '{path}'")
    return folders[-1]


def _link(model: Path, target: Path) -> None:
    """The model under another name: links to its files, and a config without a name of its own."""
    target.mkdir()
    for entry in model.iterdir():
        if entry.name == "config.pbtxt":
            (target / entry.name).write_text(_NAME.sub("", _text(entry), count=1))
        else:
            (target / entry.name).symlink_to(entry)


def _text(path: Path, errors: str = "strict") -> str:
    """Of a file: to read a pipe or a device might never end. Raises OSError, UnicodeError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "config.pbtxt is not a file")
    return path.read_text(errors=errors)
