"""Ensembles whose steps die, go away or hang while they are in use: every request is answered, and nothing stays."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harm import PATIENCE_S, Victim

STEP = """
import os, time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            if x[0] == 13:
                open({gate!r} + ".reached", "w").close()
            while x[0] == 13 and not os.path.exists({gate!r}):
                time.sleep(0.01)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x + 1)]))
        return responses
"""
MODEL = """
backend: "python"
input { name: "X" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "Y" data_type: TYPE_INT32 dims: [ 1 ] }
"""
ENSEMBLE = """
platform: "ensemble"
input { name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "OUT" data_type: TYPE_INT32 dims: [ 1 ] }
ensemble_scheduling {
  step { model_name: "one" model_version: -1 input_map { key: "X" value: "IN" } output_map { key: "Y" value: "t" } }
  step { model_name: "two" model_version: -1 input_map { key: "X" value: "t" } output_map { key: "Y" value: "OUT" } }
}
"""


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def victim(tmp_path: Path, gate: Path) -> Iterator[Victim]:
    models = tmp_path / "models"
    for name in ("one", "two"):
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(MODEL)
        (models / name / "1" / "model.py").write_text(STEP.replace("{gate!r}", repr(str(gate))))
    (models / "line" / "1").mkdir(parents=True)
    (models / "line" / "config.pbtxt").write_text(ENSEMBLE)
    with Victim(models, "--model-control-mode=explicit", "--load-model=line") as server:
        yield server


def ask(victim: Victim, value: int) -> tuple[int, Any]:
    return victim.infer("line", {"name": "IN", "datatype": "INT32", "shape": [1], "data": [value]})


def inflight(victim: Victim) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{victim.metrics_port}/metrics", timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("doorstep_inflight_requests{"))


def in_background(victim: Victim, value: int, count: int = 1) -> tuple[list[threading.Thread], list[tuple[int, Any]]]:
    answers: list[tuple[int, Any]] = []
    threads = [threading.Thread(target=lambda: answers.append(ask(victim, value))) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


def joined(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_a_step_whose_process_is_killed_fails_the_request_and_no_other(victim: Victim, gate: Path) -> None:
    threads, answers = in_background(victim, 12)  # it hangs in the second step
    victim.wait_for(gate.with_name("gate.reached").exists)
    for process in victim.workers:
        os.kill(process.pid, signal.SIGKILL)
    joined(threads)
    ((status, body),) = answers
    assert status == 500
    assert body["error"].startswith("in ensemble 'line', ")
    assert "(step 1, model 'two')" in body["error"]
    gate.touch()
    victim.wait_for(lambda: ask(victim, 1)[0] == 200)
    assert ask(victim, 1)[1]["outputs"][0]["data"] == [3]
    victim.wait_for(lambda: inflight(victim) == 0)


def test_a_step_that_is_unloaded_finishes_what_is_under_way(victim: Victim, gate: Path) -> None:
    threads, answers = in_background(victim, 13, 5)  # in the first step
    victim.wait_for(lambda: inflight(victim) >= 6)
    assert victim.post("/v2/repository/models/two/unload")[0] == 200
    assert ask(victim, 1)[0] == 404, "the ensemble went with it"
    gate.touch()
    joined(threads)
    assert [(status, body["outputs"][0]["data"]) for status, body in answers] == [(200, [15])] * 5
    assert victim.post("/v2/repository/models/two/load")[0] == 200
    assert ask(victim, 1)[1]["outputs"][0]["data"] == [3]
    victim.wait_for(lambda: inflight(victim) == 0)


def test_a_client_that_goes_takes_its_steps_with_it(victim: Victim, gate: Path) -> None:
    threads, answers = in_background(victim, 13)  # keeps the first step's only instance
    victim.wait_for(lambda: inflight(victim) >= 2)
    body = json.dumps({"inputs": [{"name": "IN", "datatype": "INT32", "shape": [1], "data": [1]}]}).encode()
    gone = []
    for _ in range(20):
        sock = socket.create_connection(("127.0.0.1", victim.http_port))
        sock.sendall(
            b"POST /v2/models/line/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        gone.append(sock)
    victim.wait_for(lambda: inflight(victim) >= 42)
    for sock in gone:
        sock.close()
    victim.wait_for(lambda: inflight(victim) == 2)
    gate.touch()
    joined(threads)
    assert answers[0][0] == 200
    status, stats = victim.get("/v2/models/two/stats")
    assert status == 200
    assert json.loads(stats)["model_stats"][0]["inference_count"] == 1, "no step was begun for those who had gone"
    victim.wait_for(lambda: inflight(victim) == 0)
