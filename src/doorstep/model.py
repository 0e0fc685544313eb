"""One loaded model version: its config, its scheduler and the workers its instances run in. Knows no protocol.

`load_model` makes one, in the loader pool; from then on the event loop owns it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson

from doorstep import proto as messages
from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.backends.table import DIRECTORY, backend_names, check_runtime, find_backend, python_based
from doorstep.cache.content import content_of
from doorstep.config.check import check
from doorstep.config.complete import is_ensemble, normalise
from doorstep.config.metrics_options import MetricsOptions, first_response_buckets
from doorstep.config.model import ModelConfig
from doorstep.config.prepare import prepare_config
from doorstep.config.render import config_json
from doorstep.errors import BackendError, ConfigError, DoorstepError, QueueRejected
from doorstep.instances import Change, ModelInstances
from doorstep.latencies import Latencies
from doorstep.memory import give_back
from doorstep.repository.base import VersionSpec
from doorstep.request import Batch, InferenceRequest
from doorstep.scheduler.base import Resizable, Sequential
from doorstep.scheduler.build import build_scheduler
from doorstep.scheduler.cached import with_cache
from doorstep.scheduler.ensemble_graph import with_step_labels
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
    metrics: MetricsOptions = field(default_factory=MetricsOptions)

    def settings_of(self, backend: str) -> dict[str, str]:
        """What --backend-config says for one backend; its own settings win over those for all. Those of a python-based
        backend are the Python backend's, as in Triton."""
        general = self.backend_config.get("", {})
        if python_based(backend, general) is not None:
            backend = "python"
        return {**general, **self.backend_config.get(backend, {})}

    @property
    def backend_directory(self) -> str:
        return self.backend_config.get("", {}).get(DIRECTORY, "")


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
        instances: ModelInstances | None = None,
        slots: int = 0,
    ) -> None:
        self.name = config.name
        self.version = version
        self.config = config
        self.execution = execution
        self.stats = stats
        self.workers = workers
        self._instances = instances
        self.content = b""  # what it is made of, where a response cache wants to know
        self.scheduler = with_cache(
            build_scheduler(config, version, workers, stats, loop, services, slots),
            config,
            version,
            lambda: self.content,
            stats,
            services,
            loop,
        )
        self.namespace = ""  # its repository, where models of one name may be in several
        self.on_closed: Callable[[], None] = lambda: None  # on the loop, once it is closed
        self._loop = loop
        self._validate = Validator(config).validate
        self._holds = 0  # ensembles under way that may still need it
        self._stopping = False
        self._let_go: list[asyncio.Future[None]] = []  # somebody waits until nobody holds it

    def infer(self, request: InferenceRequest) -> None:
        """Takes a valid request; raises InvalidArgument or QueueRejected for one that is still the caller's."""
        self._validate(request)
        self.enqueue(request)

    def enqueue(self, request: InferenceRequest) -> None:
        """As `infer`, for a request that is known to be valid."""
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
    def sequence_count(self) -> int:
        """Sequences that have begun and not ended."""
        return self.scheduler.sequence_count if isinstance(self.scheduler, Sequential) else 0

    async def sequences_ended(self) -> None:
        if isinstance(self.scheduler, Sequential):
            await self.scheduler.ended()

    @property
    def saturation(self) -> float:
        """0: idle; 1: every instance busy, and the queue, where it has a bound, full."""
        scheduler = self.scheduler
        busy = scheduler.busy_workers / len(self.workers) if self.workers else 0.0
        if not scheduler.queue_limit:
            return busy
        return (busy + min(scheduler.queued_count / scheduler.queue_limit, 1.0)) / 2

    async def check_ready(self) -> bool:
        """Whether every instance says that it can serve. Only models that have something to say are asked."""
        answers: list[asyncio.Future[bool]] = []
        for worker in self.workers:
            answer: asyncio.Future[bool] = self._loop.create_future()
            answers.append(answer)
            worker.ready(partial(_settle, answer))
        return all([await answer for answer in answers])

    def hold(self) -> None:
        """An ensemble is under way that may come back: until `release`, requests are taken even after `stop`."""
        self._holds += 1

    def release(self) -> None:
        self._holds -= 1
        if self._stopping and not self._holds:
            self.scheduler.stop()
            waiters, self._let_go = self._let_go, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def stop(self) -> None:
        self._stopping = True
        if not self._holds:
            self.scheduler.stop()

    async def drain(self) -> None:
        while self._stopping and self._holds:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._let_go.append(waiter)
            await waiter
        await self.scheduler.drained()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self.scheduler.close)
        self._loop.call_soon_threadsafe(self.on_closed)
        if self._instances is not None:
            self._instances.close(self.workers)
        else:
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
        if self._instances is not None:
            self._instances.replaced(slow, worker)
        self.execution = self.config.proto.parameters["execution"].string_value = "thread"

    def can_become(self, config: Any, written: Any) -> bool:
        """Whether the message `config` differs from this model's in its instances alone, so that `update_instances`
        will do. `written`: what this model was loaded from; either that or the complete config may be the same."""
        resizable = self._instances is not None and isinstance(self.scheduler, Resizable)
        return resizable and _but_for_instances(config) in (
            _but_for_instances(written),
            _but_for_instances(self.config.proto),
        )

    async def update_instances(self, config: Any) -> None:
        """Takes the instance groups of the message `config`: new instances are ready before others leave, and those
        answer what they have. Raises a DoorstepError, and leaves everything as it was, where that cannot be."""
        scheduler = self.scheduler
        assert self._instances is not None
        assert isinstance(scheduler, Resizable)
        proto = messages.ModelConfig()
        proto.CopyFrom(self.config.proto)
        del proto.instance_group[:]
        proto.instance_group.extend(config.instance_group)
        problems = check(proto, directory_name=self.name, partial=True)  # as written: `normalise` would mend a count
        normalise(proto)
        if problems := problems or check(proto, directory_name=self.name):
            raise ConfigError(self.name, problems)
        starting = asyncio.ensure_future(asyncio.to_thread(self._instances.prepare, proto.instance_group))
        try:
            change = await asyncio.shield(starting)
        except asyncio.CancelledError:  # the server ends: what is being started ends with the model
            starting.add_done_callback(self._add_late)
            raise
        self.workers += change.added
        for worker in change.added:
            scheduler.add_worker(worker)
        await asyncio.gather(*map(scheduler.remove_worker, change.removed))
        await asyncio.to_thread(self._instances.close, change.removed)
        self.workers[:] = [worker for worker in self.workers if worker not in change.removed]
        self.execution = change.execution
        self.config.proto.parameters["execution"].string_value = change.execution
        del self.config.proto.instance_group[:]
        self.config.proto.instance_group.extend(proto.instance_group)
        text = "%s:%s: %d instances added, %d removed"
        logger.info(text, self.name, self.version, len(change.added), len(change.removed), extra={"model": self.name})

    def _add_late(self, starting: asyncio.Future[Change]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            self.workers += starting.result().added

    def __repr__(self) -> str:
        return (
            f"<Model {self.name}:{self.version} [{len(self.workers)} {self.execution} instances, "
            f"{self.scheduler.queued_count} queued, {self.inflight_count} in flight]>"
        )


def load_model(spec: VersionSpec, options: LoadOptions, loop: asyncio.AbstractEventLoop) -> Model:
    """Loads one version, warmed up. Raises ConfigError or another DoorstepError with a text fit for the index."""
    own = options.services.own_handlers(spec.name)
    services = replace(options.services, handlers={**options.services.handlers, **own.handlers})
    try:
        model = _load(spec, replace(options, services=services), loop)
    except BaseException:
        loop.call_soon_threadsafe(own.close)
        raise
    model.on_closed = own.close
    model.namespace = spec.namespace
    cache = services.cache
    if cache is not None:
        model.content = content_of(model.config.proto, spec.version_directory, shared=cache.shared)
    elif model.config.proto.response_cache.enable:
        logger.warning(
            "%s:%s asks for a response cache, and the server has none (--cache-config)", model.name, model.version
        )
    return model


def _load(spec: VersionSpec, options: LoadOptions, loop: asyncio.AbstractEventLoop) -> Model:
    start = time.monotonic()
    stats = ModelStatistics()
    metrics = options.metrics
    config, spare = _prepare(spec, options)
    if metrics.detailed:
        quantiles = [quantile for quantile, _ in metrics.summary_quantiles] if metrics.summary_latencies else ()
        wants_first = metrics.histogram_latencies and config.decoupled
        stats.latencies = Latencies(quantiles, first_response_buckets(config.proto) if wants_first else ())
    if is_ensemble(config.proto):  # no backend, no instances: its steps' models have them
        config = _on_loop(loop, partial(with_step_labels, config, options.services.model))
        stats.load_seconds = time.monotonic() - start
        return Model(config, spec.version, stats, [], loop, execution="", services=options.services)
    made: list[Model] = []
    backend = find_backend(config.backend, options.settings_of(config.backend))
    starter = InstanceStarter(
        backend,
        InstanceContext(
            config=config.for_backend(),
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
    instances = ModelInstances(starter, lambda worker: _warm_up(config, spec, worker, loop), options.services.limiter)
    workers, execution = instances.start(config.proto.instance_group)
    config.proto.parameters["execution"].string_value = execution
    stats.load_seconds = time.monotonic() - start
    if logger.isEnabledFor(logging.DEBUG):
        text = orjson.dumps(config_json(config.proto)).decode()
        logger.debug("%s:%s serves with this config: %s", config.name, spec.version, text, extra={"model": config.name})
    made.append(
        Model(
            config,
            spec.version,
            stats,
            workers,
            loop,
            execution=execution,
            services=options.services,
            instances=instances,
            slots=backend.slots(config),
        )
    )
    return made[0]


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], ModelConfig]) -> ModelConfig:
    """What `call` gives on the event loop, which knows the models that are served."""

    async def run() -> ModelConfig:
        return call()

    return asyncio.run_coroutine_threadsafe(run(), loop).result()


def _prepare(spec: VersionSpec, options: LoadOptions) -> tuple[ModelConfig, Process | None]:
    """The complete config and, where user code completed it, the process that ran that code: the caller's."""
    processes: list[Process] = []

    def complete(proto: Any) -> None:
        if is_ensemble(proto):
            return
        settings = options.settings_of(proto.backend)
        check_runtime(proto.name, proto.backend, proto.runtime, settings)
        context = CompletionContext(settings, int(settings.get("default-max-batch-size", "4")))
        process = complete_config(
            find_backend(proto.backend, settings), proto, spec.model_directory, spec.version_directory, context
        )
        if process is not None:
            processes.append(process)

    try:
        config = prepare_config(
            spec,
            complete,
            complete=options.complete,
            backends=backend_names(options.backend_directory),
            config_name=options.config_name,
        )
    except BaseException:
        for process in processes:
            process.close()
        raise
    return config, processes[0] if processes else None


def _but_for_instances(config: Any) -> bytes:
    """What must not change where only instances do (Triton's ConfigChangeRequiresReload)."""
    rest = messages.ModelConfig()
    rest.CopyFrom(config)
    rest.ClearField("instance_group")
    rest.ClearField("version_policy")
    return bytes(rest.SerializeToString(deterministic=True))


def _settle(answer: asyncio.Future[bool], ready: bool) -> None:
    if not answer.done():  # nobody waits any more
        answer.set_result(ready)


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
