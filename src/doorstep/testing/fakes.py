"""A server with models that are Python functions, and an exchange that keeps its answer. Knows no disk and no socket.

Everything between the protocol and the function is the real thing: the server, the serving map, validation, the
scheduler, the inline worker. Only the repository is a stand-in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from doorstep import proto
from doorstep.backends.base import TensorInstance
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, InvalidArgument
from doorstep.model import Model
from doorstep.repository.base import IndexEntry, LoadRequest, ModelState
from doorstep.repository.serving_map import ServingMap
from doorstep.server import InferenceServer
from doorstep.stats import ModelStatistics
from doorstep.types import DTYPES, Array
from doorstep.wire.exchange import Buffer, ConnectionInfo, Exchange, Headers
from doorstep.workers.base import Worker
from doorstep.workers.inline import InlineWorker

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Shapes = Mapping[str, tuple[str, Sequence[int]]]  # name → (V2 datatype, dims)


def model_config(
    name: str,
    inputs: Shapes,
    outputs: Shapes,
    *,
    max_batch_size: int = 0,
    optional: Sequence[str] = (),
    labels: Mapping[str, tuple[str, ...]] | None = None,
) -> ModelConfig:
    """A config as config.pbtxt would give it. (Change `proto` before ModelConfig.from_proto for anything else.)"""
    message = proto.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    for tensors, specs in ((message.input, inputs), (message.output, outputs)):
        for tensor, (datatype, dims) in specs.items():
            tensors.add(name=tensor, data_type=DTYPES[datatype].config_number, dims=dims)
    for tensor in message.input:
        tensor.optional = tensor.name in optional
    message.instance_group.add(name=name, count=1, kind="KIND_CPU")
    return ModelConfig.from_proto(message, labels)


class FunctionInstance(TensorInstance):
    """A model that is a function from named arrays to named arrays."""

    def __init__(self, config: ModelConfig, function: Run) -> None:
        super().__init__(config)
        self._function = function

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        return self._function(inputs)


def function_model(config: ModelConfig, function: Run, version: str = "1") -> Model:
    """A loaded model that runs `function` on the running loop."""
    worker = InlineWorker(f"{config.name}_0", FunctionInstance(config, function))
    return worked_model(config, worker, version)


def worked_model(config: ModelConfig, worker: Worker, version: str = "1") -> Model:
    """A loaded model whose batches go to a worker of the test's own."""
    return Model(
        config=config,
        version=version,
        stats=ModelStatistics(),
        workers=[worker],
        loop=asyncio.get_running_loop(),
        execution="inline",
    )


class FakeRepository:
    """Remembers what it was asked; `fail_with` makes the next load fail."""

    def __init__(self, serving: ServingMap[Model]) -> None:
        self._serving = serving
        self.find = serving.find
        self.versions = serving.versions
        self.servables = serving.all
        self.all_ready = True
        self.loaded: list[tuple[str, LoadRequest]] = []
        self.unloaded: list[tuple[str, bool]] = []
        self.entries: list[IndexEntry] | None = None  # None: the models that are ready
        self.fail_with: DoorstepError | None = None

    def index(self, ready_only: bool) -> list[IndexEntry]:
        if self.entries is None:
            return [IndexEntry(m.name, m.version, "READY") for m in self._serving.all()]
        return [e for e in self.entries if not ready_only or e.state == ModelState.READY.value]

    async def refresh(self) -> None:
        await asyncio.sleep(0)

    async def load(self, name: str, request: LoadRequest, asker: str = "") -> None:
        await asyncio.sleep(0)
        if self.fail_with is not None:
            raise self.fail_with
        self.loaded.append((name, request))

    async def unload(self, name: str, unload_dependents: bool, asker: str = "") -> None:
        await asyncio.sleep(0)
        if not self._serving.versions(name):
            raise InvalidArgument(f"failed to unload '{name}'")
        self.unloaded.append((name, unload_dependents))

    async def start(self) -> None: ...


async def fake_server(*models: Model) -> tuple[InferenceServer, FakeRepository]:
    """A started server that serves `models`, and its repository."""
    by_name: dict[str, dict[int, Model]] = {}
    for model in models:
        by_name.setdefault(model.name, {})[int(model.version)] = model
    serving: ServingMap[Model] = ServingMap(by_name.get)
    for name, versions in by_name.items():
        serving.publish(name, versions)
    repository = FakeRepository(serving)
    server = InferenceServer(cast(Any, repository))
    await server.start()
    return server, repository


class FakeExchange(Exchange):
    """One request, whose answer is kept: `status`, `answer_headers` and `answer`."""

    __slots__ = ("answer", "answer_headers", "gone", "status")

    def __init__(
        self,
        method: str,
        path: str,
        body: Buffer = b"",
        headers: Mapping[bytes, bytes] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        self.method, self.path, self.query, self.route = method, path, "", ""
        self.body, self.headers, self.params = body, headers or {}, params or {}
        self.received_ns = 1
        self.state = None
        self.started = self.ended = self.gone = False
        self.connection = ConnectionInfo("http", "127.0.0.1:1")
        self.on_disconnect = self.on_drain = self.on_body = None
        self.status = 0
        self.answer_headers: dict[bytes, bytes] = {}
        self.answer = b""

    @property
    def disconnected(self) -> bool:
        return self.gone

    def disconnect(self) -> None:
        """The client goes."""
        self.gone = True
        if self.on_disconnect is not None:
            self.on_disconnect()

    def respond(self, status: int, headers: Headers, *body: Buffer) -> None:
        assert not self.started, "answered twice"
        self.started = self.ended = True
        self.status = status
        self.answer_headers = dict(headers)
        self.answer = b"".join(body)

    def start(self, status: int, headers: Headers) -> None:
        assert not self.started, "answered twice"
        self.started = True
        self.status = status
        self.answer_headers = dict(headers)

    def write(self, data: Buffer) -> bool:
        assert self.started
        assert not self.ended
        self.answer += data
        return True

    def end(self, trailers: Headers = ()) -> None:
        self.ended = True

    def reset(self) -> None:
        self.started = self.ended = True

    def consume(self, size: int) -> None: ...
