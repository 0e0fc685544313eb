"""Small responses of decoupled models through one HTTP/2 connection: how many a second reach the client.

One model costs nothing and runs on the loop, so what is counted is the server; the other is a Python model, whose
responses cross from its process first. Both have back-pressure: a model waits where the client does not read.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import goals
from benchmarks.common import Bench
from benchmarks.goals import Figure
from benchmarks.load import h2load
from doorstep import proto
from doorstep.testing.server import ServerProcess

STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
RESPONSES = 5000  # of one request
RESPONSE_BYTES = 70  # of one, at least: a response that is less is not a response

CONFIG = """
backend: "python"
input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "N" data_type: TYPE_INT32 dims: [ 1 ] } ]
model_transaction_policy { decoupled: true }
"""
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count = int(pb_utils.get_input_tensor_by_name(request, "COUNT").as_numpy()[0])
            for n in range(count):
                tensor = pb_utils.Tensor("N", np.array([n], np.int32))
                sender.send(pb_utils.InferenceResponse([tensor]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""


def streaming(bench: Bench) -> list[Figure]:
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for what, serve in (("a model on the loop", _on_the_loop()), ("a Python model", _python(place / "models"))):
            with serve as port:
                message = _message(place / "count.grpc")
                rates = []
                for _ in range(bench.plan.rounds):
                    load = h2load(
                        port,
                        message,
                        answer_bytes=RESPONSES * RESPONSE_BYTES,
                        connections=1,
                        seconds=bench.plan.seconds,
                        path=STREAM,
                    )
                    rates.append(load.rate * RESPONSES)
            goal = goals.STREAMED
            figures.append(
                Figure(
                    f"decoupled stream of {what}, gRPC, 1 connection", "responses/s", statistics.median(rates), goal,
                    "limit", 1, "least", min(rates) / goal, max(rates) / goal,
                )
            )  # fmt: skip
    return figures


@contextmanager
def _on_the_loop() -> Iterator[int]:
    command = [sys.executable, "-m", "benchmarks.streaming_server"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


@contextmanager
def _python(repository: Path) -> Iterator[int]:
    model = repository / "counts"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(CONFIG)
    (model / "1" / "model.py").write_text(MODEL)
    with ServerProcess(repository) as server:
        yield server.grpc_port


def _message(path: Path) -> Path:
    request = proto.ModelInferRequest(model_name="counts")
    count = request.inputs.add(name="COUNT", datatype="INT32", shape=[1])
    count.contents.int_contents.append(RESPONSES)
    data = request.SerializeToString()
    path.write_bytes(struct.pack(">BI", 0, len(data)) + data)
    return path
