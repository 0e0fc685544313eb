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
from doorstep.config.sequence import read_initial_states
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


def check_written(
    spec: WrittenVersion,
    *,
    complete: bool = True,
    backends: Collection[str] | None = None,
    gpus: Sequence[int] = (),
) -> tuple[Any, list[Problem]]:
    """A copy of `spec.config` with its backend filled in, and everything that is wrong with it before the model's file
    has been looked at. Without `complete`, what that file could supply is missed as well."""
    proto = messages.ModelConfig()
    proto.CopyFrom(spec.config)
    problems = complete_backend(proto, spec.name, spec.model_directory, spec.version_directory)
    undetermined = bool(problems)  # which backend, so that nothing can be said against it
    found = check(
        proto,
        directory_name=spec.name,
        model_directory=spec.model_directory,
        backends=backends,
        gpus=gpus,
        partial=complete,
    )
    problems += [p for p in found if not (undetermined and p.where == "backend")]
    return proto, problems


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

    def refuse(problems: Sequence[Problem]) -> None:
        if problems:
            raise ConfigError(spec.name, locate(problems, spec.model_directory, spec.config, config_name))

    proto, problems = check_written(spec, complete=complete, backends=backends, gpus=gpus)
    refuse(problems)
    if complete:
        try:
            complete_from_model(proto)
        except ConfigError as error:
            refuse(error.problems)
    normalise(proto, gpus)
    refuse(check(proto, directory_name=spec.name, gpus=gpus))
    labels, _ = read_labels(proto, spec.model_directory)
    initial_states, _ = read_initial_states(proto, spec.model_directory)
    return ModelConfig.from_proto(proto, labels, initial_states)
