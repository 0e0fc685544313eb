"""The models that the golden tests of the V2 protocol call, and a server of them on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, ErrorCode
from doorstep.model import Model
from doorstep.protocols import kserve
from doorstep.request import Batch, InferenceRequest
from doorstep.server import InferenceServer
from doorstep.testing.fakes import FakeRepository, fake_server, function_model, model_config, worked_model
from doorstep.testing.wire import WireServer
from doorstep.types import Array
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES",
    "BF16",
)  # fmt: skip


class HoldingWorker:
    """Keeps every batch until `finish`: for tests that need a request in flight. Touched only from the event loop."""

    name = "held_0"

    def __init__(self) -> None:
        self.batch: tuple[Batch, Callable[[Batch], None]] | None = None
        self.arrived = asyncio.Event()

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        self.batch = (batch, done)
        self.arrived.set()

    def finish(self) -> None:
        assert self.batch is not None
        batch, done = self.batch
        self.batch = None
        self.arrived.clear()
        batch.results = [list(request.inputs.values()) for request in batch.requests]
        done(batch)

    def watch_cancel(self) -> asyncio.Event:
        """Set when the one request it holds is cancelled."""
        assert self.batch is not None
        (request,) = self.batch[0].requests
        found = asyncio.Event()
        before = request.on_cancel

        def on_cancel(cancelled: InferenceRequest) -> None:
            if before is not None:
                before(cancelled)
            found.set()

        request.on_cancel = on_cancel
        return found

    def close(self) -> None: ...


class Served:
    """What a test may look at on the server's side."""

    def __init__(self, wire: WireServer, server: InferenceServer, repository: FakeRepository, held: HoldingWorker):
        self.wire = wire
        self.server = server
        self.repository = repository
        self.held = held
        self.address = f"127.0.0.1:{wire.port}"
        self.url = f"http://{self.address}"

    def wait_until_held(self) -> None:
        self.wire.run(self.held.arrived.wait())

    def model(self, name: str) -> Model:
        return self.wire.call(lambda: self.server.model(name))


def _identity(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    return {f"OUT_{name.removeprefix('IN_')}": array for name, array in inputs.items()}


def _raising(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    raise DoorstepError("no luck today", code=ErrorCode[inputs["CODE"][0].decode()])


async def _build(router: Router) -> tuple[InferenceServer, FakeRepository, HoldingWorker]:
    models = [
        function_model(
            model_config("mlp", {"input": ("FP32", [16])}, {"output": ("FP32", [3])}, max_batch_size=8),
            lambda inputs: {"output": inputs["input"][:, :3] * 2},
        ),
        function_model(
            model_config(
                "sums",
                {"A": ("INT32", [4]), "B": ("INT32", [4])},
                {"SUM": ("INT32", [4]), "DIFFERENCE": ("INT32", [4])},
                max_batch_size=8,
            ),
            lambda i: {"SUM": i["A"] + i["B"], "DIFFERENCE": i["A"] - i["B"]},
        ),
        *(
            function_model(
                model_config(f"same_{d}", {f"IN_{d}": (d, [-1, -1])}, {f"OUT_{d}": (d, [-1, -1])}), _identity
            )
            for d in DATATYPES
        ),
        function_model(
            model_config(
                "classes",
                {"IN_P": ("FP32", [4])},
                {"OUT_P": ("FP32", [4])},
                max_batch_size=4,
                labels={"OUT_P": ("ant", "bee", "cat")},
            ),
            _identity,
        ),
        function_model(model_config("raises", {"CODE": ("BYTES", [1])}, {"OUT": ("FP32", [1])}), _raising),
        *(
            function_model(
                model_config("versions", {"IN": ("FP32", [1])}, {"VERSION": ("INT32", [1])}),
                lambda _, version=version: {"VERSION": np.array([version], np.int32)},  # type: ignore[misc]
                str(version),
            )
            for version in (1, 3)
        ),
    ]
    decoupled = model_config("decoupled", {"IN": ("FP32", [1])}, {"OUT": ("FP32", [1])}).proto
    decoupled.model_transaction_policy.decoupled = True
    models.append(function_model(ModelConfig.from_proto(decoupled), lambda inputs: {"OUT": inputs["IN"]}))
    held = HoldingWorker()
    config = model_config("held", {"X": ("FP32", [1])}, {"X": ("FP32", [1])})
    models.append(worked_model(config, held))
    server, repository = await fake_server(*models)
    grpc = GrpcServer(WireLimits())
    kserve.register(router, grpc, server, WireLimits())
    grpc.install(router)
    return server, repository, held


@contextmanager
def serving() -> Iterator[Served]:
    router = Router()
    with WireServer(router) as wire:
        yield Served(wire, *wire.run(_build(router)))
