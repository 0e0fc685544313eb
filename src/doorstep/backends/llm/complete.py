"""Completes the config of a language model from its files, without loading it. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from doorstep.backends.llm.engines import EngineRow, Facts
from doorstep.backends.llm.settings import DEFAULT_CONTEXT, PARAMETERS, read_settings
from doorstep.backends.llm.tensors import add_tensors
from doorstep.errors import ConfigError, DoorstepError, Problem


def complete_config(row: EngineRow, proto: Any, version_directory: Path, backend_config: Mapping[str, str]) -> None:
    """Tensors, decoupled answers, and what clients may ask: how long a context is, how many run at once. Raises
    ConfigError with everything that is wrong."""
    problems: list[Problem] = []
    if proto.max_batch_size:
        problems.append(
            Problem("max_batch_size", f"is {proto.max_batch_size}", "leave it out: the engine batches by itself")
        )
    execution = proto.parameters["execution"].string_value if "execution" in proto.parameters else "process"
    if execution != "process":
        fix = "leave it out: an engine runs in a process of its own"
        problems.append(Problem('parameters["execution"]', f"is '{execution}'", fix))
    if proto.response_cache.enable:
        problems.append(Problem("response_cache", "means nothing to a language model", "leave it out"))
    if proto.HasField("sequence_batching"):
        problems.append(Problem("sequence_batching", "means nothing to a language model", "leave it out"))
    path = version_directory / (proto.default_model_filename or row.filename)
    parameters = {key: value.string_value for key, value in proto.parameters.items()}
    try:
        facts = row.facts(path)
    except DoorstepError as error:
        problems.append(Problem(str(path.relative_to(version_directory.parent)), error.message))
        facts = Facts()
    for key, value in facts.said.items():
        if key not in parameters:
            parameters[key] = proto.parameters[key].string_value = value
    try:
        settings = read_settings(proto.name, parameters, path, version_directory, backend_config)
    except ConfigError as error:
        problems += error.problems
        raise ConfigError(proto.name, problems) from None
    if problems:
        raise ConfigError(proto.name, problems)

    def say(key: str, value: object) -> None:
        if key not in parameters:
            proto.parameters[key].string_value = str(value)

    task = settings.task if "task" in parameters else facts.task
    say("task", task)
    context_given = "context_size" in parameters or "context-size" in backend_config
    context = settings.context_size if context_given else min(facts.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    say("context_size", context)
    for key in PARAMETERS:
        if key == "slots" or key.replace("_", "-") in backend_config:
            say(key, getattr(settings, key))
    if "adapters" not in parameters and settings.adapters:
        root = version_directory
        say("adapters", ",".join(f"{name}={a.path.relative_to(root)}" for name, a in settings.adapters.items()))
    proto.model_transaction_policy.decoupled = task == "generate"  # vectors and scores come at once
    add_tensors(proto, task)
