"""Models that answer one by one, for the golden tests of streams, and a server of them on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError
from doorstep.model import Model
from doorstep.protocols import kserve
from doorstep.protocols.kserve.forwarding import HeaderForwarding
from doorstep.request import LATER, Batch, InferenceRequest, Outputs
from doorstep.server import InferenceServer
from doorstep.testing.fakes import FakeRepository, fake_server, function_model, model_config, worked_model
from doorstep.testing.wire import WireServer
from doorstep.types import BYTES, INT32, Tensor, object_array
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.limits import WireLimits
from doorstep.wire.router import Router

Script = Callable[[InferenceRequest, Callable[..., None]], None]


class ScriptWorker:
    """A worker whose model is a function that emits responses. Touched only from the event loop."""

    name = "script_0"

    def __init__(self, script: Script) -> None:
        self._script = script

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        for i, request in enumerate(batch.requests):
            batch.results[i] = LATER

            def emit(outputs: Any, final: bool, request: InferenceRequest = request) -> None:
                batch.emit(request, outputs, final)

            self._script(request, emit)
        done(batch)

    def close(self) -> None: ...


def text(value: str) -> list[Tensor]:
    return [Tensor("TEXT", BYTES, object_array([value.encode()], [1]))]


def count(request: InferenceRequest) -> int:
    found = request.inputs.get("COUNT")
    return 1 if found is None else int(found.array.ravel()[0])


def repeat(request: InferenceRequest, emit: Callable[..., None]) -> None:
    """COUNT responses, then only the news that no more comes; where FAIL is true, an error instead."""
    prompt = request.inputs["PROMPT"].array.ravel()[0].decode()
    for _ in range(count(request)):
        emit(text(prompt), False)
    fail = request.inputs.get("FAIL")
    if fail is not None and bool(fail.array.ravel()[0]):
        emit(BackendError("An Error Occurred"), True)
    else:
        emit(None, True)


def numbers(request: InferenceRequest, emit: Callable[..., None]) -> None:
    """COUNT numbers of different lengths as text beside them, with parameters on the second; the last one is final."""
    n = count(request)
    for i in range(n):
        outputs = Outputs([Tensor("N", INT32, np.array([i], np.int32))])
        if i == 1:
            outputs.parameters = {"second": True, "score": 0.5, "name": "é", "big": 2**62}
        emit(outputs, i == n - 1)


def says_and_ends(request: InferenceRequest, emit: Callable[..., None]) -> None:
    """Not decoupled: COUNT responses, then the news that no more comes."""
    for _ in range(count(request)):
        emit(text("once"), False)
    emit(None, True)


class Held:
    """Requests that wait for the test: it emits through them whenever it likes. Touched only from the event loop."""

    def __init__(self) -> None:
        self.requests: list[tuple[InferenceRequest, Callable[..., None]]] = []
        self.arrived = asyncio.Event()
        self.cancelled = asyncio.Event()

    def script(self, request: InferenceRequest, emit: Callable[..., None]) -> None:
        self.requests.append((request, emit))
        self.arrived.set()

    def watch_cancel(self) -> None:
        request, _ = self.requests[-1]
        before = request.on_cancel

        def on_cancel(cancelled: InferenceRequest) -> None:
            if before is not None:
                before(cancelled)
            self.cancelled.set()

        request.on_cancel = on_cancel


def echo_parameters(request: InferenceRequest, emit: Callable[..., None]) -> None:
    """The request's parameters as the response's, and as two lists."""
    said = request.parameters or {}
    keys = Tensor("key", BYTES, object_array([k.encode() for k in said], [len(said)]))
    values = Tensor("value", BYTES, object_array([str(v).encode() for v in said.values()], [len(said)]))
    emit(Outputs([keys, values], dict(said)), True)


def scripted(name: str, script: Script, inputs: Any, outputs: Any, *, decoupled: bool = True, **rest: Any) -> Model:
    message = model_config(name, inputs, outputs, **rest).proto
    message.model_transaction_policy.decoupled = decoupled
    return worked_model(ModelConfig.from_proto(message), ScriptWorker(script))  # type: ignore[arg-type]


class Served:
    def __init__(self, wire: WireServer, server: InferenceServer, repository: FakeRepository, held: Held) -> None:
        self.wire = wire
        self.server = server
        self.held = held
        self.address = f"127.0.0.1:{wire.port}"
        self.url = f"http://{self.address}"

    def model(self, name: str) -> Model:
        return self.wire.call(lambda: self.server.model(name))

    def in_flight(self) -> int:
        return self.wire.call(lambda: sum(model.inflight_count for model in self.server.models()))


PROMPT = {"PROMPT": ("BYTES", [1]), "COUNT": ("INT32", [1]), "FAIL": ("BOOL", [1])}
TEXT = {"TEXT": ("BYTES", [1])}
OPTIONAL = ("COUNT", "FAIL")


async def _build(
    router: Router, limits: WireLimits, forwarding: HeaderForwarding | None
) -> tuple[InferenceServer, FakeRepository, Held]:
    held = Held()
    models = [
        scripted("repeat", repeat, PROMPT, TEXT, optional=OPTIONAL),
        scripted("batched_repeat", repeat, PROMPT, TEXT, optional=OPTIONAL, max_batch_size=4),
        scripted("numbers", numbers, {"COUNT": ("INT32", [1])}, {"N": ("INT32", [1])}),
        scripted("held", held.script, {"PROMPT": ("BYTES", [1])}, TEXT),
        scripted("sender", says_and_ends, {"COUNT": ("INT32", [1])}, TEXT, decoupled=False),
        scripted(
            "parameter",
            echo_parameters,
            {"INPUT0": ("FP32", [1])},
            {"key": ("BYTES", [-1]), "value": ("BYTES", [-1])},
            decoupled=False,
        ),
        *(
            function_model(
                model_config(name, {"IN": (datatype, dims)}, {"OUT": (datatype, dims)}, max_batch_size=batch),
                lambda inputs: {"OUT": inputs["IN"]},
            )
            for name, datatype, dims, batch in (
                ("vector", "FP32", [-1], 0),
                ("batched", "INT64", [-1], 8),
                ("table", "INT32", [2, -1, 3], 0),
                ("words", "BYTES", [-1], 0),
                ("half", "FP16", [1], 0),
                ("flag", "BOOL", [1], 0),
            )
        ),
    ]
    server, repository = await fake_server(*models)
    grpc = GrpcServer(limits)
    kserve.register(router, grpc, server, limits, http_forwarding=forwarding, grpc_forwarding=forwarding)
    grpc.install(router)
    return server, repository, held


@contextmanager
def serving(limits: WireLimits | None = None, forward: str = "") -> Iterator[Served]:
    router = Router()
    limits = limits or WireLimits()
    with WireServer(router, limits) as wire:
        yield Served(wire, *wire.run(_build(router, limits, HeaderForwarding(forward) if forward else None)))
