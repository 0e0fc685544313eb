"""One loaded model version: its config, its scheduler and the workers its instances run in. Knows no protocol.

`load_model` makes one, in the loader pool; from then on the event loop owns it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.backends.table import find_backend
from doorstep.config.model import ModelConfig
from doorstep.config.prepare import prepare_config
from doorstep.errors import BackendError, DoorstepError, QueueRejected
from doorstep.repository.base import VersionSpec
from doorstep.request import Batch, InferenceRequest
from doorstep.scheduler.build import build_scheduler
from doorstep.stats import ModelStatistics
from doorstep.validation import Validator
from doorstep.workers.base import Worker
from doorstep.workers.inline import InlineWorker
from doorstep.workers.sample import warmup_batches
from doorstep.workers.starter import InstanceStarter
from doorstep.workers.thread import ThreadWorker

logger = logging.getLogger("doorstep.model")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What the server's command line says about loading models."""

    backend_config: Mapping[str, Mapping[str, str]]  # backend → key → value; "" holds what is for all of them
    complete: bool = True  # False: --disable-auto-complete-config


class Model:
    """See the module. Touched only from the event loop once loaded; `close` runs in the loader pool."""

    def __init__(
        self,
        config: ModelConfig,
        version: str,
        workers: list[Worker],
        execution: str,
        stats: ModelStatistics,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.name = config.name
        self.version = version
        self.config = config
        self.execution = execution
        self.stats = stats
        self.workers = workers
        self.scheduler = build_scheduler(config, version, workers, stats, loop)
        self._loop = loop
        self._validate = Validator(config).validate

    def infer(self, request: InferenceRequest) -> None:
        """Takes a valid request; raises InvalidArgument or QueueRejected for one that is still the caller's."""
        self._validate(request)
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

    def move_off_the_loop(self, slow: InlineWorker) -> None:
        """An inline instance takes too long: from now on it runs in a thread."""
        logger.warning("%s: its batches take over a millisecond on the event loop; it runs in a thread now", slow.name)
        worker = ThreadWorker(slow.name, slow.instance, self._loop)
        self.workers[self.workers.index(slow)] = worker
        self.scheduler.replace_worker(slow, worker)
        self.execution = "thread"

    def __repr__(self) -> str:
        return (
            f"<Model {self.name}:{self.version} [{len(self.workers)} {self.execution} instances, "
            f"{self.scheduler.queued_count} queued, {self.inflight_count} in flight]>"
        )


def load_model(spec: VersionSpec, options: LoadOptions, loop: asyncio.AbstractEventLoop) -> Model:
    """Loads one version, warmed up. Raises ConfigError or another DoorstepError with a text fit for the index."""
    start = time.monotonic()
    common = options.backend_config.get("", {})
    config = prepare_config(
        spec,
        lambda proto: find_backend(proto.backend).complete_config(
            proto,
            spec.model_directory,
            spec.version_directory,
            CompletionContext(
                backend_config=options.backend_config.get(proto.backend, {}),
                default_max_batch_size=int(
                    options.backend_config.get(proto.backend, {}).get(
                        "default-max-batch-size", common.get("default-max-batch-size", "4")
                    )
                ),
            ),
        ),
        complete=options.complete,
    )
    stats = ModelStatistics()
    made: list[Model] = []
    starter = InstanceStarter(
        find_backend(config.backend),
        InstanceContext(
            config=config,
            version=spec.version,
            model_directory=spec.model_directory,
            version_directory=spec.version_directory,
            backend_config=options.backend_config.get(config.backend, {}),
        ),
        loop=loop,
        on_restart=lambda: _count_restart(stats),
        on_slow=lambda worker: made[0].move_off_the_loop(worker),
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
    made.append(Model(config, spec.version, workers, execution, stats, loop))
    return made[0]


def _count_restart(stats: ModelStatistics) -> None:
    stats.worker_restarts += 1


def _warm_up(config: ModelConfig, spec: VersionSpec, worker: Worker, loop: asyncio.AbstractEventLoop) -> None:
    """Runs the config's warm-up samples on the worker, each to its end. A failing sample fails the load, as in Triton."""
    import concurrent.futures

    for name, batch in warmup_batches(config, spec.model_directory):
        done: concurrent.futures.Future[Batch] = concurrent.futures.Future()

        def submit(batch: Batch = batch, done: Any = done) -> None:
            worker.submit(batch, done.set_result)

        loop.call_soon_threadsafe(submit)
        for result in done.result().results:
            if isinstance(result, DoorstepError):
                raise BackendError(f"failed to run warmup sample '{name}' for model '{config.name}': {result.message}")
