"""From a worker process's start to a loaded instance; completes configs in one. Blocking: for loader threads.

Knows no event loop and no batch. Every wait is bounded, and an error says what the process printed last.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from doorstep import proto
from doorstep.backends.base import Backend, CompletionContext, InstanceContext, PythonEnvironment
from doorstep.errors import BackendError, InvalidArgument
from doorstep.workers.frames import Kind, ProtocolError
from doorstep.workers.host_policy import pinned
from doorstep.workers.spawn import Log, Process

logger = logging.getLogger("doorstep.model")
_LEVELS = {"ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO, "VERBOSE": logging.DEBUG}


def log_to_model(level: str, message: str) -> None:
    """The default `log`: the server's own logger for what models say.

    Lines after the first are written as a traceback's are, which is what they mostly are."""
    number = _LEVELS.get(level, logging.INFO)
    if logger.isEnabledFor(number):
        first, _, rest = message.partition("\n")
        logger.handle(
            logger.makeRecord(
                logger.name, number, "model.py", 0, "%s", (first,), None, "log_to_model", sinfo=rest or None
            )
        )


def complete_config(
    backend: Backend,
    config: Any,
    model_directory: Path,
    version_directory: Path,
    context: CompletionContext,
    *,
    log: Log = log_to_model,
) -> Process | None:
    """`Backend.complete_config`, in place; where the backend's instances run in processes, model code runs in one too.

    That process, if any, is the caller's: for `start_process_worker(spare=…)`, or to be closed.
    """
    if backend.default_execution != "process":
        backend.complete_config(config, model_directory, version_directory, context)
        return None
    python = backend.environment(config, model_directory, version_directory, context.backend_config)
    completed, process = complete_config_in_process(
        config, backend.name, model_directory, version_directory, context, log=log, python=python
    )
    config.CopyFrom(completed)
    return process


def complete_config_in_process(
    config: Any,
    backend: str,
    model_directory: Path,
    version_directory: Path,
    context: CompletionContext,
    *,
    log: Log = log_to_model,
    python: PythonEnvironment | None = None,
) -> tuple[Any, Process]:
    """`Backend.complete_config`, but in a process, where model code may run.

    Gives the completed message and the process, which the first instance may use (`spare`); otherwise close it.
    Raises what complete_config raised, or BackendError.
    """
    settings = context.backend_config
    # Most models have one instance, which may count on all cores; libraries read that when they are first imported.
    process = _begin(config.name, log, settings, len(os.sched_getaffinity(0)), python)
    try:
        meta = {
            "backend": backend,
            "model_directory": str(model_directory),
            "version_directory": str(version_directory),
            "backend_config": dict(settings),
            "default_max_batch_size": context.default_max_batch_size,
        }
        data = _ask(process, (Kind.COMPLETE, Kind.COMPLETED), meta, config.SerializeToString(), settings)
        return proto.ModelConfig.FromString(bytes(data)), process
    except BaseException:
        process.close()
        raise


def load_process(
    context: InstanceContext,
    backend: str,
    log: Log,
    spare: Process | None = None,
    *,
    begin: Callable[[Process], None] = lambda _: None,
    has_server: bool = False,
) -> tuple[Process, bool]:
    """A process with the instance loaded, and whether that may say that it is not ready.

    `begin` gets the process before it loads; with `has_server` the model may ask the server from then on. Raises what
    the backend raised, or BackendError.
    """
    settings = context.backend_config
    if spare is not None and (
        context.host_policy or spare.threads != context.threads or spare.python != context.python
    ):
        spare.close()
        spare = None
    if spare is None:
        with pinned(context.host_policy):  # the process begins with what the thread that starts it has
            spare = _begin(context.instance_name, log, settings, context.threads, context.python)
    process = spare
    process.name = context.instance_name
    config = context.config
    try:
        meta = {
            "backend": backend,
            "labels": {name: spec.labels for name, spec in config.outputs.items() if spec.labels},
            "version": context.version,
            "model_directory": str(context.model_directory),
            "version_directory": str(context.version_directory),
            "instance_name": context.instance_name,
            "kind": context.kind,
            "device_id": context.device_id,
            "threads": context.threads,
            "backend_config": dict(settings),
            "server": has_server,
        }
        begin(process)
        answer = _ask(process, (Kind.LOAD, Kind.READY), meta, config.proto.SerializeToString(), settings)
    except BaseException:
        process.close()
        raise
    return process, bool(answer)


def seconds_from(settings: Mapping[str, str], key: str, default: float) -> float:
    """A time limit from the backend's config. Raises InvalidArgument."""
    text = settings.get(key)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InvalidArgument(f"backend config {key}={text}: expected a number of seconds above 0")
    return seconds


def _begin(name: str, log: Log, settings: Mapping[str, str], threads: int, python: PythonEnvironment | None) -> Process:
    """A process that has said hello."""
    seconds = seconds_from(settings, "stub-timeout-seconds", 30)
    try:
        process = Process(name, log, threads=threads, python=python)
    except OSError as error:
        raise BackendError(f"cannot start a process for '{name}': {error}") from error
    try:
        kind, _, _ = process.answer(time.monotonic() + seconds)
        if kind != Kind.HELLO:
            raise ProtocolError(f"a frame of kind {kind} instead of a greeting")
    except TimeoutError:
        words = process.where_it_hangs()
        process.close()
        raise BackendError(
            f"Timed out occurred while waiting for the stub process. The process of '{name}' did not start within "
            f"{seconds:g} s (backend config stub-timeout-seconds){words}"
        ) from None
    except ProtocolError as error:
        process.close()
        raise BackendError(f"the process of '{name}' does not speak our language: {error}") from error
    except BaseException:
        process.close()
        raise
    return process


def _ask(process: Process, kinds: tuple[Kind, Kind], meta: Any, data: bytes, settings: Mapping[str, str]) -> bytearray:
    """Sends a frame of the first kind; gives the data of the answer, which must be of the second."""
    seconds = seconds_from(settings, "load-timeout-seconds", 1200)
    try:
        kind, _, answer = process.ask(kinds[0], meta, data, timeout=seconds)
        if kind != kinds[1]:
            raise ProtocolError(f"a frame of kind {kind} out of turn")
    except TimeoutError:
        raise BackendError(
            f"'{process.name}' did not load within {seconds:g} s (backend config load-timeout-seconds)"
            f"{process.where_it_hangs()}"
        ) from None
    except ProtocolError as error:
        raise BackendError(f"the process of '{process.name}' does not speak our language: {error}") from error
    return answer
