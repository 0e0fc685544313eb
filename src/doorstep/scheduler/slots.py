"""Gives requests to engines that work on several at once: a fair queue in front of a number of slots per instance.

For language models. An engine batches by itself, token by token; what is left to decide is who gets a slot, and on
which instance. A request of no rows needs none (to count tokens, say). All of it is touched only from the event loop,
so there is no lock.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence

from doorstep.backends.llm.counts import FINISHES, Counts, split_counts
from doorstep.backends.llm.job import JOB
from doorstep.errors import QueueRejected
from doorstep.llm_stats import LLMStatistics, Progress
from doorstep.request import InferenceRequest, cancelled_error
from doorstep.scheduler.affinity import Affinity, blocks_of
from doorstep.scheduler.dynamic import STOPPING
from doorstep.scheduler.fair_queue import FairQueue
from doorstep.scheduler.queue import TIMEOUT_EXPIRED, Priorities, QueuePolicy, queue_full
from doorstep.scheduler.runner import Runner
from doorstep.scheduler.timer import Alarm
from doorstep.stats import ModelStatistics
from doorstep.types import Tensor
from doorstep.workers.base import Worker

DEFAULT_QUEUE_SIZE = 128  # where the config says nothing: language models are slow, and a client rather hears no
MOST_RETRY_S = 60
MOST_WAITING_BYTES = 64 << 20  # of prompts
MOST_LIGHT = 256  # requests that need no slot, and wait
LIGHT_PER_WORKER = 4  # of them at once


class SlotScheduler:
    """See the module."""

    def __init__(
        self,
        name: str,
        version: str,
        workers: list[Worker],
        stats: ModelStatistics,
        slots: int,
        context_size: int,
        *,
        loop: asyncio.AbstractEventLoop,
        queue_policy: QueuePolicy,
        priorities: Priorities,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.llm = LLMStatistics(slots * len(workers), context_size)
        self._slots = slots
        self._clock = clock
        self._queue = FairQueue(queue_policy, priorities)
        self._queue_limit = self._queue.limit
        self._runner = Runner(
            name,
            version,
            workers,
            stats,
            loop,
            on_idle=lambda worker: self._pump(),
            on_finished=self._on_finished,
            settle=self._settle,
            clock=clock,
        )
        self._workers = list(workers)
        self._used: dict[Worker, int] = dict.fromkeys(workers, 0)  # slots
        self._light: deque[InferenceRequest] = deque()  # need no slot, only an idle worker
        self._light_running = 0
        self._waiting: dict[InferenceRequest, int] = {}  # and how many bytes each keeps
        self._waiting_bytes = 0
        self._running: dict[InferenceRequest, tuple[Worker, int]] = {}  # and how many slots it has: 1, or 0
        self._progress: dict[InferenceRequest, Progress] = {}
        self._affinity = Affinity()
        self._alarm = Alarm(loop, self._on_alarm)
        self._pumping = False
        self._stopping = False
        self._on_cancel = self._cancel

    # What others see

    @property
    def queued_count(self) -> int:
        return len(self._queue) + len(self._light)

    @property
    def inflight_count(self) -> int:
        return self.queued_count + len(self._running)

    @property
    def busy_workers(self) -> int:
        """Those with no slot left."""
        return sum(used >= self._slots for used in self._used.values())

    @property
    def queue_limit(self) -> int:
        return self._queue_limit

    def adapters_running(self) -> list[str]:
        """The LoRA adapters of requests that have a slot."""
        return sorted({str(request.batch_key) for request in self._running if request.batch_key})

    def adapters_waiting(self) -> list[str]:
        return sorted({str(request.batch_key) for request in self._queue if request.batch_key})

    def retry_after_s(self) -> int:
        """When somebody who was refused may try again: what the queue takes, roughly, and not all at once."""
        ended = self.llm.end_to_end_s
        count = sum(ended.counts)
        mean_s = ended.total / count if count else 1.0
        wait_s = mean_s * (len(self._queue) + 1) / max(self.llm.slots, 1)
        return round(min(max(wait_s, 1.0), MOST_RETRY_S) * random.uniform(1.0, 1.5))  # noqa: S311 (no secret)

    def enqueue(self, request: InferenceRequest) -> None:
        if self._stopping:
            self.llm.reject("stopping")
            raise QueueRejected(STOPPING)
        request.queued_ns = self._clock()
        size = len(_beginning(request))
        if self._waiting and self._waiting_bytes + size > MOST_WAITING_BYTES:
            self.llm.reject("queue_full")
            raise queue_full(request)
        if not request.rows:
            if len(self._light) >= MOST_LIGHT:
                self.llm.reject("queue_full")
                raise queue_full(request)
            self._light.append(request)
        else:
            try:
                expires_ns = self._queue.append(request)
            except QueueRejected:
                self.llm.reject("queue_full")
                raise
            if expires_ns:
                self._alarm.set(expires_ns)
        self._waiting[request] = size
        self._waiting_bytes += size
        request.on_cancel = self._on_cancel
        self._pump()

    def stop(self) -> None:
        self._stopping = True

    async def drained(self) -> None:
        await self._runner.drained(lambda: not self.inflight_count)

    def close(self) -> None:
        self._alarm.close()

    def replace_worker(self, old: Worker, new: Worker) -> None:
        raise NotImplementedError("an engine's instance stays where it is")

    def add_worker(self, worker: Worker) -> None:
        self._workers.append(worker)
        self._used[worker] = 0
        self.llm.slots += self._slots
        self._runner.add_worker(worker)
        self._pump()

    async def remove_worker(self, worker: Worker) -> None:
        self._workers.remove(worker)
        self.llm.slots -= self._slots
        self._affinity.forget(worker)
        await self._runner.remove_worker(worker)
        self._used.pop(worker, None)

    # Decide, then act

    def _pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        idle = self._runner.idle
        try:
            while idle and self._light and self._light_running < LIGHT_PER_WORKER * len(self._workers):
                self._run(self._light.popleft(), idle[-1], 0)
            while free := [w for w in idle if self._used.get(w, self._slots) < self._slots]:
                request = self._queue.popleft()
                if request is None:
                    break
                if 0 < request.deadline_ns <= self._clock():
                    self._expire(request)
                    continue
                self._run(request, self._choose(request, free), 1)
        finally:
            self._pumping = False

    def _choose(self, request: InferenceRequest, free: Sequence[Worker]) -> Worker:
        if len(self._workers) == 1:
            return free[0]
        blocks = blocks_of(_beginning(request))
        chosen = self._affinity.choose(blocks, free, [self._used[w] for w in free])
        self._affinity.note(blocks, chosen)
        return chosen

    def _run(self, request: InferenceRequest, worker: Worker, slots: int) -> None:
        self._waits_no_more(request)
        self._used[worker] += slots
        self._light_running += not slots
        self._running[request] = (worker, slots)
        if slots:
            self.llm.running += 1
            self._progress[request] = Progress(self._clock())
        self._runner.idle.remove(worker)
        self._runner.run(worker, [request], 1)

    def _on_finished(self, request: InferenceRequest) -> None:
        """It has had its last answer, whatever that was."""
        worker, slots = self._running.pop(request, (None, 0))
        if worker is None:
            return  # it never got a slot
        if worker in self._used:
            self._used[worker] -= slots
        self._light_running -= not slots
        progress = self._progress.pop(request, None)
        if progress is not None:
            self.llm.running -= 1
            if progress.started_ns:  # no last piece was counted
                self._ended(request, progress, "abort" if request.cancelled else "error")
        if not self._running:
            self.llm.kv_usage = 0.0
        self._pump()

    # Statistics

    def _settle(self, request: InferenceRequest, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        outputs, counts = split_counts(outputs)
        progress = self._progress.get(request)
        if counts is not None and progress is not None:
            self._count(request, counts, progress)
        return outputs

    def _count(self, request: InferenceRequest, counts: Counts, progress: Progress) -> None:
        llm = self.llm
        now = self._clock()
        llm.kv_usage = counts.kv_ppm / 1e6
        if counts.prompt >= 0:
            progress.prompt, progress.cached = counts.prompt, counts.cached
        if counts.tokens:
            if not progress.first_ns:
                progress.first_ns = now
                llm.first_token_s.observe((now - request.received_ns) / 1e9)
            else:
                # Several tokens in one piece took the time together.
                each = (now - progress.last_ns) / 1e9 / counts.tokens
                for _ in range(min(counts.tokens, 16)):
                    llm.next_token_s.observe(each)
            progress.last_ns = now
            progress.tokens += counts.tokens
        if counts.finish:
            if counts.completion >= 0:
                progress.tokens = counts.completion
            self._ended(request, progress, FINISHES[counts.finish], counts)

    def _ended(self, request: InferenceRequest, progress: Progress, how: str, counts: Counts | None = None) -> None:
        llm = self.llm
        now = self._clock()
        llm.finished[how] += 1
        llm.prompt_tokens += progress.prompt
        llm.cached_tokens += progress.cached
        llm.generated_tokens += progress.tokens
        llm.request_prompt_tokens.observe(progress.prompt)
        llm.request_generated_tokens.observe(progress.tokens)
        started_ns, first_ns = progress.started_ns, progress.first_ns
        llm.queue_s.observe((started_ns - request.queued_ns) / 1e9)
        llm.inference_s.observe((now - started_ns) / 1e9)
        llm.end_to_end_s.observe((now - request.received_ns) / 1e9)
        if first_ns:
            llm.prefill_s.observe((first_ns - started_ns) / 1e9)
            llm.decode_s.observe((progress.last_ns - first_ns) / 1e9)
        if request.trace is not None:
            self._trace(request, progress, how, now)
        progress.started_ns = 0

    def _trace(self, request: InferenceRequest, progress: Progress, how: str, now: int) -> None:
        tokens = {"input": progress.prompt, "output": progress.tokens, "cached": progress.cached}
        seconds = {
            "time_in_queue": (progress.started_ns - request.queued_ns) / 1e9,
            "e2e": (now - request.received_ns) / 1e9,
        }
        if progress.first_ns:
            seconds["time_to_first_token"] = (progress.first_ns - request.received_ns) / 1e9
            seconds["time_in_model_prefill"] = (progress.first_ns - progress.started_ns) / 1e9
            seconds["time_in_model_decode"] = (progress.last_ns - progress.first_ns) / 1e9
        request.trace.generated(how, tokens, seconds)

    # Ends other than an answer from the engine

    def _cancel(self, request: InferenceRequest) -> None:
        self._waits_no_more(request)
        if not self._queue.remove(request) and request in self._light:
            self._light.remove(request)
        progress = self._progress.get(request)
        if progress is not None and progress.started_ns:
            self._ended(request, progress, "abort")  # before its answer, with which its trace ends
        self._runner.end_early(request, cancelled_error())

    def _on_alarm(self) -> None:
        over, next_ns = self._queue.expire(self._clock())
        if next_ns:
            self._alarm.set(next_ns)
        for request in over:
            self._expire(request)

    def _waits_no_more(self, request: InferenceRequest) -> None:
        self._waiting_bytes -= self._waiting.pop(request, 0)

    def _expire(self, request: InferenceRequest) -> None:
        self._waits_no_more(request)
        self.llm.reject("timeout")
        self._runner.end_early(request, QueueRejected(TIMEOUT_EXPIRED))


def _beginning(request: InferenceRequest) -> bytes:
    """The text that an engine will have in its cache."""
    for name in (JOB, "text_input"):
        tensor = request.inputs.get(name)
        if tensor is not None and tensor.array.size:
            value = tensor.array.ravel()[0]
            return value if isinstance(value, bytes) else b""
    return b""
