"""Decides where a model's instances run (inline, thread, process; measured for `auto`) and starts them there.

Knows backends and workers; no queue and no protocol. Runs in the loader pool.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from doorstep.backends.base import Backend, InstanceContext
from doorstep.config.host_policy import ANYWHERE, HostPolicy
from doorstep.errors import ConfigError, Problem
from doorstep.services import NO_SERVICES, Services
from doorstep.workers.base import Worker
from doorstep.workers.host_policy import pinned
from doorstep.workers.inline import InlineWorker
from doorstep.workers.process import start_process_worker
from doorstep.workers.sample import measure_ns, sample_bytes
from doorstep.workers.spawn import Process
from doorstep.workers.thread import ThreadWorker

logger = logging.getLogger("doorstep.model")

INLINE_NS = 200_000  # a largest batch that takes longer does not run on the event loop
INLINE_BYTES = 8 << 20  # of a largest batch; to touch more takes longer than that
# The policies of groups that name none (tritonserver's --host-policy).
_POLICY_NAMES = {"KIND_CPU": "cpu", "KIND_GPU": "gpu_{}", "KIND_MODEL": "model"}
EXECUTIONS = ("inline", "thread", "process", "auto")


class InstanceStarter:
    """Starts all instances of one model version."""

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

    def start(self) -> tuple[list[Worker], str]:
        """The workers, ready, and where they run. On an error those already started are closed again. Called once."""
        workers: list[Worker] = []
        try:
            return workers, self._start(workers)
        except BaseException:
            for worker in workers:
                worker.close()
            raise
        finally:
            if self._spare is not None:
                self._spare.close()

    def _start(self, workers: list[Worker]) -> str:
        contexts = list(self._contexts())
        execution = self._context.config.parameters.get("execution", "") or self._backend.default_execution
        if execution not in EXECUTIONS:
            problem = Problem("parameters['execution']", f"is '{execution}'", f"use one of {', '.join(EXECUTIONS)}")
            raise ConfigError(self._context.config.name, [problem])
        if execution == "auto":
            # A host policy is for threads of the model's own; the event loop stays where it is.
            alone = len(contexts) == 1 and not contexts[0].host_policy
            inline = self._try_inline(contexts[0]) if alone else None
            if inline is not None:
                workers.append(inline)
                return "inline"
            execution = "thread"
        for context in contexts:
            workers.append(self._start_one(execution, context))  # noqa: PERF401 (those made must be known on error)
        return execution

    def _contexts(self) -> Iterator[InstanceContext]:
        """One for each instance, named as Triton names them: <group>_<number>."""
        groups = self._context.config.proto.instance_group
        threads = max(len(os.sched_getaffinity(0)) // max(sum(group.count for group in groups), 1), 1)
        for group in groups:
            kind = _kind_name(group)
            for number in range(group.count):
                device_id = group.gpus[number % len(group.gpus)] if group.gpus else 0
                policy = self._host_policy(group.host_policy or _POLICY_NAMES[kind].format(device_id))
                yield replace(
                    self._context,
                    instance_name=f"{group.name}_{number}",
                    kind=kind,
                    device_id=device_id,
                    threads=min(threads, len(policy.cores)) if policy.cores else threads,
                    host_policy=policy,
                )

    def _host_policy(self, name: str) -> HostPolicy:
        return self._services.host_policies.get(name, ANYWHERE)

    def _start_one(self, execution: str, context: InstanceContext) -> Worker:
        if execution == "process":
            spare, self._spare = self._spare, None
            return start_process_worker(
                context, self._backend.name, loop=self._loop, on_restart=self._on_restart, spare=spare
            )
        if execution == "inline":
            if context.host_policy:
                logger.warning("%s: its host policy has no effect: it runs on the event loop", context.instance_name)
            instance = self._backend.load_instance(replace(context, threads=1))
            return InlineWorker(context.instance_name, instance, self._on_slow)
        with pinned(context.host_policy):  # the library's own threads are the thread's that loads
            instance = self._backend.load_instance(context)
        return ThreadWorker(context.instance_name, instance, self._loop, context.host_policy)

    def _try_inline(self, context: InstanceContext) -> Worker | None:
        """An inline worker if the model is fast enough for the event loop, measured on zeros at its largest batch."""
        if not self._backend.may_run_inline(context):
            return None
        size = sample_bytes(context.config, max(context.config.max_batch_size, 1))
        if size > INLINE_BYTES:
            logger.info("%s: runs in a thread: its largest batch has %d bytes", context.instance_name, size)
            return None
        instance = self._backend.load_instance(replace(context, threads=1))
        took_ns = measure_ns(instance, context.config)
        if took_ns is not None and took_ns <= INLINE_NS:
            logger.info("%s: runs inline: its largest batch took %d µs", context.instance_name, took_ns // 1000)
            return InlineWorker(context.instance_name, instance, self._on_slow)
        instance.unload()
        why = "zeros cannot be run through it" if took_ns is None else f"its largest batch took {took_ns // 1000} µs"
        logger.info("%s: runs in a thread: %s", context.instance_name, why)
        return None


def _kind_name(group: Any) -> str:
    name: str = group.Kind.Name(group.kind)
    return "KIND_CPU" if name == "KIND_AUTO" else name
