"""Clients that begin sequences and go: slots come back, who waits behind them is cancelled, nobody else is hurt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from harm import Victim, attacked, infer_stub
from onnx import TensorProto, helper

from doorstep import proto
from doorstep.testing.onnx_models import save_adder, save_model

pytestmark = pytest.mark.xdist_group("sequences-abandoned")

FLOAT = TensorProto.FLOAT
CONFIG = """
max_batch_size: 4
input {{ name: "x" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 1 ] }}
sequence_batching {{
  {strategy}
  max_sequence_idle_microseconds: {idle}
  state {{ input_name: "before" output_name: "after" data_type: TYPE_FP32 dims: [ 1 ] }}
}}
"""
STRATEGIES = {"direct": "direct { }", "oldest": "oldest { max_candidate_sequences: 4 }"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    root = tmp_path_factory.mktemp("abandoned")
    save_adder(root / "add" / "1" / "model.onnx", 1.0)
    for name, strategy in STRATEGIES.items():
        for speed, idle in (("hasty", 200_000), ("patient", 600_000_000)):
            column: list[Any] = ["N", 1]
            save_model(
                root / f"{speed}_{name}" / "1" / "model.onnx",
                [helper.make_node("Add", ["x", "before"], ["after"]), helper.make_node("Identity", ["after"], ["y"])],
                [("x", FLOAT, column), ("before", FLOAT, column)],
                [("y", FLOAT, column), ("after", FLOAT, column)],
            )
            (root / f"{speed}_{name}" / "config.pbtxt").write_text(CONFIG.format(strategy=strategy, idle=idle))
    with Victim(root, "--exit-timeout-secs=1") as running:
        yield running


def ask(server: Victim, model: str, sequence: Any, flags: str = "", x: Any = 1.0) -> tuple[int, Any]:
    parameters = {"sequence_id": sequence, "sequence_start": "s" in flags, "sequence_end": "e" in flags}
    tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [x]}
    status, answer = server.infer(model, tensor, parameters=parameters)
    return status, answer["outputs"][0]["data"][0] if status == 200 else answer["error"]


def message(model: str, sequence: int, *, start: bool = False) -> Any:
    request = proto.ModelInferRequest(model_name=model)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 1]).contents.fp32_contents.append(1)
    request.parameters["sequence_id"].int64_param = sequence
    request.parameters["sequence_start"].bool_param = start
    return request


@pytest.mark.parametrize("name", STRATEGIES)
def test_sequences_nobody_ends_give_their_slots_back(server: Victim, name: str) -> None:
    with attacked(server):
        for sequence in range(1, 13):  # three times as many as there are slots
            assert ask(server, f"hasty_{name}", sequence, "s") == (200, 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_who_leaves_the_backlog_takes_its_sequence_along(server: Victim, name: str) -> None:
    model = f"patient_{name}"
    with attacked(server):
        for sequence in range(1, 5):
            assert ask(server, model, sequence, "s") == (200, 1)
        with server.channel() as channel:
            call = infer_stub(channel)
            waiting = [call.future(message(model, 100 + i, start=True)) for i in range(20)]
            server.wait_for(lambda: server.metric("doorstep_queue_depth", model=model) == 20, "a backlog")
            for future in waiting:
                future.cancel()
            server.wait_for(lambda: server.metric("doorstep_queue_depth", model=model) == 0, "an empty backlog")
        for sequence in range(1, 5):
            assert ask(server, model, sequence, "e") == (200, 2)
        status, text = ask(server, model, 100)
        assert (status, "must specify the START flag" in text) == (400, True)
        assert ask(server, model, 7, "se") == (200, 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_wrong_requests_leave_the_sequence_as_it_was(server: Victim, name: str) -> None:
    model = f"patient_{name}"
    with attacked(server):
        assert ask(server, model, 5, "s") == (200, 1)
        for wrong in ("x", None, [1, 2], 10**400):
            assert ask(server, model, 5, x=wrong)[0] >= 400
        for sequence in (0, "", -1, 2**64, 1.5, None, [], "y" * 129):
            assert ask(server, model, sequence, "s")[0] >= 400
        assert ask(server, model, 5, "e") == (200, 2)
