"""One loaded model version: its config, its scheduler and the workers its instances run in. Knows no protocol.

`load_model` makes one, in the loader pool; from then on the event loop owns it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson

from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.backends.table import backend_names, find_backend
from doorstep.config.model import ModelConfig
from doorstep.config.prepare import prepare_config
from doorstep.config.render import config_json
from doorstep.errors import BackendError, DoorstepError, QueueRejected
from doorstep.memory import give_back
from doorstep.repository.base import VersionSpec
from doorstep.request import Batch, InferenceRequest
from doorstep.scheduler.build import build_scheduler
from doorstep.services import NO_SERVICES, Services
from doorstep.stats import ModelStatistics
from doorstep.validation import Validator
from doorstep.workers.base import Worker
from doorstep.workers.inline import InlineWorker
from doorstep.workers.loading import complete_config
from doorstep.workers.sample import warmup_batches
from doorstep.workers.spawn import Process
from doorstep.workers.starter import InstanceStarter
from doorstep.workers.thread import ThreadWorker

logger = logging.getLogger("doorstep.model")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the server's command line says about loading models."""

    backend_config: Mapping[str, Mapping[str, str]]  # backend → key → value; "" holds what is for all of them
    complete: bool = True  # False: --disable-auto-complete-config
    config_name: str = ""  # --model-config-name
    services: Services = field(default_factory=Services)

    def settings_of(self, backend: str) -> dict[str, str]:
        """What --backend-config says for one backend; its own settings win over those for all."""
        return {**self.backend_config.get("", {}), **self.backend_config.get(backend, {})}


class Model:
    """See the module. Touched only from the event loop once loaded; `close` runs in the loader pool."""

    def __init__(
        self,
        config: ModelConfig,
        version: str,
        stats: ModelStatistics,
        workers: list[Worker],
        loop: asyncio.AbstractEventLoop,
        *,
        execution: str,
        services: Services = NO_SERVICES,
    ) -> None:
        self.name = config.name
        self.version = version
        self.config = config
        self.execution = execution
        self.stats = stats
        self.workers = workers
        self.scheduler = build_scheduler(config, version, workers, stats, loop, services)
        self._loop = loop
        self._validate = Validator(config).validate

    def infer(self, request: InferenceRequest) -> None:
        """Takes a valid request; raises InvalidArgument or QueueRejected for one that is still the caller's."""
        self._validate(request)
        if request.trace is not None:
            request.trace.started(request, self.version)
        try:
            self.scheduler.enqueue(request)
        except QueueRejected as error:
            self.stats.record_failure(time.monotonic_ns() - request.received_ns, error.reason)
            raise

    @property
    def inflight_count(self) -> int:
        return self.scheduler.inflight_count

    @property
    def saturation(self) -> float:
        """0: idle; 1: every instance busy, and the queue, where it has a bound, full."""
        scheduler = self.scheduler
        busy = scheduler.busy_workers / len(self.workers) if self.workers else 0.0
        if not scheduler.queue_limit:
            return busy
        return (busy + min(scheduler.queued_count / scheduler.queue_limit, 1.0)) / 2

    def stop(self) -> None:
        self.scheduler.stop()

    async def drain(self) -> None:
        await self.scheduler.drained()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.scheduler.close)
        for worker in self.workers:
            worker.close()
        if self.execution != "process":
            give_back()

    def move_off_the_loop(self, slow: InlineWorker) -> None:
        """An inline instance takes too long: from now on it runs in a thread."""
        logger.warning("%s: its batches take over a millisecond on the event loop; it runs in a thread now", slow.name)
        worker = ThreadWorker(slow.name, slow.instance, self._loop)
        self.workers[self.workers.index(slow)] = worker
        self.scheduler.replace_worker(slow, worker)
        self.execution = self.config.proto.parameters["execution"].string_value = "thread"

    def __repr__(self) -> str:
        return (
            f"<Model {self.name}:{self.version} [{len(self.workers)} {self.execution} instances, "
            f"{self.scheduler.queued_count} queued, {self.inflight_count} in flight]>"
        )


def load_model(spec: VersionSpec, options: LoadOptions, loop: asyncio.AbstractEventLoop) -> Model:
    """Loads one version, warmed up. Raises ConfigError or another DoorstepError with a text fit for the index."""
    start = time.monotonic()
    stats = ModelStatistics()
    config, spare = _prepare(spec, options)
    made: list[Model] = []
    starter = InstanceStarter(
        find_backend(config.backend),
        InstanceContext(
            config=config,
            version=spec.version,
            model_directory=spec.model_directory,
            version_directory=spec.version_directory,
            backend_config=options.settings_of(config.backend),
        ),
        loop=loop,
        services=options.services,
        on_restart=partial(_count_restart, stats),
        on_slow=lambda worker: made[0].move_off_the_loop(worker),  # noqa: PLW0108 (made is empty as yet)
        spare=spare,
    )
    workers, execution = starter.start()
    try:
        config.proto.parameters["execution"].string_value = execution
        for worker in workers:
            _warm_up(config, spec, worker, loop)
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    stats.load_seconds = time.monotonic() - start
    if logger.isEnabledFor(logging.DEBUG):
        text = orjson.dumps(config_json(config.proto)).decode()
        logger.debug("%s:%s serves with this config: %s", config.name, spec.version, text, extra={"model": config.name})
    made.append(Model(config, spec.version, stats, workers, loop, execution=execution, services=options.services))
    return made[0]


def _prepare(spec: VersionSpec, options: LoadOptions) -> tuple[ModelConfig, Process | None]:
    """The complete config and, where user code completed it, the process that ran that code: the caller's."""
    processes: list[Process] = []

    def complete(proto: Any) -> None:
        settings = options.settings_of(proto.backend)
        context = CompletionContext(settings, int(settings.get("default-max-batch-size", "4")))
        process = complete_config(
            find_backend(proto.backend), proto, spec.model_directory, spec.version_directory, context
        )
        if process is not None:
            processes.append(process)

    try:
        config = prepare_config(
            spec, complete, complete=options.complete, backends=backend_names(), config_name=options.config_name
        )
    except BaseException:
        for process in processes:
            process.close()
        raise
    return config, processes[0] if processes else None


def _count_restart(stats: ModelStatistics) -> None:
    stats.worker_restarts += 1


def _warm_up(config: ModelConfig, spec: VersionSpec, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
    """Runs the config's warm-up samples on the worker, each to its end. One that fails fails the load, as in Triton."""
    for name, batch in warmup_batches(config, spec.model_directory):
        done: Future[Batch] = Future()
        loop.call_soon_threadsafe(worker.submit, batch, done.set_result)
        for result in done.result().results:
            if isinstance(result, DoorstepError):
                raise BackendError(f"failed to run warmup sample '{name}' for model '{config.name}': {result.message}")
