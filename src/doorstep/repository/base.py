"""The words between the repository and whoever loads models for it. Knows no library and no protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol


class ModelState(Enum):
    """As the repository index says it (extension_model_repository.md)."""

    UNKNOWN = "UNKNOWN"
    READY = "READY"
    UNAVAILABLE = "UNAVAILABLE"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"


@dataclass(frozen=True, slots=True)
class VersionSpec:
    """One version that should exist, and all that is needed to load it."""

    name: str
    version: str
    model_directory: Path  # <repository>/<model>
    version_directory: Path  # <repository>/<model>/<version>
    config: Any  # the inference.ModelConfig message as written by the user, or overridden; not completed


class Servable(Protocol):
    """A loaded model version, as the repository sees it."""

    @property
    def inflight_count(self) -> int: ...

    def stop(self) -> None:
        """Takes no more requests. On the loop."""

    async def drain(self) -> None:
        """Returns when the last request has been answered. On the loop."""

    def close(self) -> None:
        """Gives everything back. In the loader pool; may block."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A row of the repository index. A model that was never loaded has only a name."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What a load call may carry beside the name (extension_model_repository.md)."""

    config: str | None = None  # JSON of a ModelConfig
    files: Mapping[str, bytes] = field(default_factory=dict)  # "file:<version>/<path>" without the prefix → content
