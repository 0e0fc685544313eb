"""A Python model in a worker process, run batch by batch from a test. Knows no scheduler, server or protocol.

The event loop runs in a thread of its own, so that a test is plain code: `with PythonModel(folder, source) as model`.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import uvloop
from google.protobuf import text_format

from doorstep import proto
from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.backends.table import find_backend
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError
from doorstep.request import Batch, InferenceRequest, InferenceResponse
from doorstep.services import NO_SERVICES, Services
from doorstep.types import Array, Tensor, datatype_of
from doorstep.workers.process import ProcessWorker, complete_config, start_process_worker

SECONDS = 60.0  # nothing here takes as long; a test that waits longer has failed


class _NoSender:
    def send(self, response: InferenceResponse, final: bool) -> None: ...


def request(inputs: Mapping[str, Array], **rest: Any) -> InferenceRequest:
    """A request with the datatypes numpy says."""
    tensors = {name: Tensor(name, datatype_of(array), array) for name, array in inputs.items()}
    return InferenceRequest("model", tensors, _NoSender(), **rest)


class PythonModel:
    """`<folder>/1/model.py` with `source`, loaded as the server would load it."""

    def __init__(
        self,
        folder: Path,
        source: str,
        *,
        services: Services = NO_SERVICES,
        config: str = "",
        backend: str = "python",
        settings: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        threads: int | None = None,
    ) -> None:
        """`config` is text of config.pbtxt; `settings` the backend's config; `files` more files of the model's folder.

        Raises what loading raises."""
        self.folder = folder
        self.lines: list[tuple[str, str]] = []  # level, line
        self.restarts = 0
        self._changed = threading.Condition()
        for path, text in {"1/model.py": source, **(files or {})}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        message = proto.ModelConfig(name=folder.name, backend=backend)
        text_format.Parse(config, message)
        settings = settings or {}
        spare = complete_config(
            find_backend(backend, settings), message, folder, folder / "1", CompletionContext(settings), log=self._log
        )
        self.config = ModelConfig.from_proto(message)
        context = InstanceContext(
            self.config,
            "1",
            folder,
            folder / "1",
            f"{folder.name}_0",
            threads=len(os.sched_getaffinity(0)) if threads is None else threads,
            backend_config=settings,
        )
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.worker: ProcessWorker = start_process_worker(
                context,
                backend,
                loop=self.loop,
                log=self._log,
                on_restart=self._on_restart,
                spare=spare,
                services=services,
            )
        except BaseException:
            self._stop_loop()
            raise

    def submit(self, *requests: InferenceRequest) -> Future[Batch]:
        """One batch; the rows are those of the first input."""
        for one in requests:
            arrays = [tensor.array for tensor in one.inputs.values()]
            one.rows = arrays[0].shape[0] if self.config.max_batch_size and arrays else 1
        batch = Batch(list(requests), sum(one.rows for one in requests))
        future: Future[Batch] = Future()
        self.loop.call_soon_threadsafe(self.worker.submit, batch, future.set_result)
        return future

    def run(self, *requests: InferenceRequest) -> list[Any]:
        """The results of one batch."""
        return self.submit(*requests).result(SECONDS).results

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """One request alone. Raises its error."""
        (result,) = self.run(request(inputs))
        if isinstance(result, DoorstepError):
            raise result
        return {tensor.name: tensor.array for tensor in result}

    def on_loop(self, function: Callable[..., Any], *args: Any) -> None:
        """Calls `function` on the loop, and returns when it has been called."""
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        self.loop.call_soon_threadsafe(call)
        future.result(SECONDS)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until `condition()`, looked at whenever something is logged or a restart begins."""
        with self._changed:
            assert self._changed.wait_for(condition, SECONDS), self.lines

    def wait_for_line(self, text: str, count: int = 1) -> None:
        self.wait_for(lambda: sum(text in line for _, line in self.lines) >= count)

    def close(self) -> None:
        self.worker.close()
        self._stop_loop()

    def _stop_loop(self) -> None:
        async def default_executor() -> None:
            await self.loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(default_executor(), self.loop).result(SECONDS)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SECONDS)
        self.loop.close()

    def _log(self, level: str, line: str) -> None:
        with self._changed:
            self.lines.append((level, line))
            self._changed.notify_all()

    def _on_restart(self) -> None:
        with self._changed:
            self.restarts += 1
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
