"""The words between the repository and whoever loads models for it. Knows no library and no protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


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
    namespace: str = ""  # its repository, with --model-namespacing
    files: str = ""  # a stamp of all its files but the config's: where it is the same, only the config may differ

    @property
    def identity(self) -> str:
        """What tells it from every other model."""
        return f"{self.namespace}::{self.name}" if self.namespace else self.name


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


@runtime_checkable
class Updatable(Protocol):
    """A servable whose instances may come and go while it serves."""

    def can_become(self, config: Any, written: Any) -> bool:
        """Whether `update_instances(config)` will do in place of loading it again. `written`: its config as it was
        loaded, as VersionSpec has it. On the loop."""

    async def update_instances(self, config: Any) -> None:
        """Changes how many instances there are, while it serves. On the loop; raises a DoorstepError."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A row of the repository index. A model that was never loaded has only a name."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""
    namespace: str = ""


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What a load call may carry beside the name (extension_model_repository.md)."""

    config: str | None = None  # JSON of a ModelConfig
    files: Mapping[str, bytes] = field(default_factory=dict)  # "file:<version>/<path>" without the prefix → content
