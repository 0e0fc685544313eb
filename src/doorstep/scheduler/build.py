"""Chooses and makes the scheduler a model's config asks for. Knows the config and the schedulers, and runs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from doorstep.config.model import ModelConfig
from doorstep.request import InferenceRequest
from doorstep.scheduler.base import Scheduler
from doorstep.scheduler.default import ALONE, DefaultScheduler
from doorstep.scheduler.dynamic import DynamicBatchScheduler, QueuePolicy
from doorstep.scheduler.plan import BatchPolicy
from doorstep.services import NO_SERVICES, Services
from doorstep.stats import ModelStatistics
from doorstep.workers.base import Worker


def build_scheduler(
    config: ModelConfig,
    version: str,
    workers: list[Worker],
    stats: ModelStatistics,
    loop: asyncio.AbstractEventLoop,
    services: Services = NO_SERVICES,
) -> Scheduler:
    if config.proto.WhichOneof("scheduling_choice") != "dynamic_batching" or config.max_batch_size < 1:
        return DefaultScheduler(config.name, version, workers, stats, ALONE, loop=loop)
    batching = config.proto.dynamic_batching
    queue = batching.default_queue_policy
    return DynamicBatchScheduler(
        config.name,
        version,
        workers,
        stats,
        BatchPolicy(
            max_rows=config.max_batch_size,
            preferred_rows=frozenset(batching.preferred_batch_size),
            max_delay_ns=batching.max_queue_delay_microseconds * 1000,
        ),
        loop=loop,
        queue_policy=QueuePolicy(
            max_size=queue.max_queue_size,
            default_timeout_ns=queue.default_timeout_microseconds * 1000,
            allow_override=queue.allow_timeout_override,
        ),
        preserve_ordering=batching.preserve_ordering,
        key_of=stacking_key(config),
    )


def stacking_key(config: ModelConfig) -> Callable[[InferenceRequest], object] | None:
    """What two requests must have in common to be stacked: their inputs' shapes but for the rows, and which inputs.

    None where validation leaves no choice: every input required and of one shape."""
    free = any(-1 in spec.dims and not spec.ragged for spec in config.inputs.values())
    optional = len(config.required_inputs) < len(config.inputs)
    if not free and not optional:
        return None
    names = tuple(config.inputs)
    ragged = frozenset(name for name, spec in config.inputs.items() if spec.ragged)
    if len(names) == 1 and not ragged:
        name = names[0]

        def key_of_one(request: InferenceRequest) -> object:
            tensor = request.inputs.get(name)
            return None if tensor is None else tensor.array.shape[1:]

        return key_of_one

    def key_of(request: InferenceRequest) -> object:
        inputs = request.inputs
        return tuple(
            [None if name not in inputs else () if name in ragged else inputs[name].array.shape[1:] for name in names]
        )

    return key_of
