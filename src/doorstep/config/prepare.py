"""From what the user wrote to the config a model is loaded with: complete, check, read labels. Imports no backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from doorstep import proto as messages
from doorstep.config.check import check
from doorstep.config.complete import complete_backend, normalise
from doorstep.config.labels import read_labels
from doorstep.config.load import locate
from doorstep.config.model import ModelConfig
from doorstep.config.support import unsupported
from doorstep.errors import ConfigError, Problem


class WrittenVersion(Protocol):
    """What of a repository's VersionSpec is needed here."""

    @property
    def name(self) -> str: ...
    @property
    def model_directory(self) -> Path: ...
    @property
    def version_directory(self) -> Path: ...
    @property
    def config(self) -> Any: ...


def prepare_config(
    spec: WrittenVersion,
    complete_from_model: Callable[[Any], None],
    *,
    complete: bool = True,
    backends: Collection[str] | None = None,
    gpus: Sequence[int] = (),
    config_name: str = "",
) -> ModelConfig:
    """The complete, checked config of one version. Raises ConfigError with every problem, or what the backend raises.

    `spec.config` is not changed. `complete_from_model` (the backend's complete_config) gets a message whose backend is
    known; it is called, and the model's file read, only if what was written is sound so far and `complete` is on.
    """
    model_directory = spec.model_directory

    def refuse(problems: Sequence[Problem]) -> None:
        if problems:
            raise ConfigError(spec.name, locate(problems, model_directory, spec.config, config_name))

    proto = messages.ModelConfig()
    proto.CopyFrom(spec.config)
    problems = complete_backend(proto, spec.name, model_directory, spec.version_directory)
    refuse(problems or unsupported(proto))
    refuse(
        check(
            proto,
            directory_name=spec.name,
            model_directory=model_directory,
            backends=backends,
            gpus=gpus,
            partial=complete,
        )
    )
    if complete:
        complete_from_model(proto)
    normalise(proto, gpus)
    refuse(unsupported(proto))
    refuse(check(proto, directory_name=spec.name, gpus=gpus))
    labels, _ = read_labels(proto, model_directory)
    return ModelConfig.from_proto(proto, labels)
