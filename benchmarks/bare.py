"""The limit: the bare library in a loop, in a process of its own, with no server. Prints rows per second.

`python -m benchmarks.bare MODEL BATCH SECONDS` runs MiniLM on BATCH rows of the tokens that the clients send.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.models import TOKENS

BATCH_SIZES = (1, 2, 4, 8, 16)


def run(model: Path, batch: int, seconds: float) -> float:
    """Rows per second of a fresh process."""
    command = [sys.executable, "-m", "benchmarks.bare", str(model), str(batch), str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(model: str, batch: int, seconds: float) -> None:
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    tokens = np.random.default_rng(13).integers(1000, 20000, (1, TOKENS)).repeat(batch, axis=0)
    feed = {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, TOKENS), np.int64),
        "token_type_ids": np.zeros((batch, TOKENS), np.int64),
    }
    session.run(None, feed)
    runs, start = 0, time.perf_counter()
    while (now := time.perf_counter()) - start < seconds:
        session.run(None, feed)
        runs += 1
    print(runs * batch / (now - start))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
