"""What a model version is made of, in a few bytes: so that a cache never answers for a version that has changed.

Triton's keys have only the name and number of the version, and its caches answer with what the files before a reload
had computed.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson


def content_of(proto: Any, version_directory: Path, *, shared: bool) -> bytes:
    """For a cache of this server alone: another one with every load. For one that is shared: of the config, and the
    names, sizes and times of change of the version's files, so that servers of the same repository agree."""
    if not shared:
        return os.urandom(16)
    config = type(proto)()
    config.CopyFrom(proto)
    config.ClearField("instance_group")  # where it runs, and how often, is each server's own
    config.parameters.pop("execution", None)
    state = blake2b(config.SerializeToString(deterministic=True), digest_size=16)
    for folder, folders, files in os.walk(version_directory):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if "__pycache__" in path.parts:
                continue
            found = path.stat()
            state.update(orjson.dumps([str(path.relative_to(version_directory)), found.st_size, found.st_mtime_ns]))
    return state.digest()
