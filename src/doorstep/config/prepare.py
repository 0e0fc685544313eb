"""From what the user wrote to the config a model is loaded with: complete, check, read labels. Imports no backend."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from doorstep import proto as messages
from doorstep.config.check import check
from doorstep.config.complete import complete_backend, normalise
from doorstep.config.labels import read_labels
from doorstep.config.load import locate
from doorstep.config.model import ModelConfig
from doorstep.config.support import unsupported
from doorstep.errors import ConfigError, Problem

CompleteFromModel = Callable[[Any, Path, Path], None]
"""Fills in what the config leaves out, from the model's files: (proto, model_directory, version_directory)."""


def prepare(
    written: Any,
    *,
    name: str,
    model_directory: Path,
    version_directory: Path,
    find: Callable[[str], CompleteFromModel],
    backends: Collection[str] | None = None,
    auto_complete: bool = True,
    gpus: Sequence[int] = (),
    config_name: str = "",
) -> ModelConfig:
    """The complete, checked config of one version. Raises ConfigError with every problem, or what the backend raises.

    `written` (an inference.ModelConfig message) is not changed. `find` gives the completion of a backend by its name;
    it is called, and the model's file read, only if what was written is sound so far and `auto_complete` is on.
    """

    def refuse(problems: Sequence[Problem]) -> None:
        if problems:
            raise ConfigError(name, locate(problems, model_directory, written, config_name))

    proto = messages.ModelConfig()
    proto.CopyFrom(written)
    problems = complete_backend(proto, name, model_directory, version_directory)
    refuse(problems or unsupported(proto))
    refuse(
        check(
            proto,
            directory_name=name,
            model_directory=model_directory,
            backends=backends,
            gpus=gpus,
            partial=auto_complete,
        )
    )
    if auto_complete:
        find(proto.backend)(proto, model_directory, version_directory)
    normalise(proto, gpus)
    refuse(unsupported(proto))
    refuse(check(proto, directory_name=name, gpus=gpus))
    labels, _ = read_labels(proto, model_directory)
    return ModelConfig.from_proto(proto, labels)
