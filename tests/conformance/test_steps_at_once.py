"""What shows only while models are at work: steps of an ensemble side by side, how many of a step there may be, answers
that wait for older ones. Over HTTP and gRPC with tritonclient.

The models stop in each request until the test lets that value go on, so nothing here depends on how fast anything is.
"""

from __future__ import annotations

import os
import select
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from prometheus_client.parser import text_string_to_metric_families

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("steps_at_once")

SECONDS = 60  # nothing here takes as long
VALUES = range(10)

GATED = """
import os
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = request.inputs()[0].as_numpy()
            value = int(x.ravel()[0])
            for pipe, use in (("seen", lambda f: os.write(f, b"%d\\n" % value)), (str(value), lambda f: os.read(f, 1))):
                file = os.open(os.path.join("FOLDER", pipe), os.O_RDWR)
                use(file)
                os.close(file)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x * 10)]))
        return responses
"""
JOIN = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", sum(t.as_numpy() for t in r.inputs()))])
                for r in requests]
"""


def tensor(direction: str, name: str) -> str:
    return f'{direction} {{ name: "{name}" data_type: TYPE_INT32 dims: 1 }} '


def step(model: str, output: str, **inputs: str) -> str:
    maps = "".join(f'input_map {{ key: "{k}" value: "{v}" }} ' for k, v in inputs.items())
    return f'step {{ model_name: "{model}" model_version: -1 {maps} output_map {{ key: "Y" value: "{output}" }} }} '


def ensemble(*steps: str, more: str = "") -> str:
    return (
        f'platform: "ensemble" {tensor("input", "X")} {tensor("output", "Y")} '
        f"ensemble_scheduling {{ {''.join(steps)} {more} }}"
    )


PYTHON = 'backend: "python" ' + tensor("input", "X") + tensor("output", "Y")
THREE = "instance_group { count: 3 kind: KIND_CPU } "
OLDEST = "max_batch_size: 1 instance_group { count: 2 kind: KIND_CPU } sequence_batching { oldest {"
CONFIGS = {
    "gated": (PYTHON + THREE, GATED),
    "join": ('backend: "python" ' + tensor("input", "A") + tensor("input", "B") + tensor("output", "Y"), JOIN),
    "diamond": (ensemble(step("gated", "t", X="X"), step("gated", "u", X="X"), step("join", "Y", A="t", B="u")), ""),
    "limited": (ensemble(step("gated", "Y", X="X"), more="max_inflight_requests: 2"), ""),
    "unlimited": (ensemble(step("gated", "Y", X="X")), ""),
    "orderly": (f"{PYTHON} {OLDEST} max_candidate_sequences: 4 preserve_ordering: true }} }}", GATED),
    "disorderly": (f"{PYTHON} {OLDEST} max_candidate_sequences: 4 }} }}", GATED),
}


class Gates:
    """The pipes to the models, and a server asked over one protocol."""

    def __init__(self, server: ServerProcess, folder: Path, protocol: str) -> None:
        self.server = server
        self.protocol = protocol
        self._seen = os.open(folder / "seen", os.O_RDWR)
        self._gates = {value: os.open(folder / str(value), os.O_RDWR) for value in VALUES}
        self._lines: list[int] = []

    def seen(self, count: int) -> list[int]:
        """The next `count` requests that models have begun with, sorted. Waits for them."""
        while len(self._lines) < count:
            assert select.select([self._seen], [], [], SECONDS)[0], f"only {self._lines} came\n{self.server.logs()}"
            self._lines += map(int, os.read(self._seen, 65536).split())
        found, self._lines = self._lines[:count], self._lines[count:]
        return sorted(found)

    def is_quiet(self) -> bool:
        return not self._lines and not select.select([self._seen], [], [], 0)[0]

    def release(self, value: int, count: int = 1) -> None:
        os.write(self._gates[value], b"." * count)

    def send(self, model: str, value: int, **options: Any) -> Future[int]:
        future: Future[int] = Future()
        threading.Thread(target=self._infer, args=(future, model, value, options), daemon=True).start()
        return future

    def _infer(self, future: Future[int], model: str, value: int, options: dict[str, Any]) -> None:
        shape = [1, 1] if "orderly" in model else [1]
        try:
            module: Any = triton_grpc if self.protocol == "grpc" else triton_http
            names = ("A", "B") if model == "join" else ("X",)
            given = [module.InferInput(name, shape, "INT32") for name in names]
            for one in given:
                one.set_data_from_numpy(np.full(shape, value, np.int32))
            if self.protocol == "grpc":
                client: Any = triton_grpc.InferenceServerClient(self.server.grpc)
            else:
                client = triton_http.InferenceServerClient(
                    self.server.http, connection_timeout=SECONDS, network_timeout=SECONDS
                )
            with client:
                answer = int(client.infer(model, given, **options).as_numpy("Y").ravel()[0])
            future.set_result(answer)
        except Exception as error:
            future.set_exception(error)

    def metric(self, name: str, model: str) -> float:
        with urllib.request.urlopen(self.server.metrics_url, timeout=SECONDS) as answer:
            text = answer.read().decode()
        [found] = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.removesuffix("_total") == name and sample.labels.get("model") == model
        ]
        return float(found)

    def until(self, name: str, model: str, value: float) -> None:
        """Asks again and again; only a server that never gets there fails."""
        turn = threading.Event()
        for _ in range(SECONDS * 50):
            if self.metric(name, model) == value:
                return
            turn.wait(0.02)
        raise AssertionError(f"{name} of {model} is {self.metric(name, model)}, never {value}")

    def close(self) -> None:
        for file in (self._seen, *self._gates.values()):
            os.close(file)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, Path]]:
    models, pipes = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("pipes")
    for name in ("seen", *map(str, VALUES)):
        os.mkfifo(pipes / name)
    for name, (config, code) in CONFIGS.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "config.pbtxt").write_text(config)
        if code:
            (models / name / "1" / "model.py").write_text(code.replace("FOLDER", str(pipes)))
    with ServerProcess(models) as server:
        yield server, pipes


@pytest.fixture(params=["http", "grpc"])
def gates(request: pytest.FixtureRequest, served: tuple[ServerProcess, Path]) -> Iterator[Gates]:
    found = Gates(*served, request.param)
    yield found
    found.close()


PENDING = "nv_inference_pending_request_count"


def test_steps_that_do_not_need_each_other_run_at_once(gates: Gates) -> None:
    answer = gates.send("diamond", 7)
    assert gates.seen(2) == [7, 7], "the second branch has begun before the first may end"
    gates.release(7, 2)
    assert answer.result(SECONDS) == 140


def test_no_more_than_the_limit_are_at_a_step(gates: Gates) -> None:
    answers = {value: gates.send("limited", value) for value in (1, 2, 3, 4, 5)}
    at_work = gates.seen(2)
    gates.until(PENDING, "limited", 3)
    assert gates.is_quiet(), "the model has an instance to spare"
    while at_work:
        value = at_work.pop()
        gates.release(value)
        assert answers.pop(value).result(SECONDS) == value * 10
        if len(answers) > len(at_work):
            at_work += gates.seen(1)
            gates.until(PENDING, "limited", len(answers) - 2)
            assert gates.is_quiet()
    assert not answers


def test_without_a_limit_all_that_the_model_can_do_is_under_way(gates: Gates) -> None:
    answers = [gates.send("unlimited", value) for value in (1, 2, 3)]
    assert gates.seen(3) == [1, 2, 3]
    for value in (1, 2, 3):
        gates.release(value)
    assert [answer.result(SECONDS) for answer in answers] == [10, 20, 30]


@pytest.mark.parametrize("model", ["orderly", "disorderly"])
def test_answers_of_sequences_keep_their_order_where_that_is_asked_for(gates: Gates, model: str) -> None:
    ran = gates.metric("nv_inference_exec_count", model)
    old = gates.send(model, 1, sequence_id=1, sequence_start=True, sequence_end=True)
    assert gates.seen(1) == [1]
    young = gates.send(model, 2, sequence_id=2, sequence_start=True, sequence_end=True)
    assert gates.seen(1) == [2], "the other instance has it"
    gates.release(2)
    gates.until("nv_inference_exec_count", model, ran + 1)
    if model == "disorderly":
        assert young.result(SECONDS) == 20
    else:
        assert gates.send("join", 3).result(SECONDS) == 6, "time for the younger's answer, if it were sent"
        assert not young.done(), "it waits for the older's answer"
    assert not old.done()
    gates.release(1)
    assert (old.result(SECONDS), young.result(SECONDS)) == (10, 20)
