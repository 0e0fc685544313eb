"""Decides where a model's instances run (inline, thread, process; measured for `auto`) and starts them there.

Knows backends and workers; no queue and no protocol. Runs in the loader pool.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from doorstep.backends.base import Backend, InstanceContext
from doorstep.errors import ConfigError, Problem
from doorstep.services import NO_SERVICES, Services
from doorstep.workers.access import LoopAccess
from doorstep.workers.base import Worker
from doorstep.workers.host_policy import pinned
from doorstep.workers.inline import InlineWorker
from doorstep.workers.instances import Instance, instances_of
from doorstep.workers.process import start_process_worker
from doorstep.workers.sample import measure_ns, sample_bytes
from doorstep.workers.spawn import Process
from doorstep.workers.thread import ThreadWorker

logger = logging.getLogger("doorstep.model")

INLINE_NS = 200_000  # a largest batch that takes longer does not run on the event loop
INLINE_BYTES = 8 << 20  # of a largest batch; to touch more takes longer than that
EXECUTIONS = ("inline", "thread", "process", "auto")


class InstanceStarter:
    """Starts the instances of one model version: all when it is loaded, and those it lacks when their number grows."""

    def __init__(
        self,
        backend: Backend,
        context: InstanceContext,
        *,
        loop: asyncio.AbstractEventLoop,
        on_restart: Callable[[], None],
        on_slow: Callable[[InlineWorker], None],
        services: Services = NO_SERVICES,
        spare: Process | None = None,
    ) -> None:
        """`spare` is a process that has read the model already; the first instance in a process takes it over."""
        self._backend = backend
        self._context = context
        self._loop = loop
        self._on_restart = on_restart
        self._on_slow = on_slow
        self._services = services
        self._spare = spare
        self.execution = ""  # where they run, once they do

    def wanted(self, groups: Sequence[Any]) -> list[Instance]:
        """All that instance groups ask for."""
        return instances_of(self._context, groups, self._services.host_policies)

    def start(self, instances: Sequence[Instance]) -> tuple[list[Worker], str]:
        """The workers, ready, and where they run. On an error those already started are closed again. Called once."""
        try:
            execution = self._configured()
            inline = None
            if execution == "auto":
                # A host policy is for threads of the model's own; the event loop stays where it is.
                alone = len(instances) == 1 and not instances[0].context.host_policy
                inline = self._try_inline(instances[0].context) if alone else None
                execution = "thread"
            self.execution = execution if inline is None else "inline"
            return [inline] if inline is not None else self._start_all(instances), self.execution
        finally:
            if self._spare is not None:
                self._spare.close()
                self._spare = None

    def start_more(self, instances: Sequence[Instance]) -> list[Worker]:
        """The same for instances beside those that run. What `auto` put on the event loop would be alone there."""
        if self.execution == "inline" and self._configured() == "auto":
            self.execution = "thread"
        return self._start_all(instances)

    def must_leave(self, worker: Worker, count: int) -> bool:
        """Whether a worker cannot stay where it runs when there are `count`."""
        return isinstance(worker, InlineWorker) and count > 1 and self._configured() == "auto"

    def _configured(self) -> str:
        execution = self._context.config.parameters.get("execution", "") or self._backend.default_execution
        if execution not in EXECUTIONS:
            problem = Problem("parameters['execution']", f"is '{execution}'", f"use one of {', '.join(EXECUTIONS)}")
            raise ConfigError(self._context.config.name, [problem])
        return execution

    def _start_all(self, instances: Sequence[Instance]) -> list[Worker]:
        workers: list[Worker] = []
        try:
            for instance in instances:
                workers.append(self._start_one(self.execution, instance.context))  # noqa: PERF401 (known on error)
        except BaseException:
            for worker in workers:
                worker.close()
            raise
        return workers

    def _start_one(self, execution: str, context: InstanceContext) -> Worker:
        if execution == "process":
            spare, self._spare = self._spare, None
            return start_process_worker(
                context,
                self._backend.name,
                loop=self._loop,
                on_restart=self._on_restart,
                spare=spare,
                services=self._services,
            )
        context = replace(context, server=self._access())
        if execution == "inline":
            if context.host_policy:
                logger.warning("%s: its host policy has no effect: it runs on the event loop", context.instance_name)
            instance = self._backend.load_instance(replace(context, threads=1))
            return InlineWorker(context.instance_name, instance, self._on_slow)
        with pinned(context.host_policy):  # the library's own threads are the thread's that loads
            instance = self._backend.load_instance(context)
        return ThreadWorker(context.instance_name, instance, self._loop, context.host_policy)

    def _access(self) -> LoopAccess:
        return LoopAccess(self._context.config.name, self._services, self._loop)

    def _try_inline(self, context: InstanceContext) -> Worker | None:
        """An inline worker if the model is fast enough for the event loop, measured on zeros at its largest batch."""
        if not self._backend.may_run_inline(context):
            return None
        size = sample_bytes(context.config, max(context.config.max_batch_size, 1))
        if size > INLINE_BYTES:
            logger.info("%s: runs in a thread: its largest batch has %d bytes", context.instance_name, size)
            return None
        instance = self._backend.load_instance(replace(context, threads=1, server=self._access()))
        took_ns = measure_ns(instance, context.config)
        if took_ns is not None and took_ns <= INLINE_NS:
            logger.info("%s: runs inline: its largest batch took %d µs", context.instance_name, took_ns // 1000)
            return InlineWorker(context.instance_name, instance, self._on_slow)
        instance.unload()
        why = "zeros cannot be run through it" if took_ns is None else f"its largest batch took {took_ns // 1000} µs"
        logger.info("%s: runs in a thread: %s", context.instance_name, why)
        return None
