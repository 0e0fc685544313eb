"""Runs an instance in a process of its own, and another one when that dies. Knows no queue, no library, no protocol.

Loading happens in a loader's thread (`start_process_worker`, blocking); from then on everything is the event loop's: a
batch leaves as one frame and comes back as one frame, without a thread, a Task or a Future in between.

What waits for what: a batch that is in the process when it dies gets an error at once. A batch submitted while the next
process is loading waits for it, at most `HELD_SECONDS`; one submitted between two attempts is refused at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from typing import Any

from doorstep.backends.base import InstanceContext
from doorstep.backends.table import find_backend
from doorstep.errors import BackendError, DoorstepError, FailureReason, Unavailable
from doorstep.request import LATER, Batch, InferenceRequest
from doorstep.services import NO_SERVICES, Services
from doorstep.workers.base import Done
from doorstep.workers.ending import LoopClosed, call_on_loop, end_process
from doorstep.workers.frames import Layout, ProtocolError, read_tensors
from doorstep.workers.link import Link
from doorstep.workers.loading import complete_config, log_to_model
from doorstep.workers.outcome import read_result
from doorstep.workers.side import Loaded, load
from doorstep.workers.spawn import Log, Process

__all__ = ["ProcessWorker", "complete_config", "start_process_worker"]

HELD_SECONDS = 10.0  # how long a batch waits for a process that is loading again
HEALTHY_SECONDS = 10.0  # a process that lived as long is restarted without delay
FIRST_DELAY_SECONDS = 0.25  # then doubled for each process that died young
LONGEST_DELAY_SECONDS = 30.0


class State(Enum):
    READY = "ready"
    BUSY = "busy"
    LOADING = "loading"  # a new process
    WAITING = "waiting"  # before the next attempt
    CLOSED = "closed"


TRANSITIONS = {
    State.READY: {State.BUSY, State.LOADING, State.WAITING, State.CLOSED},
    State.BUSY: {State.READY, State.LOADING, State.WAITING, State.CLOSED},
    State.LOADING: {State.READY, State.WAITING, State.CLOSED},
    State.WAITING: {State.LOADING, State.CLOSED},
    State.CLOSED: set(),
}


def start_process_worker(
    context: InstanceContext,
    backend: str,
    *,
    loop: asyncio.AbstractEventLoop,
    log: Log | None = None,
    on_restart: Callable[[], None] | None = None,
    spare: Process | None = None,
    services: Services = NO_SERVICES,
) -> ProcessWorker:
    """Loads an instance of `backend` in a process and gives the worker that runs it.

    Blocking: for a loader's thread. `spare` is a process from `complete_config_in_process`, taken over. `log(level,
    line)` gets what the process logs and prints, and may be called in any thread. `on_restart` is called on the loop.
    `services` are what the model may ask of the server.
    Raises ConfigError or BackendError, with what the process said last, if the instance cannot be loaded.
    """
    log = log or context.log or log_to_model
    python = find_backend(backend, context.backend_config).environment(
        context.config.proto, context.model_directory, context.version_directory, context.backend_config
    )
    context = replace(context, python=python)
    loaded = load(context, backend, log, loop, services, spare)
    worker = ProcessWorker(context, backend, loaded, loop=loop, log=log, on_restart=on_restart, services=services)
    loop.call_soon_threadsafe(worker.attach)
    return worker


class ProcessWorker:
    """Touched only from the event loop, but for `close`."""

    execution = "process"

    def __init__(
        self,
        context: InstanceContext,
        backend: str,
        loaded: Loaded,
        *,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        on_restart: Callable[[], None] | None = None,
        services: Services = NO_SERVICES,
    ) -> None:
        self.name = context.instance_name
        self.state = State.READY
        self.restart_count = 0
        self._context = context
        self._backend = backend
        self._loop = loop
        self._log = log
        self._on_restart = on_restart
        self._services = services
        self._batch: Batch | None = None
        self._done: Done | None = None
        self._on_cancel = self._cancel  # one bound method for all requests
        self._held_timer: asyncio.TimerHandle | None = None
        self._restart_timer: asyncio.TimerHandle | None = None
        self._young_deaths = 0
        self._next_attempt = 0.0  # time.monotonic()
        self._why = ""  # the last process is no more
        self._use(loaded)

    def __repr__(self) -> str:
        return f"<ProcessWorker {self.name} {self.state.name} pid {self.pid}, {self.restart_count} restarts>"

    @property
    def pid(self) -> int:
        return self._link.process.pid

    @property
    def healthy(self) -> bool:
        """Whether there is a process that answers."""
        return self.state in (State.READY, State.BUSY)

    def attach(self) -> None:
        if self.state is not State.CLOSED:
            self._link.attach()

    def submit(self, batch: Batch, done: Done) -> None:
        batch.compute_start_ns = time.monotonic_ns()
        self._batch = batch
        self._done = done
        if self.state is State.READY:
            self._send(batch)
        elif self.state is State.LOADING:
            self._hold()
        else:
            self._finish(self._unavailable())

    # A batch's way

    def _send(self, batch: Batch) -> None:
        self._become(State.BUSY)
        number, slots = self._streams.begin(batch, self._on_cancel)
        layout = Layout()
        raw_requests = []
        try:
            for request, slot in zip(batch.requests, slots, strict=True):
                raw_requests.append(
                    (
                        request.id,
                        layout.add(request.inputs.values()),
                        request.requested_outputs,
                        request.parameters,
                        request.correlation_id,
                        request.sequence_start | request.sequence_end << 1,
                        request.timeout_us,
                        request.priority,
                        request.rows,
                        slot,
                        None if request.trace is None else request.trace.context,
                    )
                )
            self._link.execute(layout, batch.rows, number, raw_requests)
        except Exception as error:  # a tensor that cannot be laid out, no memory: the process has seen nothing of it
            self._not_sent(str(error))

    def _not_sent(self, why: str) -> None:
        self._become(State.READY)
        self._finish(BackendError(f"the batch cannot be sent to '{self.name}': {why}"))

    def _on_result(self, meta: Any, data: bytearray) -> None:
        batch = self._batch
        if batch is None:
            raise ProtocolError("a result that nobody asked for")
        try:
            segment, released, (batch.input_end_ns, batch.output_start_ns), results, emit_count = meta
            while self._streams.frame_count < emit_count:  # sent before this, on the other socket
                self._side.link.receive_now()
            if len(results) != len(batch.requests):
                raise ProtocolError(f"{len(results)} results for {len(batch.requests)} requests")
            memory = self._link.memory(segment, released, data)
            batch.results = [
                read_tensors(result, memory) if type(result) is list else read_result(result, memory)
                for result in results
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a result that is none: {error!r}") from None
        if self.state is State.BUSY:
            self._become(State.READY)
        self._finish(None)

    def _finish(self, error: DoorstepError | None) -> None:
        """The batch is over; whoever gets it may submit the next one before this returns."""
        batch, done = self._batch, self._done
        assert batch is not None
        assert done is not None
        self._batch = self._done = None
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
        if error is not None:
            streams = self._streams
            for i, request in enumerate(batch.requests):
                if streams.has_ended(request):  # it got all it should before
                    batch.results[i] = LATER
            batch.fail(error)
        self._streams.end(LATER)
        batch.compute_end_ns = time.monotonic_ns()
        done(batch)

    def _cancel(self, request: InferenceRequest) -> None:
        """Tells the model, and whoever gave us the request."""
        side = self._side
        number = side.streams.cancel(request)
        if number:
            side.calls.cancel_of(number)

    def ask_to_stop(self, request: InferenceRequest) -> None:
        """As `_cancel`, for one whose responses are still wanted."""
        if not self._side.streams.ask_to_stop(request):
            request.cancel()

    def ready(self, done: Callable[[bool], None]) -> None:
        if not self.healthy:
            done(False)
        elif self._may_be_unready:
            self._side.ready(done)
        else:
            done(True)

    # A process's end, and the next one

    def _on_end(self) -> None:
        """The process has ended. What it sent before still counts."""
        link = self._link
        process = link.process
        link.detach()
        how = process.end()
        lived = time.monotonic() - self._started
        self._young_deaths = 0 if lived >= HEALTHY_SECONDS else self._young_deaths + 1
        self._why = f"its process ended ({how})"
        self._schedule_restart()  # before anybody submits the next batch
        died_with = self._batch
        if died_with is not None and not link.undelivered:
            with suppress(ProtocolError):
                link.drain()
        self._side.end()
        process.close()
        self._log("ERROR", f"{self.name}: process {process.pid} ended: {how}; it is being restarted")
        self._streams.fail(self._died(how))
        if died_with is None or self._batch is not died_with:
            return
        if not link.undelivered:
            self._finish(self._died(how))
        elif self.state is State.LOADING:
            self._streams.abandon()
            self._hold()
        else:
            self._finish(self._unavailable())

    def _died(self, how: str) -> DoorstepError:
        return BackendError(
            f"Failed to process the request(s) for model instance '{self.name}', message: Stub process "
            f"'{self.name}' is not healthy. It ended ({how}) while it ran this request and is being restarted."
        )

    def _schedule_restart(self) -> None:
        if self._young_deaths <= 1:
            self._restart()
            return
        delay = min(FIRST_DELAY_SECONDS * 2 ** (self._young_deaths - 2), LONGEST_DELAY_SECONDS)
        self._become(State.WAITING)
        self._next_attempt = time.monotonic() + delay
        self._restart_timer = self._loop.call_later(delay, self._restart)

    def _restart(self) -> None:
        self._restart_timer = None
        self._become(State.LOADING)
        self.restart_count += 1
        if self._on_restart is not None:
            self._on_restart()
        threading.Thread(target=self._load_again, name=f"doorstep-restart-{self.name}", daemon=True).start()

    def _load_again(self) -> None:
        """In a thread of its own: loading may take long."""
        loaded: Loaded | None = None
        error: DoorstepError | None = None
        try:
            loaded = load(self._context, self._backend, self._log, self._loop, self._services)
        except DoorstepError as raised:
            error = raised
        except Exception as raised:
            error = BackendError(f"{type(raised).__name__}: {raised}")
        try:
            self._loop.call_soon_threadsafe(self._loaded_again, loaded, error)
        except RuntimeError:  # the loop is closed
            if loaded is not None:
                loaded[1].quietly_close()
                loaded[0].close()

    def _loaded_again(self, loaded: Loaded | None, error: DoorstepError | None) -> None:
        if self.state is State.CLOSED:
            if loaded is not None:
                loaded[1].close()
                threading.Thread(target=loaded[0].close, daemon=True).start()
            return
        if loaded is None:
            self._young_deaths = max(self._young_deaths + 1, 2)
            self._why = f"its process cannot be started again: {error}"
            self._log("ERROR", f"{self.name}: {self._why}")
            self._schedule_restart()
            if self._batch is not None:
                self._finish(self._unavailable())
            return
        self._log("INFO", f"{self.name}: process {loaded[0].pid} is ready")
        self._use(loaded)
        self._become(State.READY)
        self._link.attach()
        if self._batch is not None:
            if self._held_timer is not None:
                self._held_timer.cancel()
                self._held_timer = None
            self._send(self._batch)

    def _hold(self) -> None:
        """The batch waits for the process that is loading."""
        self._held_timer = self._loop.call_later(HELD_SECONDS, self._refuse_held)

    def _refuse_held(self) -> None:
        self._held_timer = None
        self._finish(self._unavailable())

    def _unavailable(self) -> DoorstepError:
        if self.state is State.CLOSED:
            return Unavailable(f"model instance '{self.name}' is closed", reason=FailureReason.BACKEND)
        left = self._next_attempt - time.monotonic()
        when = f"next attempt in {left:.1f} s" if self.state is State.WAITING else "it is being restarted"
        return Unavailable(
            f"model instance '{self.name}' is not available: {self._why}; {when}", reason=FailureReason.BACKEND
        )

    def _use(self, loaded: Loaded) -> None:
        process, self._side, self._may_be_unready = loaded
        self._streams = self._side.streams
        self._started = time.monotonic()
        self._link = Link(process, self._loop, on_result=self._on_result, on_failed=self._not_sent, on_end=self._on_end)

    def _become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self} cannot become {state.name}"
        self.state = state

    # The last end

    def close(self) -> None:
        """Off the loop; blocks until the process has unloaded and ended, or has been killed."""
        try:
            had_process = call_on_loop(self._loop, self._leave_loop)
        except LoopClosed:
            had_process, self.state = self.healthy, State.CLOSED
        if not had_process:
            return
        end_process(self._link.process, self._context.backend_config, self._log)
        self._side.quietly_close()

    def _leave_loop(self) -> bool:
        """Whether there is a process to end."""
        if self.state is State.CLOSED:
            return False
        had_process = self.healthy
        self._link.detach()
        if self._restart_timer is not None:
            self._restart_timer.cancel()
        self._become(State.CLOSED)
        if self._batch is not None:
            self._finish(self._unavailable())
        self._streams.fail(self._unavailable())
        return had_process
