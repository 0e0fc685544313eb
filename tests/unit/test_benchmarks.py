"""The arithmetic and the files of benchmarks/: what a figure says, and that what is sent is what a server wants."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import procfs  # noqa: E402
from benchmarks.goals import Figure  # noqa: E402
from benchmarks.models import write_mlp  # noqa: E402
from benchmarks.payloads import write_payloads  # noqa: E402
from benchmarks.report import table  # noqa: E402


@pytest.mark.parametrize(
    ("ours", "theirs", "goal", "at", "met"),
    [
        (50, 20, 2.5, "least", True),
        (49, 20, 2.5, "least", False),
        (1, 3, 0.5, "most", True),
        (2, 3, 0.5, "most", False),
    ],
)
def test_a_figure_meets_its_goal_or_does_not(ours: float, theirs: float, goal: float, at: str, met: bool) -> None:
    figure = Figure("work", "unit", ours, theirs, "triton", goal, at)  # type: ignore[arg-type]
    assert figure.met is met
    assert ("**no**" in table([figure])) is not met


def test_binary_payloads_say_where_their_json_ends(tmp_path: Path) -> None:
    body = write_payloads(tmp_path).image_binary
    raw = body.path.read_bytes()
    assert body.json_length is not None
    (tensor,) = json.loads(raw[: body.json_length])["inputs"]
    assert tensor["parameters"]["binary_data_size"] == len(raw) - body.json_length == 602_112


def test_grpc_payloads_are_framed_messages(tmp_path: Path) -> None:
    framed = write_payloads(tmp_path).mlp_grpc.read_bytes()
    assert framed[:1] == b"\0"
    assert int.from_bytes(framed[1:5], "big") == len(framed) - 5
    request = service_pb2.ModelInferRequest.FromString(framed[5:])
    assert request.model_name == "mlp"
    assert list(request.inputs[0].shape) == [1, 16]


def test_the_mlp_takes_any_number_of_rows_and_is_the_same_each_time(tmp_path: Path) -> None:
    import onnxruntime as ort

    write_mlp(tmp_path / "a.onnx")
    write_mlp(tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    session = ort.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    (output,) = session.run(["output"], {"input": np.ones((5, 16), np.float32)})
    assert output.shape == (5, 3)


def test_cpu_time_and_memory_of_this_process_are_found_in_proc() -> None:
    pid = os.getpid()
    assert pid in procfs.tree(pid)
    assert 0 < procfs.cpu_seconds(pid) <= sum(os.times()[:4]) + 0.1
    assert procfs.resident_bytes(pid) > 10_000_000
