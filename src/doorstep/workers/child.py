"""A worker process: loads one model instance, runs the batches that come over the socket. Knows no queue, no client.

Started by spawn.py as `python -m doorstep.workers.child`. Whatever model code does, it does here: this process may
crash, hang or close its files, and the server restarts it.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import logging
import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from doorstep import proto
from doorstep.backends.base import CompletionContext, InstanceContext, ModelInstance
from doorstep.backends.table import find_backend
from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError, ConfigError, DoorstepError
from doorstep.request import LATER, Batch, InferenceRequest, Verdict
from doorstep.trace import TraceContext
from doorstep.types import Array
from doorstep.workers.channel import Channel
from doorstep.workers.child_calls import ChildServer
from doorstep.workers.child_process import LogHandler, end_with_the_server, name_process, print_traceback
from doorstep.workers.child_request import SEQUENCE_END, SEQUENCE_START, WorkerRequest
from doorstep.workers.child_side import ChildSide
from doorstep.workers.execute import execute
from doorstep.workers.frames import INLINE_BYTES, Kind, Layout, ProtocolError, read_tensors
from doorstep.workers.outcome import described, error_meta, outputs_meta
from doorstep.workers.pace import AWAKE_US, Pace
from doorstep.workers.shared_memory import Reader, Segment, Writer

FLAG_BYTES = 16384  # one per request: not zero once the request is cancelled
_OUT_OF_MEMORY_SCORE = "300"  # when memory runs out, the system ends a worker before the server


class _NoSender:
    def send(self, response: Any, final: bool) -> None:
        """Responses leave as the batch's results."""


_NO_SENDER = _NoSender()


class Worker:
    def __init__(self, channel: Channel, flags: mmap.mmap, side_channel: Channel) -> None:
        self._channel = channel
        self._pid = os.getpid()
        self._flags = flags
        self._server: ChildServer | None = None
        self._side = ChildSide(side_channel, self._server_gone)
        self._check = 0  # the number of the readiness check that runs, or 0
        self._check_lock = threading.Lock()
        self._side.handlers[Kind.IS_READY] = self._on_is_ready
        self._inputs = Reader()
        self._outputs = Writer()
        self._pace = Pace()
        self._instance: ModelInstance | None = None
        self._context: InstanceContext | None = None

    def serve(self) -> None:
        """Until the server says UNLOAD, or is gone (EOFError)."""
        channel = self._channel
        while True:
            pace = self._pace
            kind, meta, data = channel.receive(pace.awake_ns)
            if kind == Kind.EXECUTE:
                pace.begin(len(meta[4]))
                self._execute(meta, data)
                pace.end()
                del data
            elif kind == Kind.SEGMENT:
                self._add_segment(meta)
            elif kind == Kind.FORGET:
                self._inputs.forget(meta)
                self._outputs.forget(meta)
            elif kind == Kind.COMPLETE:
                self._answer(Kind.COMPLETED, self._complete, meta, data)
            elif kind == Kind.LOAD:
                self._answer(Kind.READY, self._load, meta, data)
            elif kind == Kind.UNLOAD:
                self._unload()
                return
            else:
                raise ProtocolError(f"a frame of kind {kind}")

    def _server_gone(self) -> None:
        if self._server is not None:
            self._server.end()

    def log(self, level: str, message: str) -> None:
        if os.getpid() != self._pid:  # model code has forked: the socket is the parent's, the output is everybody's
            print(message, flush=True)
            return
        self._channel.send(Kind.LOG, (level, message))

    # Life

    def _answer(self, kind: Kind, work: Callable[[Any, bytes], bytes], meta: Any, given: bytearray) -> None:
        """`work` gives the data of a frame of `kind`; what it raises becomes a FAILED frame."""
        try:
            data = work(meta, bytes(given))
        except ConfigError as error:
            problems = [(p.where, p.what, p.fix) for p in error.problems]
            self._channel.send(Kind.FAILED, {"model": error.model, "problems": problems})
        except DoorstepError as error:
            self._channel.send(Kind.FAILED, {"code": error.code.value, "message": error.message})
        except BaseException as error:  # SystemExit too: model code said it, and it is not the last word
            print_traceback(error)
            self._channel.send(Kind.FAILED, {"code": "INTERNAL", "message": described(error)})
        else:
            self._channel.send(kind, {}, data)

    def _complete(self, meta: Mapping[str, Any], data: bytes) -> bytes:
        config = proto.ModelConfig.FromString(data)
        find_backend(meta["backend"], meta["backend_config"]).complete_config(
            config,
            Path(meta["model_directory"]),
            Path(meta["version_directory"]),
            CompletionContext(meta["backend_config"], meta["default_max_batch_size"]),
        )
        return bytes(config.SerializeToString())

    def _load(self, meta: Mapping[str, Any], data: bytes) -> bytes:
        labels = {name: tuple(values) for name, values in meta["labels"].items()}
        if meta["server"]:
            self._server = ChildServer(self._side)
        self._side.start()
        context = InstanceContext(
            config=ModelConfig.from_proto(proto.ModelConfig.FromString(data), labels).for_backend(),
            version=meta["version"],
            model_directory=Path(meta["model_directory"]),
            version_directory=Path(meta["version_directory"]),
            instance_name=meta["instance_name"],
            kind=meta["kind"],
            device_id=meta["device_id"],
            threads=meta["threads"],
            backend_config=meta["backend_config"],
            log=self.log,
            server=self._server,
        )
        self._pace = Pace(float(context.backend_config.get("awake-microseconds", AWAKE_US)))
        name_process(context.instance_name)
        self._instance = find_backend(meta["backend"], meta["backend_config"]).load_instance(context)
        self._context = context
        gc.collect()
        gc.freeze()  # what is loaded stays: later collections need not look at it
        return b"asks" if self._instance.may_be_unready() else b""

    def _unload(self) -> None:
        instance, self._instance = self._instance, None
        if instance is not None:
            try:
                instance.unload()
            except BaseException as error:
                print_traceback(error)
        self._side.flush()
        self._channel.send(Kind.GONE, {})

    def _on_is_ready(self, number: Any, _: bytearray) -> None:
        """Asks in a thread of its own: the answer may take long, and the model may be busy meanwhile."""
        with self._check_lock:
            running, self._check = self._check, number
        if not running:
            threading.Thread(target=self._say_ready, name="doorstep-is-ready", daemon=True).start()

    def _say_ready(self) -> None:
        instance = self._instance
        why = ""
        try:
            ready = instance is not None and instance.is_ready() is True
        except BaseException as error:
            print_traceback(error)
            ready, why = False, described(error)
        with self._check_lock:
            number, self._check = self._check, 0
        with contextlib.suppress(OSError):  # the server is gone
            self._side.send(Kind.READINESS, (number, ready, why))

    # Work

    def _execute(self, meta: Any, data: bytearray) -> None:
        segment, released, rows, number, raw_requests = meta
        if released:
            self._outputs.release(released)
        instance = self._instance
        context = self._context
        assert instance is not None
        assert context is not None
        memory: Array | bytearray = data if segment < 0 else self._inputs.open(segment)
        requests = [self._request(number + i, raw, memory, context) for i, raw in enumerate(raw_requests)]
        batch = Batch(list[InferenceRequest](requests), rows)
        batch.emit = self._side.emit
        try:
            execute(instance, batch, context.instance_name)
        except BaseException as error:  # SystemExit and the like: the model gives up this batch, not the process
            print_traceback(error)
            batch.fail(BackendError(described(error)))
        del memory
        for request, result in zip(requests, batch.results, strict=True):
            if result is LATER:
                self._side.left_open(request)
            else:
                request.inputs = {}  # so that the segment is free with the reply, unless the model keeps a view of it
        if self._side.has_pending:
            self._side.flush()  # before the reply: it says how much there is to be heard first
        self._reply(batch)

    def _request(self, number: int, raw: Any, memory: Any, context: InstanceContext) -> WorkerRequest:
        id, inputs, requested, parameters, correlation_id, flags, timeout_us, priority, rows, slot, trace = raw
        request = WorkerRequest.__new__(WorkerRequest)
        request.model_name = context.config.name
        request.model_version = context.version
        request.id = id
        request.inputs = {tensor.name: tensor for tensor in read_tensors(inputs, memory)}
        request.requested_outputs = tuple(requested)
        request.parameters = parameters
        request.sender = _NO_SENDER
        request.received_ns = 0
        request.rows = rows
        request.queued_ns = 0
        request.priority = priority
        request.timeout_us = timeout_us
        request.tenant = ""
        request.deadline_ns = 0
        request.correlation_id = correlation_id
        request.sequence_start = bool(flags & SEQUENCE_START)
        request.sequence_end = bool(flags & SEQUENCE_END)
        request.trace = TraceContext(trace) if trace else None
        request.on_cancel = None
        request._flags = self._flags
        request._slot = slot
        request.number = number
        request.ended = False
        request.unread_bytes = 0
        request.cancelled_by_message = False
        if slot < 0:
            self._side.watch(request)
        return request

    def _reply(self, batch: Batch) -> None:
        layout = Layout()
        results: list[Any] = []
        for result in batch.results:
            if result is None:
                results.append(error_meta(BackendError("the model gave this request neither outputs nor an error")))
            elif isinstance(result, DoorstepError):
                results.append(error_meta(result))
            elif isinstance(result, Verdict):
                results.append(result.value)
            else:
                try:
                    results.append(outputs_meta(result, layout))
                except Exception as error:  # an output no array of its datatype can hold
                    results.append(error_meta(BackendError(f"the outputs cannot be sent: {described(error)}")))
        segment_id = -1
        data: bytes | bytearray = b""
        if layout.size > INLINE_BYTES:
            try:
                segment = self._output_segment(layout.size)
            except DoorstepError as error:
                results = [error_meta(error) if _has_outputs(r) else r for r in results]
            else:
                layout.write(segment.map)
                segment_id = segment.id
        elif layout.size:
            data = layout.joined()
        del layout, result
        for request, outcome in zip(batch.requests, batch.results, strict=True):
            if outcome is not LATER:
                assert isinstance(request, WorkerRequest)
                known = request._slot < 0 or request.unread_bytes
                request.over()  # before the server gives its flag to another
                request.ended = True
                if known:
                    self._side.forget(request)
        batch.results = []
        times = (batch.input_end_ns or batch.compute_start_ns, batch.output_start_ns or time.monotonic_ns())
        self._channel.send(
            Kind.RESULT, (segment_id, self._inputs.released(), times, results, self._side.frame_count), data
        )

    def _output_segment(self, size: int) -> Segment:
        segment = self._outputs.take(size)
        if segment is None:
            self._channel.send(Kind.NEED, size)
            kind, meta, _ = self._channel.receive()
            if kind != Kind.SEGMENT:
                raise ProtocolError(f"a frame of kind {kind} instead of a segment")
            if "error" in meta:
                raise BackendError(meta["error"])
            self._add_segment(meta)
            segment = self._outputs.take(size)
            assert segment is not None
        return segment

    def _add_segment(self, meta: Mapping[str, Any]) -> None:
        segment = Segment(meta["id"], self._channel.descriptor(), meta["size"])
        if meta["for"] == "inputs":
            self._inputs.add(segment)
        else:
            self._outputs.add(segment)


def _has_outputs(result: Any) -> bool:
    return type(result) is list or (type(result) is dict and "outputs" in result)


def main(socket_fd: int, side_fd: int, flags_fd: int, lifeline_fd: int) -> None:
    end_with_the_server(lifeline_fd)
    faulthandler.enable()  # a crash in native code leaves a stack in the log
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    try:
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_SCORE)
    except OSError:
        pass
    sys.argv = [""]
    for fd in (socket_fd, side_fd, flags_fd, lifeline_fd):
        os.set_inheritable(fd, False)
    sock = socket.socket(fileno=socket_fd)
    flags = mmap.mmap(flags_fd, FLAG_BYTES)
    os.close(flags_fd)
    worker = Worker(Channel(sock), flags, Channel(socket.socket(fileno=side_fd)))
    logger = logging.getLogger("doorstep")
    logger.addHandler(LogHandler(worker.log))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        worker._channel.send(Kind.HELLO, {"pid": os.getpid()})
        worker.serve()
        atexit._run_exitfuncs()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the server is gone
    except KeyboardInterrupt:
        pass
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # model code closed them
    os._exit(0)  # threads that model code left running do not hold us


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]))
