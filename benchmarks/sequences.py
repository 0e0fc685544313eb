"""64 interleaved sequences, a client each: how full their batches are. `python -m benchmarks.sequences` by itself.

What counts is rows of requests over max_batch_size; padding is not a row. The clients run beside the server, on the
same cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from onnx import TensorProto, helper

from benchmarks import goals
from benchmarks.common import Bench
from benchmarks.goals import Figure
from doorstep.testing.onnx_models import save_model
from doorstep.testing.server import ServerProcess

CLIENTS = 64
CONFIG = """
max_batch_size: {batch}
input {{ name: "x" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 1 ] }}
sequence_batching {{
  {strategy}
  state {{
    input_name: "before" output_name: "after" data_type: TYPE_FP32 dims: [ 1 ]
    initial_state {{ name: "zero" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true }}
  }}
}}
"""
# As their users write them: a batch may wait a little for the sequences that are on their way.
STRATEGIES = {
    "direct": (64, "direct { max_queue_delay_microseconds: 5000 minimum_slot_utilization: 0.9 }"),
    "oldest": (
        16,
        "oldest { max_candidate_sequences: 64 preferred_batch_size: [ 16 ] max_queue_delay_microseconds: 5000 }",
    ),
}


def write_repository(folder: Path) -> Path:
    """An accumulator for each strategy."""
    column = ["N", 1]
    for name, (batch, strategy) in STRATEGIES.items():
        save_model(
            folder / name / "1" / "model.onnx",
            [helper.make_node("Add", ["x", "before"], ["after"]), helper.make_node("Identity", ["after"], ["y"])],
            [("x", TensorProto.FLOAT, column), ("before", TensorProto.FLOAT, column)],
            [("y", TensorProto.FLOAT, column), ("after", TensorProto.FLOAT, column)],
        )
        (folder / name / "config.pbtxt").write_text(CONFIG.format(batch=batch, strategy=strategy))
    return folder


def fullness(server: ServerProcess, model: str, seconds: float) -> tuple[float, float]:
    """The mean rows of a batch, and requests per second."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.sequence_load",
        str(server.http_port),
        model,
        str(CLIENTS),
        f"{seconds}",
    ]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    with urllib.request.urlopen(f"http://{server.http}/v2/models/{model}/stats") as response:
        (stats,) = json.load(response)["model_stats"]
    return stats["inference_count"] / stats["execution_count"], int(done.stdout) / seconds


def sequences(bench: Bench) -> list[Figure]:
    return measure(bench.plan.seconds)


def measure(seconds: float) -> list[Figure]:
    figures = []
    with (
        tempfile.TemporaryDirectory(prefix="doorstep-bench-") as folder,
        ServerProcess(write_repository(Path(folder)), "--exit-timeout-secs=1") as server,
    ):
        for name, (batch, _) in STRATEGIES.items():
            rows, rate = fullness(server, name, seconds)
            scenario = f"{CLIENTS} interleaved sequences, {name}, HTTP JSON, {rate:,.0f} requests/s"
            full = rows / batch
            figures.append(
                Figure(scenario, "rows of a batch", rows, batch, "all", goals.SEQUENCES_FULL, "least", full, full)
            )
    return figures


if __name__ == "__main__":
    for figure in measure(5.0):
        print(f"{figure.scenario}: {figure.doorstep:.1f} of {figure.other:.0f}, {figure.ratio:.0%}")
