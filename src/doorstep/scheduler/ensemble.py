"""Runs requests through the steps of an ensemble: an ensemble is only another scheduler. Knows no worker and no queue.

A step is a request to another model, sent as soon as its inputs are there; the models' own queues put steps of many
ensembles into one batch. All of it is touched only from the event loop, so there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, QueueRejected
from doorstep.request import InferenceRequest
from doorstep.scheduler.dynamic import STOPPING
from doorstep.scheduler.ensemble_graph import Graph
from doorstep.scheduler.ensemble_run import EnsembleRun, Round
from doorstep.services import Services
from doorstep.stats import ModelStatistics
from doorstep.workers.base import Worker

logger = logging.getLogger("doorstep.model")


class EnsembleScheduler:
    """See the module."""

    busy_workers = 0
    queue_limit = 0

    def __init__(
        self,
        config: ModelConfig,
        version: str,
        stats: ModelStatistics,
        services: Services,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.name = config.name
        self.version = version
        self.stats = stats
        self.clock = clock
        self.decoupled = config.decoupled
        self.batches = config.max_batch_size > 0
        self.required = config.required_inputs
        self.graph = Graph(config)
        self._find = services.model
        self._loop = loop
        self._runs = 0  # requests under way, or with steps that are
        self._stopping = False
        self._empty: list[asyncio.Future[None]] = []  # somebody waits until nothing runs
        limit = config.proto.ensemble_scheduling.max_inflight_requests
        self.limits = [StepLimit(limit) for _ in self.graph.steps] if limit else None
        if limit:
            logger.info("ensemble '%s' has at most %d requests in flight at each step", config.name, limit)

    @property
    def inflight_count(self) -> int:
        return self._runs

    @property
    def is_alone(self) -> bool:
        """One request under way: nobody comes to share a batch with its steps."""
        return self._runs == 1

    @property
    def queued_count(self) -> int:
        """Steps that wait for their turn (max_inflight_requests); what waits in a step's queue is that model's."""
        return sum(limit.waiting_count for limit in self.limits) if self.limits is not None else 0

    def enqueue(self, request: InferenceRequest) -> None:
        if self._stopping:
            raise QueueRejected(STOPPING)
        request.queued_ns = self.clock()
        plan = self.graph.plan(request.requested_outputs)
        self._runs += 1
        run = EnsembleRun(self, request, plan)
        try:
            # The models are held until the request is over: one that is unloaded meanwhile still runs its step.
            binding = self.graph.bind(plan, self._find)
        except DoorstepError as error:
            run.fail(error, None)
            return
        run.start(binding)

    def ended(self) -> None:
        """A run is over, with all of its steps."""
        self._runs -= 1
        if self._empty and not self._runs:
            waiters, self._empty = self._empty, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def stop(self) -> None:
        self._stopping = True

    async def drained(self) -> None:
        while self._runs:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._empty.append(waiter)
            await waiter

    def replace_worker(self, old: Worker, new: Worker) -> None:
        raise AssertionError("an ensemble has no workers")

    def close(self) -> None:
        self.graph.close()


class StepLimit:
    """At most so many requests of one step at a time, all of the ensemble's requests together; the rest wait here."""

    __slots__ = ("_admitting", "_inflight", "_most", "_waiting")

    def __init__(self, most: int) -> None:
        self._most = most
        self._inflight = 0
        self._admitting = False
        self._waiting: deque[tuple[EnsembleRun, int, Round]] = deque()

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    def admit(self, run: EnsembleRun, step: int, round_: Round) -> bool:
        """True: it may go now. False: the run hears of it later, through `admitted`."""
        if self._inflight < self._most:
            self._inflight += 1
            return True
        self._waiting.append((run, step, round_))
        return False

    def release(self) -> None:
        """One that was admitted is over."""
        self._inflight -= 1
        if self._admitting:  # somewhere below; a step may be over before `admitted` returns
            return
        self._admitting = True
        while self._waiting and self._inflight < self._most:
            self._inflight += 1
            run, step, round_ = self._waiting.popleft()
            run.admitted(step, round_)
        self._admitting = False

    def forget(self, run: EnsembleRun) -> int:
        """The run wants nothing any more. Returns how many of its steps had waited."""
        before = len(self._waiting)
        self._waiting = deque(entry for entry in self._waiting if entry[0] is not run)
        return before - len(self._waiting)
