"""Priorities, queue policies and the rate limiter as clients of Triton see them, over HTTP and gRPC.

The models stop in every batch until the test lets them go on, as in test_batching.py, so what waits when is the test's
choice. What is expected is Triton's L0_priority_queue and the source of its scheduler_utils.cc and rate_limiter.cc.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.utils import InferenceServerException

from doorstep.testing.server import ServerProcess

pytestmark = pytest.mark.xdist_group("queue_policies")

SECONDS = 30  # nothing here takes as long
LONG_US = 3_600_000_000  # a timeout no test lives to see

MODEL = """
import json, os
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        folder, self.instance = args["model_repository"], args["model_instance_name"]
        for pipe in (".seen", ".gate"):  # no part of the model, as they are hidden
            try:
                os.mkfifo(os.path.join(folder, pipe))
            except FileExistsError:
                pass
        self.seen = os.open(os.path.join(folder, ".seen"), os.O_RDWR)
        self.gate = os.open(os.path.join(folder, ".gate"), os.O_RDWR)

    def execute(self, requests):
        arrays = [r.inputs()[0].as_numpy() for r in requests]
        batch = {"instance": self.instance, "x": [int(v) for a in arrays for v in a.flatten()]}
        os.write(self.seen, json.dumps(batch).encode() + b"\\n")
        os.read(self.gate, 1)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("output", a * 10)]) for a in arrays]
"""
TENSORS = """
backend: "python"
input { name: "x" data_type: TYPE_INT32 dims: 1 }
output { name: "output" data_type: TYPE_INT32 dims: 1 }
"""
LEVELS = "priority_levels: 3 default_priority_level: 2"


def policy(level: int, text: str) -> str:
    return f"priority_queue_policy {{ key: {level} value {{ {text} }} }}"


SHORT = "default_timeout_microseconds: 1"  # has expired before anything can be looked at
CONFIGS = {
    "levels": f"max_batch_size: 2 dynamic_batching {{ {LEVELS} }}",
    "unbatched": f"max_batch_size: 0 dynamic_batching {{ {LEVELS} default_queue_policy {{ max_queue_size: 2 }} }}",
    "reject": f"max_batch_size: 2 dynamic_batching {{ {LEVELS} {policy(1, SHORT)} }}",
    "delay": f"max_batch_size: 1 dynamic_batching {{ {LEVELS} {policy(1, SHORT + ' timeout_action: DELAY')} }}",
    "override": "max_batch_size: 2 dynamic_batching { default_queue_policy {"
    f" default_timeout_microseconds: {LONG_US} allow_timeout_override: true }} }}",
    "longer": "max_batch_size: 2 dynamic_batching { default_queue_policy {"
    " default_timeout_microseconds: 50000 allow_timeout_override: true } }",
    "fixed": "max_batch_size: 2 dynamic_batching {"
    f" default_queue_policy {{ default_timeout_microseconds: {LONG_US} }} }}",
    "no_default": "max_batch_size: 2 dynamic_batching { default_queue_policy { allow_timeout_override: true } }",
    "bounds": f"max_batch_size: 1 dynamic_batching {{ {LEVELS} default_queue_policy {{ max_queue_size: 1 }}"
    f" {policy(1, 'max_queue_size: 2')} }}",
    "default": "max_batch_size: 2",
}


def save(models: Path, name: str, config: str) -> None:
    (models / name / "1").mkdir(parents=True)
    (models / name / "1" / "model.py").write_text(MODEL)
    (models / name / "config.pbtxt").write_text(TENSORS + config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("policies")
    for name, config in CONFIGS.items():
        save(models, name, config)
    with ServerProcess(models) as found:
        found.models = models  # type: ignore[attr-defined]
        yield found


class Gated:
    """One of the models that stop, asked over one protocol."""

    def __init__(self, server: ServerProcess, name: str, protocol: str, models: Path) -> None:
        self.server, self.name, self.protocol = server, name, protocol
        self._seen = os.open(models / name / ".seen", os.O_RDWR)
        self._gate = os.open(models / name / ".gate", os.O_RDWR)
        self._rest = b""
        self.rejected = self.failures("REJECTED")

    def seen(self) -> dict[str, Any]:
        """What the next batch was given. Waits for it."""
        while b"\n" not in self._rest:
            assert select.select([self._seen], [], [], SECONDS)[0], f"no batch came\n{self.server.logs()}"
            self._rest += os.read(self._seen, 65536)
        line, self._rest = self._rest.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def is_quiet(self) -> bool:
        """Nothing has been run that the test has not seen."""
        return not self._rest and not select.select([self._seen], [], [], 0)[0]

    def release(self, count: int = 1) -> None:
        os.write(self._gate, b"." * count)

    def send(self, value: int, **options: Any) -> Future[int]:
        """One request with Triton's own client. Resolves to its answer."""
        future: Future[int] = Future()

        def run() -> None:
            try:
                future.set_result(self._infer(value, options))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _infer(self, value: int, options: dict[str, Any]) -> int:
        shape = [1] if self.name == "unbatched" else [1, 1]
        if self.protocol == "http":
            client: Any = triton_http.InferenceServerClient(
                self.server.http, connection_timeout=SECONDS, network_timeout=SECONDS
            )
            tensor: Any = triton_http.InferInput("x", shape, "INT32")
        else:
            client = triton_grpc.InferenceServerClient(self.server.grpc)
            tensor = triton_grpc.InferInput("x", shape, "INT32")
        tensor.set_data_from_numpy(np.full(shape, value, np.int32))
        with client:
            return int(client.infer(self.name, [tensor], **options).as_numpy("output").flatten()[0])

    def queued(self, *requests: tuple[int, dict[str, Any]]) -> list[Future[int]]:
        """Requests one after the other, each in the queue before the next is sent."""
        base = self.pending()
        futures = []
        for count, (value, options) in enumerate(requests, 1):
            futures.append(self.send(value, **options))
            until(lambda count=count: self.pending() == base + count)  # type: ignore[misc]
        return futures

    def running(self) -> Future[int]:
        """A request that the instance is busy with."""
        future = self.send(0)
        assert self.seen()["x"] == [0]
        return future

    def pending(self) -> int:
        return int(metric(self.server, "nv_inference_pending_request_count", model=self.name, version="1"))

    def failures(self, reason: str) -> int:
        labels = {"model": self.name, "version": "1", "reason": reason}
        return int(metric(self.server, "nv_inference_request_failure", **labels))

    def close(self) -> None:
        os.close(self._seen)
        os.close(self._gate)


def metric(server: ServerProcess, name: str, **labels: str) -> float:
    with urllib.request.urlopen(server.metrics_url, timeout=SECONDS) as answer:
        text = answer.read().decode()
    [found] = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.removesuffix("_total") == name and sample.labels == labels
    ]
    return float(found)


def until(condition: Callable[[], bool]) -> None:
    """Asks again and again; only a server that never gets there fails."""
    turn = threading.Event()
    for _ in range(SECONDS * 100):
        if condition():
            return
        turn.wait(0.01)
    raise AssertionError("it never came to that")


def refusal(future: Future[int]) -> tuple[str, str]:
    """(status, message) of a request that was refused."""
    with pytest.raises(InferenceServerException) as caught:
        future.result(SECONDS)
    return str(caught.value.status()), caught.value.message()


def answers(futures: list[Future[int]]) -> list[int]:
    return [future.result(SECONDS) for future in futures]


@pytest.fixture(params=["http", "grpc"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def gated(server: ServerProcess, protocol: str, request: pytest.FixtureRequest) -> Iterator[Gated]:
    found = Gated(server, request.param, protocol, server.models)  # type: ignore[attr-defined]
    yield found
    found.close()


def on(name: str) -> Any:
    return pytest.mark.parametrize("gated", [name], indirect=True)


FULL = "[request id: <id_unknown>] Exceeds maximum queue size"
UNAVAILABLE = {"http": "503", "grpc": "StatusCode.UNAVAILABLE"}


def p(value: int, priority: int = 0, **options: Any) -> tuple[int, dict[str, Any]]:
    return value, {"priority": priority, **options}


# Priorities


@on("levels")
def test_the_highest_priority_runs_first_and_batches_reach_over_levels(gated: Gated) -> None:
    first = gated.running()
    futures = gated.queued(p(1, 3), p(2, 2), p(3, 1), p(4), p(5, 99), p(6, 1), p(7, 1))
    gated.release(5)
    batches = [gated.seen()["x"] for _ in range(4)]
    assert batches == [[3, 6], [7, 2], [4, 5], [1]], "0 and what is out of range are the default, 2"
    assert answers([first, *futures]) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert gated.failures("REJECTED") == gated.rejected


@on("unbatched")
def test_priorities_and_bounds_hold_for_a_model_without_a_batch_dimension(gated: Gated) -> None:
    first = gated.running()
    futures = gated.queued(p(1, 3), p(2, 1), p(3, 3), p(4, 1))
    assert refusal(gated.send(5, priority=3)) == (UNAVAILABLE[gated.protocol], FULL)
    gated.release(5)
    assert [gated.seen()["x"] for _ in range(4)] == [[2], [4], [1], [3]]
    assert answers([first, *futures]) == [0, 10, 20, 30, 40]
    assert gated.failures("REJECTED") == gated.rejected + 1


@on("bounds")
def test_each_level_has_a_bound_of_its_own(gated: Gated) -> None:
    first = gated.running()
    futures = gated.queued(p(1, 1), p(2, 1), p(3, 2), p(4, 3))
    for priority in (1, 0, 3):
        assert refusal(gated.send(9, priority=priority)) == (UNAVAILABLE[gated.protocol], FULL)
    gated.release(5)
    assert [gated.seen()["x"] for _ in range(4)] == [[1], [2], [3], [4]]
    assert answers([first, *futures]) == [0, 10, 20, 30, 40]
    assert gated.failures("REJECTED") == gated.rejected + 3
    assert gated.pending() == 0


@on("default")
def test_without_dynamic_batching_priority_and_timeout_mean_nothing(gated: Gated) -> None:
    first = gated.running()
    futures = gated.queued(p(1, 3), p(2, 1, timeout=1), p(3, 2))
    gated.release(4)
    assert [gated.seen()["x"] for _ in range(3)] == [[1], [2], [3]]
    assert answers([first, *futures]) == [0, 10, 20, 30]


# Timeouts


@on("reject")
def test_a_level_that_rejects_does_so_while_the_instance_is_busy(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(p(1, 2))
    assert refusal(gated.send(2, priority=1)) == (UNAVAILABLE[gated.protocol], "Request timeout expired")
    assert gated.pending() == 1, "the other level has no timeout"
    gated.release(2)
    assert answers([first, *rest]) == [0, 10]
    assert gated.seen()["x"] == [1]
    assert gated.failures("REJECTED") == gated.rejected + 1


@on("delay")
def test_a_level_that_delays_runs_what_has_expired_after_the_rest_of_it(gated: Gated) -> None:
    first = gated.running()
    futures = gated.queued(p(1, 1), p(2, 2), p(3, 1), p(4, 3))
    gated.release(5)
    assert [gated.seen()["x"] for _ in range(4)] == [[1], [3], [2], [4]], "behind its level, before the next"
    assert answers([first, *futures]) == [0, 10, 20, 30, 40]
    assert gated.failures("REJECTED") == gated.rejected


@on("override")
def test_a_requests_own_shorter_timeout_counts_where_the_model_lets_it(gated: Gated) -> None:
    first = gated.running()
    assert refusal(gated.send(1, timeout=1000)) == (UNAVAILABLE[gated.protocol], "Request timeout expired")
    rest = gated.queued(p(2), p(3, timeout=2 * LONG_US))
    gated.release(2)
    assert gated.seen()["x"] == [2, 3]
    assert answers([first, *rest]) == [0, 20, 30]


@on("longer")
def test_a_requests_own_timeout_cannot_be_longer_than_the_default(gated: Gated) -> None:
    first = gated.running()
    assert refusal(gated.send(1, timeout=LONG_US)) == (UNAVAILABLE[gated.protocol], "Request timeout expired")
    gated.release()
    assert answers([first]) == [0]


@on("fixed")
def test_a_requests_own_timeout_does_not_count_where_the_model_does_not_let_it(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(p(1, timeout=1))
    gated.release(2)
    assert gated.seen()["x"] == [1]
    assert answers([first, *rest]) == [0, 10]


@on("no_default")
def test_a_requests_own_timeout_does_not_count_without_a_default(gated: Gated) -> None:
    first = gated.running()
    rest = gated.queued(p(1, timeout=1))
    gated.release(2)
    assert gated.seen()["x"] == [1]
    assert answers([first, *rest]) == [0, 10]


@on("levels")
def test_whoever_leaves_a_level_is_skipped(gated: Gated) -> None:
    before = gated.failures("CANCELED")
    first = gated.running()
    leave(gated)
    rest = gated.queued(p(2, 2))
    gated.release(2)
    assert gated.seen()["x"] == [2]
    assert answers([first, *rest]) == [0, 20]
    assert (gated.failures("CANCELED"), gated.failures("REJECTED")) == (before + 1, gated.rejected)


def leave(gated: Gated) -> None:
    """A request of the highest priority that nobody waits for any more, and that was in the queue before."""
    if gated.protocol == "grpc":
        status, _ = refusal(gated.send(1, priority=1, client_timeout=0.5))
        assert status == "StatusCode.DEADLINE_EXCEEDED"
    else:
        tensor = {"name": "x", "datatype": "INT32", "shape": [1, 1], "data": [1]}
        body = json.dumps({"inputs": [tensor], "parameters": {"priority": 1}}).encode()
        head = f"POST /v2/models/{gated.name}/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", gated.server.http_port), SECONDS) as connection:
            connection.sendall(head.encode() + body)
            until(lambda: gated.pending() == 1)
    until(lambda: gated.pending() == 0)


# TRITONSERVER_DELAY_SCHEDULER


def test_a_scheduler_that_is_held_back_waits_for_as_many_requests(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, "held", f"max_batch_size: 8 dynamic_batching {{ {LEVELS} {policy(1, SHORT)} }}")
    monkeypatch.setenv("TRITONSERVER_DELAY_SCHEDULER", "4")
    with ServerProcess(tmp_path) as server:
        gated = Gated(server, "held", protocol, tmp_path)
        futures = gated.queued(p(1, 3), p(2, 1), p(3, 2))
        assert gated.is_quiet()
        futures.append(gated.send(4, priority=2))
        assert gated.seen()["x"] == [3, 4, 1]
        assert refusal(futures.pop(1)) == (UNAVAILABLE[protocol], "Request timeout expired")
        gated.release()
        assert answers(futures) == [10, 30, 40]
        futures = [gated.send(5)]
        assert gated.seen()["x"] == [5], "only the first batch is held back"
        gated.release()
        assert answers(futures) == [50]
        gated.close()
