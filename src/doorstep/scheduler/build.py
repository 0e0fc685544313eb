"""Chooses and makes the scheduler a model's config asks for. Knows the config and the schedulers, and runs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from doorstep.config.model import ModelConfig
from doorstep.config.sequence import SequenceSpec
from doorstep.request import InferenceRequest
from doorstep.scheduler.base import Scheduler
from doorstep.scheduler.default import ALONE, DefaultScheduler
from doorstep.scheduler.delays import backlog_delay, scheduler_delay
from doorstep.scheduler.dynamic import DynamicBatchScheduler
from doorstep.scheduler.ensemble import EnsembleScheduler
from doorstep.scheduler.plan import BatchPolicy
from doorstep.scheduler.queue import Priorities, QueuePolicy
from doorstep.scheduler.sequence import SequenceScheduler
from doorstep.scheduler.sequence_direct import DirectBatcher, DirectPolicy
from doorstep.scheduler.sequence_oldest import OldestBatcher
from doorstep.scheduler.sequence_tensors import SequenceTensors
from doorstep.scheduler.slots import DEFAULT_QUEUE_SIZE, SlotScheduler
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
    slots: int = 0,
) -> Scheduler:
    """`slots`: Backend.slots."""
    if slots:
        return _slot_scheduler(config, version, workers, stats, loop, slots)
    if config.proto.HasField("ensemble_scheduling"):
        return EnsembleScheduler(config, version, stats, services, loop)
    if config.sequence is not None:
        return _sequence_scheduler(config, config.sequence, version, workers, stats, loop, services)
    if not config.proto.HasField("dynamic_batching"):
        return DefaultScheduler(
            config.name, version, workers, stats, ALONE, loop=loop, limiter=services.limiter
        )  # a request's priority and timeout mean nothing here
    batching = config.proto.dynamic_batching
    return DynamicBatchScheduler(
        config.name,
        version,
        workers,
        stats,
        _batch_policy(config),
        loop=loop,
        queue_policy=_queue_policy(batching.default_queue_policy),
        priorities=_priorities(batching),
        preserve_ordering=batching.preserve_ordering,
        key_of=stacking_key(config),
        limiter=services.limiter,
        hold_until=scheduler_delay(),
    )


def _slot_scheduler(
    config: ModelConfig,
    version: str,
    workers: list[Worker],
    stats: ModelStatistics,
    loop: asyncio.AbstractEventLoop,
    slots: int,
) -> SlotScheduler:
    batching = config.proto.dynamic_batching
    policy = _queue_policy(batching.default_queue_policy)
    if not policy.max_size:
        policy = replace(policy, max_size=DEFAULT_QUEUE_SIZE)
    context_size = int(config.parameters.get("context_size", "0"))
    return SlotScheduler(
        config.name, version, workers, stats, slots, context_size,
        loop=loop, queue_policy=policy, priorities=_priorities(batching),
    )  # fmt: skip


def _priorities(batching: Any) -> Priorities:
    return Priorities(
        batching.priority_levels,
        batching.default_priority_level,
        {level: _queue_policy(policy) for level, policy in batching.priority_queue_policy.items()},
    )


def _sequence_scheduler(
    config: ModelConfig,
    spec: SequenceSpec,
    version: str,
    workers: list[Worker],
    stats: ModelStatistics,
    loop: asyncio.AbstractEventLoop,
    services: Services,
) -> SequenceScheduler:
    batching = config.proto.sequence_batching
    oldest, direct = batching.oldest, batching.direct
    slots = max(config.max_batch_size, 1)
    hold = scheduler_delay()
    direct_policy = DirectPolicy(direct.max_queue_delay_microseconds * 1000, direct.minimum_slot_utilization)
    oldest_policy = BatchPolicy(
        max_rows=config.max_batch_size,
        preferred_rows=frozenset(oldest.preferred_batch_size),
        max_delay_ns=oldest.max_queue_delay_microseconds * 1000,
    )

    def make_oldest(scheduler: SequenceScheduler, worker: Worker) -> OldestBatcher:
        policy = oldest_policy if config.max_batch_size > 0 else ALONE
        return OldestBatcher(scheduler, worker, oldest.max_candidate_sequences or slots, policy, hold)

    def make_direct(scheduler: SequenceScheduler, worker: Worker) -> DirectBatcher:
        return DirectBatcher(scheduler, worker, slots, direct_policy)

    is_oldest = batching.HasField("oldest")
    return SequenceScheduler(
        config.name,
        version,
        workers,
        stats,
        SequenceTensors(config, spec),
        make_oldest if is_oldest else make_direct,
        loop=loop,
        idle_ns=batching.max_sequence_idle_microseconds * 1000,
        iterative=batching.iterative_sequence,
        preserve_ordering=is_oldest and oldest.preserve_ordering,
        key_of=stacking_key(config),
        limiter=services.limiter,
        hold_until=0 if is_oldest else hold,
        hold_until_backlog=backlog_delay(),
    )


def _batch_policy(config: ModelConfig) -> BatchPolicy:
    if config.max_batch_size < 1:
        return ALONE
    batching = config.proto.dynamic_batching
    return BatchPolicy(
        max_rows=config.max_batch_size,
        preferred_rows=frozenset(batching.preferred_batch_size),
        max_delay_ns=batching.max_queue_delay_microseconds * 1000,
    )


def _queue_policy(policy: Any) -> QueuePolicy:
    """From an inference.ModelQueuePolicy message."""
    return QueuePolicy(
        max_size=policy.max_queue_size,
        default_timeout_ns=policy.default_timeout_microseconds * 1000,
        allow_override=policy.allow_timeout_override,
        delays=policy.timeout_action == policy.DELAY,
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
