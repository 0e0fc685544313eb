"""A model whose files came with the load call: written to a directory of their own. Knows no config and no loading.

Blocks on the disk, so it runs off the event loop.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from doorstep.errors import DoorstepError, Internal, InvalidArgument


class OverrideDirectory:
    """`<temporary>/<model>/` with the files of one load call; gone when the last user has let go of it."""

    def __init__(self, name: str, files: Mapping[str, bytes]) -> None:
        """`files`: "<version>/<path>" → content. Raises InvalidArgument for a path that leads out of the directory."""
        targets = {path: _inside(path) for path in files}
        self._root = Path(tempfile.mkdtemp(prefix="doorstep-override-"))  # mode 0700
        self._users = 1
        self.directory = self._root / name
        try:
            self.directory.mkdir()
            for path, content in files.items():
                target = self.directory.joinpath(*targets[path].parts)
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
                except (FileExistsError, NotADirectoryError, IsADirectoryError):
                    message = f"Invalid file parameter 'file:{path}', directory has been created as a file"
                    raise InvalidArgument(message) from None
        except OSError as error:
            shutil.rmtree(self._root, ignore_errors=True)
            raise Internal(f"cannot write the files of the load call: {error.strerror}") from None
        except DoorstepError:
            shutil.rmtree(self._root, ignore_errors=True)
            raise

    def hold(self) -> None:
        self._users += 1

    def release(self) -> bool:
        """True for the last user, who is to call `remove`."""
        self._users -= 1
        return self._users == 0

    def remove(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def _inside(path: str) -> PurePosixPath:
    """`path` without its dots. Raises InvalidArgument where it leads outside, or to the directory itself."""
    parts: list[str] = []
    escapes = "\0" in path
    for part in PurePosixPath(path.lstrip("/")).parts:  # Triton joins it to the directory, slash or no slash
        if part == "..":
            escapes = escapes or not parts
            del parts[-1:]
        else:
            parts.append(part)
    if escapes or not parts:
        shown = str(PurePosixPath(path))
        raise InvalidArgument(
            f"Invalid file parameter 'file:{path}' with normalized path '{shown}' must stay within model directory."
        )
    return PurePosixPath(*parts)
