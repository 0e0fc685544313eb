"""Runs an instance in a process of its own, and another one when that dies. Knows no queue, no library, no protocol.

Loading happens in a loader's thread (`start_process_worker`, blocking); from then on everything is the event loop's: a
batch leaves as one frame and comes back as one frame, without a thread, a Task or a Future in between.

What waits for what: a batch that is in the process when it dies gets an error at once. A batch submitted while the next
process is loading waits for it, at most `HELD_SECONDS`; one submitted between two attempts is refused at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from doorstep import proto
from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.errors import BackendError, DoorstepError, ErrorCode, FailureReason, InvalidArgument, Unavailable
from doorstep.request import Batch, InferenceRequest
from doorstep.workers.base import Done
from doorstep.workers.frames import INLINE_BYTES, Kind, Layout, ProtocolError, frame, read_tensors
from doorstep.workers.output import LineReader
from doorstep.workers.shared_memory import UNUSED_SECONDS, Reader, Segment, Writer, make_memory, segment_size
from doorstep.workers.spawn import FLAG_BYTES, Log, Process, ProcessEnded, log_line

HELD_SECONDS = 10.0  # how long a batch waits for a process that is loading again
HEALTHY_SECONDS = 10.0  # a process that lived as long is restarted without delay
FIRST_DELAY_SECONDS = 0.25  # then doubled for each process that died young
LONGEST_DELAY_SECONDS = 30.0
LARGEST_SEGMENT = 16 * 1024**3
COPY_BYTES = 2 * 1024 * 1024  # copying more than this would hold up the loop: a thread does it
_ZEROS = bytes(FLAG_BYTES)
_LEVELS = {"ERROR": logging.ERROR, "WARNING": logging.WARNING, "INFO": logging.INFO, "VERBOSE": logging.DEBUG}

logger = logging.getLogger("doorstep.model")


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
) -> ProcessWorker:
    """Loads an instance of `backend` in a process and gives the worker that runs it.

    Blocking: for a loader's thread. `spare` is a process from `complete_config_in_process`, taken over. `log(level,
    line)` gets what the process logs and prints, and may be called in any thread. `on_restart` is called on the loop.
    Raises ConfigError or BackendError, with what the process said last, if the instance cannot be loaded.
    """
    log = log or context.log or log_to_model
    process = load_process(context, backend, log, spare)
    worker = ProcessWorker(context, backend, process, loop, log, on_restart)
    loop.call_soon_threadsafe(worker.attach)
    return worker


def log_to_model(level: str, message: str) -> None:
    """The default `log`: the server's own logger for what models say."""
    logger.log(_LEVELS.get(level, logging.INFO), "%s", message)


def complete_config_in_process(
    config: Any,
    backend: str,
    model_directory: Path,
    version_directory: Path,
    context: CompletionContext,
    log: Log = log_to_model,
) -> tuple[Any, Process]:
    """`Backend.complete_config`, but in a process, where model code may run. Blocking.

    Gives the completed message and the process, which the first instance may use (`spare`); otherwise close it.
    """
    process = _begin(config.name, log, context.backend_config)
    try:
        meta = {
            "backend": backend,
            "model_directory": str(model_directory),
            "version_directory": str(version_directory),
            "backend_config": dict(context.backend_config),
            "default_max_batch_size": context.default_max_batch_size,
        }
        data = _ask(process, Kind.COMPLETE, meta, config.SerializeToString(), Kind.COMPLETED, context.backend_config)
        return proto.ModelConfig.FromString(bytes(data)), process
    except BaseException:
        process.close()
        raise


def load_process(context: InstanceContext, backend: str, log: Log, spare: Process | None = None) -> Process:
    """A process with the instance loaded. Blocking."""
    settings = context.backend_config
    process = spare or _begin(context.instance_name, log, settings, context.threads)
    process.name = context.instance_name
    config = context.config
    try:
        meta = {
            "backend": backend,
            "labels": {name: spec.labels for name, spec in config.outputs.items() if spec.labels},
            "version": context.version,
            "model_directory": str(context.model_directory),
            "version_directory": str(context.version_directory),
            "instance_name": context.instance_name,
            "kind": context.kind,
            "device_id": context.device_id,
            "threads": context.threads,
            "backend_config": dict(settings),
        }
        _ask(process, Kind.LOAD, meta, config.proto.SerializeToString(), Kind.READY, settings)
    except BaseException:
        process.close()
        raise
    return process


def _begin(name: str, log: Log, settings: Mapping[str, str], threads: int = 0) -> Process:
    """A process that has said hello."""
    try:
        process = Process(name, log, threads=threads)
    except OSError as error:
        raise BackendError(f"cannot start a process for '{name}': {error}") from error
    seconds = _seconds(settings, "stub-timeout-seconds", 30)
    try:
        kind, _, _ = process.answer(time.monotonic() + seconds)
        if kind != Kind.HELLO:
            raise ProtocolError(f"a frame of kind {kind} instead of a greeting")
    except TimeoutError:
        words = process.where_it_hangs()
        process.close()
        raise BackendError(
            f"Timed out occurred while waiting for the stub process. The process of '{name}' did not start within "
            f"{seconds:g} s (backend config stub-timeout-seconds){words}"
        ) from None
    except ProtocolError as error:
        process.close()
        raise BackendError(f"the process of '{name}' does not speak our language: {error}") from error
    except BaseException:
        process.close()
        raise
    return process


def _ask(process: Process, kind: Kind, meta: Any, data: bytes, wanted: Kind, settings: Mapping[str, str]) -> bytearray:
    seconds = _seconds(settings, "load-timeout-seconds", 1200)
    try:
        answered, _, answer = process.ask(kind, meta, data, timeout=seconds)
    except TimeoutError:
        raise BackendError(
            f"'{process.name}' did not load within {seconds:g} s (backend config load-timeout-seconds)"
            f"{process.where_it_hangs()}"
        ) from None
    except ProtocolError as error:
        raise BackendError(f"the process of '{process.name}' does not speak our language: {error}") from error
    if answered != wanted:
        raise BackendError(f"the process of '{process.name}' answered out of turn")
    return answer


def _seconds(settings: Mapping[str, str], key: str, default: float) -> float:
    text = settings.get(key)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise InvalidArgument(f"backend config {key}={text}: expected a number of seconds above 0")
    return seconds


class ProcessWorker:
    """Touched only from the event loop, but for `close`."""

    execution = "process"

    def __init__(
        self,
        context: InstanceContext,
        backend: str,
        process: Process,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        on_restart: Callable[[], None] | None = None,
    ) -> None:
        self.name = context.instance_name
        self.state = State.READY
        self.restart_count = 0
        self._context = context
        self._backend = backend
        self._loop = loop
        self._log = log
        self._on_restart = on_restart
        self._batch: Batch | None = None
        self._done: Done | None = None
        self._on_cancel = self._cancel  # one bound method for all requests
        self._on_cancels: list[Callable[[InferenceRequest], None] | None] = []  # theirs, while we have the batch
        self._held_timer: asyncio.TimerHandle | None = None
        self._restart_timer: asyncio.TimerHandle | None = None
        self._young_deaths = 0
        self._next_attempt = 0.0
        self._why = ""  # the last process is no more
        self._use(process)

    def __repr__(self) -> str:
        return f"<ProcessWorker {self.name} {self.state.name} pid {self.pid}, {self.restart_count} restarts>"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def healthy(self) -> bool:
        """Whether there is a process that answers."""
        return self.state in (State.READY, State.BUSY)

    def attach(self) -> None:
        """From now on the loop reads what the process sends and prints."""
        if self.state is State.CLOSED:
            return
        process = self._process
        loop = self._loop
        loop.add_reader(process.sock.fileno(), self._on_readable)
        loop.add_reader(process.pidfd, self._on_end)
        for stream in process.streams:
            if stream.fd >= 0:
                loop.add_reader(stream.fd, self._on_output, process, stream)

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

    def _hold(self) -> None:
        self._held_timer = self._loop.call_later(HELD_SECONDS, self._refuse_held)

    # A batch's way

    def _send(self, batch: Batch) -> None:
        self._become(State.BUSY)
        requests = batch.requests
        flags = self._process.flags
        on_cancel = self._on_cancel
        self._on_cancels = [request.on_cancel for request in requests]
        layout = Layout()
        raw_requests = []
        try:
            flags[: len(requests)] = _ZEROS[: len(requests)]
            for i, request in enumerate(requests):
                request.on_cancel = on_cancel
                if request.cancelled and i < FLAG_BYTES:
                    flags[i] = 1
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
                    )
                )
            released = self._outputs.released()
            if layout.size <= INLINE_BYTES:
                self._write(frame(Kind.EXECUTE, (-1, released, batch.rows, raw_requests), layout.joined()))
                return
            segment = self._input_segment(layout.size)
            message = frame(Kind.EXECUTE, (segment.id, released, batch.rows, raw_requests))
            if layout.size <= COPY_BYTES:
                layout.write(segment.map)
                self._write(message)
            else:
                copied = self._loop.run_in_executor(None, layout.write, segment.map)
                copied.add_done_callback(partial(self._copied, self._process, message))
        except Exception as error:  # a tensor that cannot be laid out, no memory: the process has seen nothing of it
            self._become(State.READY)
            self._finish(BackendError(f"the batch cannot be sent to '{self.name}': {error}"))

    def _copied(self, process: Process, message: bytes, copied: asyncio.Future[None]) -> None:
        if process is not self._process or self.state is not State.BUSY:
            return  # it died meanwhile; the batch has been answered
        error = None if copied.cancelled() else copied.exception()
        if copied.cancelled() or error is not None:
            self._become(State.READY)
            self._finish(BackendError(f"the batch cannot be sent to '{self.name}': {error or 'stopping'}"))
        else:
            self._write(message)

    def _on_result(self, meta: Any, data: bytearray) -> None:
        batch = self._batch
        if batch is None:
            raise ProtocolError("a result that nobody asked for")
        try:
            segment, released, (batch.input_end_ns, batch.output_start_ns), results = meta
            if len(results) != len(batch.requests):
                raise ProtocolError(f"{len(results)} results for {len(batch.requests)} requests")
            memory = data if segment < 0 else self._outputs.open(segment)
            batch.results = [
                read_tensors(result, memory) if type(result) is list else _error(result) for result in results
            ]
            if released:
                self._inputs.release(released)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a result that is none: {error!r}") from None
        if self.state is State.BUSY:
            self._become(State.READY)
        self._finish(None)

    def _finish(self, error: DoorstepError | None) -> None:
        """The batch is over; whoever gets it may submit the next one before this returns."""
        batch, done = self._batch, self._done
        assert batch is not None and done is not None
        self._batch = self._done = None
        if self._held_timer is not None:
            self._held_timer.cancel()
            self._held_timer = None
        for request, on_cancel in zip(batch.requests, self._on_cancels, strict=False):
            if request.on_cancel is self._on_cancel:
                request.on_cancel = on_cancel
        self._on_cancels = []
        if error is not None:
            batch.fail(error)
        batch.compute_end_ns = time.monotonic_ns()
        done(batch)

    def _cancel(self, request: InferenceRequest) -> None:
        """Tells model code that looks; whoever gave us the request hears of it as well."""
        batch = self._batch
        if batch is None or request not in batch.requests:
            return
        i = batch.requests.index(request)
        if i < FLAG_BYTES:
            self._process.flags[i] = 1
        if (on_cancel := self._on_cancels[i]) is not None:
            on_cancel(request)

    # Frames

    def _on_readable(self) -> None:
        try:
            if not self._receive(self._process):
                self._hung_up()
        except BlockingIOError:
            pass
        except ProtocolError as error:
            self._log("ERROR", f"{self.name}: its process sent {error}; it is killed")
            self._hung_up()

    def _receive(self, process: Process) -> bool:
        """Takes what has arrived. False at the end; raises BlockingIOError when there is nothing, and ProtocolError."""
        try:
            count = process.sock.recv_into(process.frames.space())
        except BlockingIOError:
            raise
        except OSError:
            return False
        for kind, meta, data in process.frames.received(count):
            if kind == Kind.RESULT:
                self._on_result(meta, data)
            elif kind == Kind.LOG:
                process.budget(*log_line(meta))
            elif kind == Kind.NEED:
                self._give_segment(meta)
            else:
                raise ProtocolError(f"a frame of kind {kind}")
        return count > 0

    def _write(self, message: bytes) -> None:
        if not self._unsent:
            try:
                sent = self._process.sock.send(message)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._undelivered = True  # it has ended; `_on_end` comes
                return
            if sent == len(message):
                return
            message = message[sent:]
            self._loop.add_writer(self._process.sock.fileno(), self._on_writable)
        self._unsent += message

    def _on_writable(self) -> None:
        try:
            sent = self._process.sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            sent = len(self._unsent)
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._process.sock.fileno())

    # Shared memory

    def _input_segment(self, size: int) -> Segment:
        segment = self._inputs.take(size)
        if segment is None:
            self._make_segment("inputs", size)
            segment = self._inputs.take(size)
            assert segment is not None
        return segment

    def _give_segment(self, size: Any) -> None:
        if not isinstance(size, int) or self.state is not State.BUSY:
            raise ProtocolError("a wish for memory out of turn")
        try:
            if not 0 < size <= LARGEST_SEGMENT:
                raise OSError(f"outputs of {size} bytes; {LARGEST_SEGMENT} is the most for a batch")
            self._make_segment("outputs", size)
        except OSError as error:
            self._write(frame(Kind.SEGMENT, {"error": f"no shared memory for the outputs: {error}"}))

    def _make_segment(self, use: str, size: int) -> None:
        """Makes a segment and sends it to the process. Raises OSError."""
        size = segment_size(size)
        self._segment_count += 1
        id = self._segment_count
        fd = make_memory(size, f"doorstep-{use}")
        try:
            message = frame(Kind.SEGMENT, {"id": id, "size": size, "for": use})
            if socket.send_fds(self._process.sock, [message], [fd]) != len(message):
                raise OSError("the process does not read")
            kept = Segment(id, os.dup(fd), size, writable=use == "inputs")
        finally:
            os.close(fd)
        if use == "inputs":
            self._inputs.add(kept)
        else:
            self._outputs.add(kept)
        if self._trim_timer is None:
            self._trim_timer = self._loop.call_later(UNUSED_SECONDS, self._trim)

    def _trim(self) -> None:
        """Gives back segments that nobody has used for a while. Only between batches: then no frame is on its way."""
        self._trim_timer = None
        if self.state is State.READY:
            before = time.monotonic() - UNUSED_SECONDS
            ids = self._inputs.unused(before) + self._outputs.unused(before)
            if ids:
                self._write(frame(Kind.FORGET, ids))
        if self.healthy and (len(self._inputs) or len(self._outputs)):
            self._trim_timer = self._loop.call_later(UNUSED_SECONDS / 2, self._trim)

    # What it prints

    def _on_output(self, process: Process, stream: LineReader) -> None:
        if not stream.read():
            self._loop.remove_reader(stream.fd)
            stream.close()
        elif stream.over_budget():
            self._loop.remove_reader(stream.fd)  # the pipe fills, and the process waits
            self._loop.call_later(0.25, self._read_on, process, stream)
        if process.budget.dropped and self._flush_timer is None:
            self._flush_timer = self._loop.call_later(1.0, self._flush, process)

    def _read_on(self, process: Process, stream: LineReader) -> None:
        if process is self._process and self.healthy and stream.fd >= 0:
            self._loop.add_reader(stream.fd, self._on_output, process, stream)

    def _flush(self, process: Process) -> None:
        self._flush_timer = None
        process.budget.flush()

    # Its end and the next one

    def _hung_up(self) -> None:
        """It closed the socket or cannot be trusted: it is killed, and `_on_end` comes."""
        self._loop.remove_reader(self._process.sock.fileno())
        self._process.signal(signal.SIGKILL)

    def _on_end(self) -> None:
        """The process has ended. What it sent before still counts."""
        process = self._process
        self._detach()
        how = process.end()
        lived = time.monotonic() - self._started
        self._young_deaths = 0 if lived >= HEALTHY_SECONDS else self._young_deaths + 1
        self._why = f"its process ended ({how})"
        held = self._undelivered  # the batch never reached it: it can wait for the next process
        self._schedule_restart()  # before anybody submits the next batch
        if not held:
            with suppress(BlockingIOError, ProtocolError):
                while self._batch is not None and self._receive(process):
                    pass
        process.close()
        self._log("ERROR", f"{self.name}: process {process.pid} ended: {how}; it is being restarted")
        if self._batch is None or self._held_timer is not None:
            return
        if held and self.state is State.LOADING:
            self._hold()
        elif held:
            self._finish(self._unavailable())
        else:
            self._finish(
                BackendError(
                    f"Failed to process the request(s) for model instance '{self.name}', message: Stub process "
                    f"'{self.name}' is not healthy. It ended ({how}) while it ran this request and is being restarted."
                )
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
        process: Process | None = None
        error: DoorstepError | None = None
        try:
            process = load_process(self._context, self._backend, self._log)
        except DoorstepError as raised:
            error = raised
        except Exception as raised:
            error = BackendError(f"{type(raised).__name__}: {raised}")
        try:
            self._loop.call_soon_threadsafe(self._loaded_again, process, error)
        except RuntimeError:  # the loop is closed
            if process is not None:
                process.close()

    def _loaded_again(self, process: Process | None, error: DoorstepError | None) -> None:
        if self.state is State.CLOSED:
            if process is not None:
                threading.Thread(target=process.close, daemon=True).start()
            return
        if process is None:
            self._young_deaths += 1
            self._why = f"its process ended and cannot be started again: {error}"
            self._log("ERROR", f"{self.name}: {self._why}")
            self._young_deaths = max(self._young_deaths, 2)
            self._schedule_restart()
            if self._batch is not None:
                self._finish(self._unavailable())
            return
        self._log("INFO", f"{self.name}: process {process.pid} is ready")
        self._use(process)
        self._become(State.READY)
        self.attach()
        if self._batch is not None:
            if self._held_timer is not None:
                self._held_timer.cancel()
                self._held_timer = None
            self._send(self._batch)

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

    # Bookkeeping

    def _use(self, process: Process) -> None:
        self._process = process
        self._started = time.monotonic()
        self._inputs = Writer()
        self._outputs = Reader()
        self._segment_count = 0
        self._unsent = bytearray()
        self._undelivered = False
        self._trim_timer: asyncio.TimerHandle | None = None
        self._flush_timer: asyncio.TimerHandle | None = None

    def _become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"{self} cannot become {state.name}"
        self.state = state

    def _detach(self) -> None:
        loop, process = self._loop, self._process
        loop.remove_reader(process.sock.fileno())
        loop.remove_writer(process.sock.fileno())
        loop.remove_reader(process.pidfd)
        for stream in process.streams:
            if stream.fd >= 0:
                loop.remove_reader(stream.fd)
        for timer in (self._trim_timer, self._flush_timer, self._restart_timer):
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Off the loop; blocks until the process has unloaded and ended, or has been killed."""
        had_process = self._on_loop(self._leave_loop)
        if not had_process:
            return
        process = self._process
        settings = self._context.backend_config
        process.budget.flush()
        try:
            process.ask(Kind.UNLOAD, {}, timeout=_seconds(settings, "unload-timeout-seconds", 10))
            gone = process.wait(5.0)
        except (DoorstepError, ProtocolError, TimeoutError, InvalidArgument) as error:
            gone = isinstance(error, ProcessEnded)
            if not gone:
                self._log("WARNING", f"{self.name}: its process does not unload; it is ended: {error}")
        if not gone:
            process.signal(signal.SIGTERM)
            process.wait(2.0)
        process.close()

    def _leave_loop(self) -> bool:
        """Whether there is a process to end."""
        had_process = self.healthy
        if self.state is State.CLOSED:
            return False
        if had_process:
            self._detach()
        elif self._restart_timer is not None:
            self._restart_timer.cancel()
        self._become(State.CLOSED)
        if self._batch is not None:
            self._finish(self._unavailable())
        return had_process

    def _on_loop(self, call: Callable[[], bool]) -> bool:
        """Runs `call` on the loop and waits, unless there is no loop to run it, or this is it."""
        loop = self._loop
        with suppress(RuntimeError):
            if asyncio.get_running_loop() is loop:
                return call()
        if loop.is_closed() or not loop.is_running():
            return call() if not loop.is_closed() else self._leave_closed_loop()
        result: list[bool] = []
        finished = threading.Event()

        def run() -> None:
            try:
                result.append(call())
            finally:
                finished.set()

        loop.call_soon_threadsafe(run)
        while not finished.wait(1.0):
            if not loop.is_running():
                return call() if not result else result[0]
        return result[0]

    def _leave_closed_loop(self) -> bool:
        had_process = self.healthy
        self.state = State.CLOSED
        return had_process


def _error(meta: Mapping[str, str]) -> DoorstepError:
    """A result that is an error."""
    return DoorstepError(str(meta["message"]), code=ErrorCode(meta["code"]), reason=FailureReason(meta["reason"]))
