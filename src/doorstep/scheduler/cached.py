"""A response cache before a model's scheduler: answers what it has answered before, and hands on the rest.

Itself a scheduler, in the queue's place: look-ups count as requests in flight. What counts, and when, is Triton's
(core, dynamic_batch_scheduler.cc, infer_stats.cc). Touched only from the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from doorstep.cache.base import Entry, ResponseCache, copied_entry
from doorstep.cache.key import KeyMaker
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, QueueRejected
from doorstep.request import InferenceRequest, InferenceResponse, ResponseSender, cancelled_error
from doorstep.scheduler.base import Resizable, Scheduler
from doorstep.scheduler.dynamic import STOPPING
from doorstep.scheduler.ensemble_graph import step_model
from doorstep.services import Services
from doorstep.stats import ModelStatistics
from doorstep.workers.base import Worker


class CachedScheduler:
    """See the module. `inner` runs what the cache has not got."""

    def __init__(
        self,
        inner: Scheduler,
        cache: ResponseCache,
        keys: KeyMaker,
        config: ModelConfig,
        version: str,
        stats: ModelStatistics,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.cache = cache
        self.stats = stats
        self.clock = clock
        self.keys = keys
        self._inner = inner
        self._name = config.name
        self._version = version
        self._outputs = frozenset(config.outputs)
        self._loop = loop
        self._looking = 0  # requests whose look-up takes time
        self._stopping = False
        self._found: list[asyncio.Future[None]] = []  # somebody waits until there are none
        batching = config.proto.dynamic_batching
        self._order: deque[_Turn] | None = deque() if batching.preserve_ordering else None

    @property
    def inner(self) -> Scheduler:
        return self._inner

    @property
    def inflight_count(self) -> int:
        return self._inner.inflight_count + self._looking

    @property
    def queued_count(self) -> int:
        return self._inner.queued_count + self._looking

    @property
    def busy_workers(self) -> int:
        return self._inner.busy_workers

    @property
    def queue_limit(self) -> int:
        return self._inner.queue_limit

    def enqueue(self, request: InferenceRequest) -> None:
        if self._stopping:
            raise QueueRejected(STOPPING)
        content = self.keys.content()
        if content is None:  # a model of the ensemble is not there: its scheduler says so
            self._inner.enqueue(request)
            return
        request.queued_ns = self.clock()
        if self._order is not None:
            request.sender = _Turn(request.sender, self._order)
        if self.keys.is_long(request):
            self._look(request)
            work = self._loop.run_in_executor(None, self.keys.key, request, content)
            work.add_done_callback(partial(self._hashed, request, content))
            return
        key = self.keys.key(request, content)
        if not self.cache.at_once:
            self._look(request)
            self._find(request, key, content)
            return
        start = self.clock()
        entry = self.cache.get(key)
        end = self.clock()
        if entry is not None:
            self._hit(request, entry, start, end)
        else:
            self._missed(request, key, content, start, end)

    # Look-ups that take time

    def _look(self, request: InferenceRequest) -> None:
        self._looking += 1
        request.on_cancel = self._cancel

    def _hashed(self, request: InferenceRequest, content: bytes, done: asyncio.Future[bytes]) -> None:
        if request.cancelled:
            self._looked()
        elif done.exception() is not None:
            self._go_on(request)
        else:
            self._find(request, done.result(), content)

    def _find(self, request: InferenceRequest, key: bytes, content: bytes) -> None:
        self.cache.find(key, partial(self._answered, request, key, content, self.clock()))

    def _answered(self, request: InferenceRequest, key: bytes, content: bytes, start: int, entry: Entry | None) -> None:
        end = self.clock()
        if request.cancelled:
            self._looked()
        elif entry is not None and self._is_ours(entry):
            self._looked()
            self._hit(request, entry, start, end)
        else:
            self._count(start, end, hit=False)
            request.sender = _Keeping(self, request.sender, key, content, end - start)
            self._go_on(request)

    def _is_ours(self, entry: Entry) -> bool:
        """Whoever else writes to a shared cache: what the model has no output for is not its answer."""
        return all(tensor.name in self._outputs for tensor in entry.outputs)

    def _go_on(self, request: InferenceRequest) -> None:
        """The request is the scheduler's already: what the next one refuses is answered."""
        request.on_cancel = None
        try:
            self._inner.enqueue(request)
        except DoorstepError as error:
            self.stats.record_failure(self.clock() - request.received_ns, error.reason)
            request.sender.send(InferenceResponse(self._name, self._version, request.id, error=error), True)
        self._looked()

    def _looked(self) -> None:
        self._looking -= 1
        if not self._looking:
            if self._stopping:
                self._inner.stop()
            waiters, self._found = self._found, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    def _cancel(self, request: InferenceRequest) -> None:
        request.on_cancel = None
        error = cancelled_error()
        self.stats.record_failure(self.clock() - request.received_ns, error.reason)
        request.sender.send(InferenceResponse(self._name, self._version, request.id, error=error), True)

    # What comes of them

    def _hit(self, request: InferenceRequest, entry: Entry, start: int, end: int) -> None:
        self._count(start, end, hit=True)
        request.on_cancel = None
        now = self.clock()
        self.stats.record_cache_hit(now - request.received_ns, start - request.queued_ns, end - start)
        parameters = dict(entry.parameters) if entry.parameters else None
        response = InferenceResponse(self._name, self._version, request.id, entry.outputs, parameters=parameters)
        request.sender.send(response, True)

    def _missed(self, request: InferenceRequest, key: bytes, content: bytes, start: int, end: int) -> None:
        self._count(start, end, hit=False)
        before = request.sender
        request.sender = _Keeping(self, before, key, content, end - start)
        try:
            self._inner.enqueue(request)
        except BaseException:
            request.sender = before.give_up() if isinstance(before, _Turn) else before
            raise

    def _count(self, start: int, end: int, *, hit: bool) -> None:
        numbers = self.cache.numbers
        numbers.lookups += 1
        numbers.lookup_ns += end - start
        if hit:
            numbers.hits += 1
        else:
            numbers.misses += 1

    # Ends, and what is only handed on

    def stop(self) -> None:
        self._stopping = True
        if not self._looking:
            self._inner.stop()

    async def drained(self) -> None:
        while self._looking:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._found.append(waiter)
            await waiter
        await self._inner.drained()

    def replace_worker(self, old: Worker, new: Worker) -> None:
        self._inner.replace_worker(old, new)

    def close(self) -> None:
        self._inner.close()


class ResizableCachedScheduler(CachedScheduler):
    """One whose workers may come and go."""

    def add_worker(self, worker: Worker) -> None:
        assert isinstance(self._inner, Resizable)
        self._inner.add_worker(worker)

    async def remove_worker(self, worker: Worker) -> None:
        assert isinstance(self._inner, Resizable)
        await self._inner.remove_worker(worker)


class _Keeping:
    """Keeps the response of a request that missed, and passes it on."""

    __slots__ = ("_content", "_key", "_lookup_ns", "_next", "_scheduler")

    def __init__(
        self, scheduler: CachedScheduler, following: ResponseSender, key: bytes, content: bytes, lookup_ns: int
    ) -> None:
        self._scheduler = scheduler
        self._next = following
        self._key = key
        self._content = content
        self._lookup_ns = lookup_ns

    def send(self, response: InferenceResponse, final: bool) -> None:
        if final and response.error is None and not response.flag_only:
            self._keep(response)
        self._next.send(response, final)

    def _keep(self, response: InferenceResponse) -> None:
        scheduler = self._scheduler
        if scheduler.keys.content() != self._content:  # a model of the ensemble was loaded again meanwhile
            return
        start = scheduler.clock()
        new = scheduler.cache.put(self._key, copied_entry(response.outputs, response.parameters))
        insert_ns = scheduler.clock() - start
        scheduler.cache.numbers.insert_ns += insert_ns
        if new:
            scheduler.stats.record_cache_miss(self._lookup_ns + insert_ns)


class _Turn:
    """A place in the order of answers (preserve_ordering): what is found at once waits for what runs."""

    __slots__ = ("_next", "_order", "_ready")

    def __init__(self, following: ResponseSender, order: deque[_Turn]) -> None:
        self._next = following
        self._order = order
        self._ready: InferenceResponse | None = None
        order.append(self)

    def send(self, response: InferenceResponse, final: bool) -> None:
        if not final:
            self._next.send(response, final)
            return
        self._ready = response
        self._flush()

    def give_up(self) -> ResponseSender:
        """The request was not taken."""
        self._order.remove(self)
        self._flush()
        return self._next

    def _flush(self) -> None:
        order = self._order
        while order and (ready := order[0]._ready) is not None:
            order.popleft()._next.send(ready, True)


def with_cache(
    scheduler: Scheduler,
    config: ModelConfig,
    version: str,
    content: Callable[[], bytes],
    stats: ModelStatistics,
    services: Services,
    loop: asyncio.AbstractEventLoop,
) -> Scheduler:
    """`scheduler`, behind the server's cache if the model asks for it. `content` says what the version is made of."""
    if services.cache is None or not config.proto.response_cache.enable:
        return scheduler
    keys = KeyMaker(config, version, partial(_content, config, content, services))
    kind = ResizableCachedScheduler if isinstance(scheduler, Resizable) else CachedScheduler
    return kind(scheduler, services.cache, keys, config, version, stats, loop)


def _content(config: ModelConfig, content: Callable[[], bytes], services: Services) -> bytes | None:
    """What a version is made of; an ensemble, also of what its steps' models are, as they serve now."""
    if not config.proto.HasField("ensemble_scheduling"):
        return content()
    parts = [content()]
    for step in config.proto.ensemble_scheduling.step:
        version = str(step.model_version) if step.model_version > 0 else ""
        try:
            model = services.model(step_model(step), version)
        except DoorstepError:
            return None
        part = _content(model.config, lambda model=model: model.content, services)  # type: ignore[misc]
        if part is None:
            return None
        parts.append(part)
    return b"".join(parts)
