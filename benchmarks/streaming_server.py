"""A server of one decoupled model that is a function on the loop: what streaming costs beside it. Prints its port.

Everything from the socket to the scheduler's runner is Doorstep's; the model costs nothing, and gives its responses a
few at a time, as long as the client has room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import uvloop

from doorstep.config.model import ModelConfig
from doorstep.protocols import kserve
from doorstep.request import LATER, Batch, InferenceRequest
from doorstep.testing.fakes import fake_server, model_config, worked_model
from doorstep.types import INT32, Tensor
from doorstep.wire.context import ListenerContext
from doorstep.wire.grpc import GrpcServer
from doorstep.wire.limits import WireLimits
from doorstep.wire.listener import Address, Listener
from doorstep.wire.router import Router

AT_ONCE = 64  # responses in one turn of the loop


class CountingWorker:
    """Answers COUNT with as many responses. Touched only from the event loop."""

    name = "counts_0"

    def submit(self, batch: Batch, done: Callable[[Batch], None]) -> None:
        loop = asyncio.get_running_loop()
        for i, request in enumerate(batch.requests):
            batch.results[i] = LATER
            count = int(request.inputs["COUNT"].array[0])
            loop.call_soon(self._go_on, batch, request, 0, count)
        done(batch)

    def _go_on(self, batch: Batch, request: InferenceRequest, number: int, count: int) -> None:
        emit = batch.emit
        stop = min(number + AT_ONCE, count)
        for n in range(number, stop):
            if request.cancelled:
                return
            emit(request, [Tensor("N", INT32, np.array([n], np.int32))], n == count - 1)
        if stop == count:
            return
        if request.stalled:
            request.on_room = lambda _: self._go_on(batch, request, stop, count)
        else:
            asyncio.get_running_loop().call_soon(self._go_on, batch, request, stop, count)

    def close(self) -> None: ...


async def main() -> None:
    message = model_config("counts", {"COUNT": ("INT32", [1])}, {"N": ("INT32", [1])}).proto
    message.model_transaction_policy.decoupled = True
    model = worked_model(ModelConfig.from_proto(message), CountingWorker())  # type: ignore[arg-type]
    server, _ = await fake_server(model)
    limits, router = WireLimits(), Router()
    grpc = GrpcServer(limits)
    kserve.register(router, grpc, server, limits)
    grpc.install(router)
    listener = Listener(ListenerContext("grpc", router, limits), Address("grpc"))
    await listener.open()
    print(listener.port, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
