"""The response cache, local and Redis: who is answered from it, what counts, what it forgets. Over HTTP and gRPC.

Statistics: core, infer_stats.cc (UpdateSuccessCacheHit, UpdateSuccessCacheMiss).
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transports import SECONDS, Answer, Refused, Transport, TritonGrpc, TritonHttp

from doorstep.testing.certificates import Authority
from doorstep.testing.onnx_models import save_adder
from doorstep.testing.server import ServerProcess, free_ports

# y is how often the model has run, in x's place; "fail" fails.
COUNTER = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    runs = 0
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            if (x < 0).any():
                answers.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("negative")))
                continue
            self.runs += 1
            answers.append(pb_utils.InferenceResponse([
                pb_utils.Tensor("y", x * 0 + self.runs),
                pb_utils.Tensor("z", np.array([str(self.runs).encode()], np.object_)),
            ]))
        return answers
"""
COUNTER_CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "z" data_type: TYPE_STRING dims: [ 1 ] }
response_cache { enable: true }
"""
ENSEMBLE_CONFIG = """
platform: "ensemble"
input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }
ensemble_scheduling { step {
  model_name: "%s" model_version: -1
  input_map { key: "x" value: "x" } output_map { key: "y" value: "y" } } }
%s
"""
CACHED = "response_cache { enable: true }"


def save(models: Path, name: str, config: str, source: str = "") -> None:
    folder = models / name / "1"
    folder.mkdir(parents=True)
    (models / name / "config.pbtxt").write_text(config)
    if source:
        (folder / "model.py").write_text(source)


def save_models(models: Path) -> Path:
    save(models, "counter", COUNTER_CONFIG, COUNTER)
    save(models, "plain", COUNTER_CONFIG.replace(CACHED, ""), COUNTER)
    save(models, "whole", ENSEMBLE_CONFIG % ("plain", CACHED))
    save(models, "steps", ENSEMBLE_CONFIG % ("counter", ""))
    return models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("cached") / "models")


REDIS = shutil.which("redis-server")


class Redis:
    """A redis-server that keeps nothing on disk."""

    def __init__(self, *options: str) -> None:
        assert REDIS is not None
        (self.port,) = free_ports(1)
        self._argv = [REDIS, "--port", str(self.port), "--save", "", "--appendonly", "no", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert time.monotonic() < deadline
                threading.Event().wait(0.02)

    def start_with(self, *options: str) -> None:
        self._argv += options
        self.start()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def __enter__(self) -> Redis:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def options(self) -> tuple[str, ...]:
        return "--cache-config=redis,host=127.0.0.1", f"--cache-config=redis,port={self.port}"

    def command(self, *words: str) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), SECONDS) as client:
            client.sendall(b"".join([b"%s\r\n" % " ".join(words).encode()]))
            return client.recv(65536)


needs_redis = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed (Debian: redis-server)")


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as redis:
        yield redis


@pytest.fixture(scope="module", params=["local", pytest.param("redis", marks=needs_redis)])
def server(request: pytest.FixtureRequest, models: Path) -> Iterator[ServerProcess]:
    if request.param == "local":
        options: tuple[str, ...] = ("--cache-config=local,size=1048576",)
    else:
        options = request.getfixturevalue("redis").options
    with ServerProcess(models, *options, "--model-control-mode=explicit", "--load-model=*") as server:
        yield server
        assert "Traceback" not in server.logs(), server.logs()


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Transport]:
    client = TritonHttp(server.http, binary=True) if request.param == "http" else TritonGrpc(server.grpc)
    yield client
    client.close()


_next = iter(range(1, 1_000_000))


def fresh(size: int = 3) -> Any:
    """A tensor that nobody has asked about before."""
    return np.full(size, next(_next), np.float32)


def ask(client: Transport, x: Any, model: str = "counter", **more: Any) -> Answer:
    return client.infer(model, {"x": x}, **more)


def run_of(answer: Answer) -> float:
    return float(answer.outputs["y"][0])


def stats(server: ServerProcess, model: str = "counter") -> dict[str, Any]:
    import json
    import urllib.request

    with urllib.request.urlopen(server.url(f"/v2/models/{model}/stats"), timeout=SECONDS) as answer:
        (found,) = json.loads(answer.read())["model_stats"]
    return dict(found)


def counts(found: dict[str, Any]) -> dict[str, int]:
    made = {name: entry["count"] for name, entry in found["inference_stats"].items()}
    return {**made, "inferences": found["inference_count"], "executions": found["execution_count"]}


def gained(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    old, new = counts(before), counts(after)
    return {name: new[name] - old[name] for name in new if new[name] != old[name]}


def settle(server: ServerProcess, client: Transport, x: Any, model: str = "counter", **more: Any) -> None:
    """Asks until the answer stays the same: an insertion into Redis is not waited for by its request."""
    deadline = time.monotonic() + SECONDS
    last = run_of(ask(client, x, model, **more))
    while (now := run_of(ask(client, x, model, **more))) != last:
        assert time.monotonic() < deadline
        last = now


# What is answered from the cache


def test_the_second_time_nothing_runs(server: ServerProcess, client: Transport) -> None:
    x = fresh()
    first = ask(client, x, id="one")
    settle(server, client, x)
    before = stats(server)
    again = ask(client, x, id="two")
    assert again.outputs["y"].tolist()[0] in (run_of(first), run_of(first) + 1, run_of(first) + 2)
    assert (again.id, again.model_name, again.model_version) == ("two", "counter", "1")
    assert again.outputs["z"].tolist() == [str(int(run_of(again))).encode()]
    after = stats(server)
    assert gained(before, after) == {"success": 1, "queue": 1, "cache_hit": 1}
    assert after["inference_stats"]["cache_hit"]["ns"] > before["inference_stats"]["cache_hit"]["ns"]


def test_a_miss_counts_as_what_ran_and_as_a_miss(server: ServerProcess, client: Transport) -> None:
    before = stats(server)
    ask(client, fresh())
    assert gained(before, stats(server)) == {
        "success": 1, "queue": 1, "compute_input": 1, "compute_infer": 1, "compute_output": 1, "cache_miss": 1,
        "inferences": 1, "executions": 1,
    }  # fmt: skip


def test_what_differs_is_another_question(server: ServerProcess, client: Transport) -> None:
    x = fresh(4)
    settle(server, client, x)
    run = run_of(ask(client, x))
    others = [
        run_of(ask(client, x[:2])),
        run_of(ask(client, x + 0.5)),
        run_of(ask(client, x, outputs=["y"])),
        run_of(ask(client, x, parameters={"tone": "kind"})),
        run_of(ask(client, x, parameters={"tone": "dry"})),
    ]
    assert len({run, *others}) == 6
    assert run_of(ask(client, x)) == run
    assert run_of(ask(client, x, outputs=["z", "y"])) == run, "all outputs, by name"


def test_long_inputs(server: ServerProcess, client: Transport) -> None:
    x = fresh(30_000)
    settle(server, client, x)
    before = stats(server)
    assert ask(client, x).outputs["y"].shape == (30_000,)
    assert gained(before, stats(server)) == {"success": 1, "queue": 1, "cache_hit": 1}


def test_errors_are_not_kept(server: ServerProcess, client: Transport) -> None:
    before = stats(server)
    for _ in range(2):
        with pytest.raises(Refused, match="negative"):
            ask(client, -fresh())
    assert gained(before, stats(server)) == {"fail": 2}


def test_models_that_do_not_ask_have_none(server: ServerProcess, client: Transport) -> None:
    x = fresh()
    before = stats(server, "plain")
    assert run_of(ask(client, x, "plain")) != run_of(ask(client, x, "plain"))
    found = gained(before, stats(server, "plain"))
    assert found["executions"] == 2
    assert "cache_miss" not in found


def test_an_ensemble_as_a_whole(server: ServerProcess, client: Transport) -> None:
    x = fresh()
    settle(server, client, x, "whole")
    before, step = stats(server, "whole"), stats(server, "plain")
    ask(client, x, "whole")
    assert gained(before, stats(server, "whole")) == {"success": 1, "queue": 1, "cache_hit": 1}
    assert gained(step, stats(server, "plain")) == {}


def test_a_step_of_an_ensemble(server: ServerProcess, client: Transport) -> None:
    x = fresh()
    settle(server, client, x, "steps")
    before, step = stats(server, "steps"), stats(server, "counter")
    ask(client, x, "steps")
    assert gained(step, stats(server, "counter")) == {"success": 1, "queue": 1, "cache_hit": 1}
    assert gained(before, stats(server, "steps"))["success"] == 1


# What is forgotten


def reload(server: ServerProcess, name: str, x: float) -> None:
    import urllib.request

    for verb in ("unload", "load"):
        request = urllib.request.Request(server.url(f"/v2/repository/models/{name}/{verb}"), b"{}")
        urllib.request.urlopen(request, timeout=SECONDS).close()
        ready = server.url(f"/v2/models/{name}/ready")
        deadline = time.monotonic() + SECONDS
        while _ok(ready) is not (verb == "load"):
            assert time.monotonic() < deadline
            threading.Event().wait(0.02)


def _ok(url: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(url, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return False
    return True


@pytest.fixture(params=["local", pytest.param("redis", marks=needs_redis)])
def changing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, ServerProcess]]:
    models = tmp_path / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    (models / "add" / "config.pbtxt").write_text(CACHED)
    save(models, "whole", (ENSEMBLE_CONFIG % ("add", CACHED)).replace("[ -1 ]", "[ 1 ]") + "max_batch_size: 4\n")
    if request.param == "local":
        options: tuple[str, ...] = ("--cache-config=local,size=1048576",)
    else:
        options = request.getfixturevalue("redis").options
    with ServerProcess(models, *options, "--model-control-mode=explicit", "--load-model=*") as server:
        yield models, server


@pytest.mark.parametrize("model", ["add", "whole"])
def test_a_model_that_was_changed_is_asked_again(changing: tuple[Path, ServerProcess], model: str) -> None:
    models, server = changing
    client = TritonHttp(server.http, binary=True)
    x = np.array([[41]], np.float32)
    for _ in range(3):
        assert client.infer(model, {"x": x}).outputs["y"].tolist() == [[42.0]]
    save_adder(models / "add" / "1" / "model.onnx", 2)
    reload(server, "add", 1)
    if model == "whole" and not _ok(server.url("/v2/models/whole/ready")):
        reload(server, "whole", 1)
    for _ in range(3):
        assert client.infer(model, {"x": x}).outputs["y"].tolist() == [[43.0]]
    client.close()


def test_the_local_cache_keeps_what_was_used_last(models: Path) -> None:
    with ServerProcess(
        models, "--cache-config=local,size=6000", "--model-control-mode=explicit", "--load-model=counter"
    ) as server:
        client = TritonHttp(server.http, binary=True)
        first, *others = [fresh(300) for _ in range(10)]  # 1,200 bytes each, and what an entry costs
        kept = run_of(ask(client, first))
        for other in others:
            ask(client, other)
            assert run_of(ask(client, first)) == kept
        before = stats(server)
        ask(client, others[0])
        assert gained(before, stats(server))["cache_miss"] == 1
        large = fresh(3000)
        assert run_of(ask(client, large)) != run_of(ask(client, large)), "larger than the cache"
        assert run_of(ask(client, first)) == kept, "and nothing had to go for it"
        assert "does not fit the response cache" in server.logs()
        client.close()


# A Redis that has troubles


@needs_redis
def test_two_servers_share_a_redis_and_a_restart_forgets_nothing(redis: Redis, models: Path) -> None:
    x = fresh()
    explicit = ("--model-control-mode=explicit", "--load-model=counter")
    with ServerProcess(models, *redis.options, *explicit) as one:
        client = TritonHttp(one.http, binary=True)
        settle(one, client, x)
        run = run_of(ask(client, x))
        client.close()
    with ServerProcess(models, *redis.options, *explicit) as two:
        client = TritonGrpc(two.grpc)
        assert run_of(ask(client, x)) == run
        assert counts(stats(two))["executions"] == 0
        client.close()


@needs_redis
def test_a_dead_redis_costs_runs_and_no_answers(models: Path) -> None:
    redis = Redis()
    explicit = ("--model-control-mode=explicit", "--load-model=counter")
    with ServerProcess(models, *redis.options, "--cache-config=redis,socket_timeout=300", *explicit) as server:
        client = TritonHttp(server.http, binary=True)
        x = fresh()
        assert run_of(ask(client, x)) == 1  # not there yet
        assert "models answer themselves until it works again" in server.logs()
        try:
            redis.start()
            settle(server, client, x)
            assert redis.process is not None
            redis.process.send_signal(signal.SIGSTOP)  # there, and silent
            for _ in range(3):
                ask(client, fresh())
            redis.process.send_signal(signal.SIGCONT)
            settle(server, client, x)
            assert redis.command("FLUSHALL") == b"+OK\r\n"
            settle(server, client, x)
            key = redis.command("KEYS", "*").split(b"\r\n")[2].decode()
            assert redis.command("SET", key, "nonsense") == b"+OK\r\n"
            ask(client, x)
            settle(server, client, x)
        finally:
            redis.stop()
        for _ in range(3):
            ask(client, fresh())
        found = counts(stats(server))
        assert found["fail"] == 0
        assert "Traceback" not in server.logs()
        assert server.stop() == 0
        client.close()


@needs_redis
def test_a_redis_with_a_password(models: Path) -> None:
    explicit = ("--model-control-mode=explicit", "--load-model=counter")
    with Redis("--requirepass", "sesame") as redis:
        environment = {**os.environ, "TRITONCACHE_REDIS_PASSWORD": "sesame"}
        with ServerProcess(models, *redis.options, *explicit, env=environment) as server:
            client = TritonHttp(server.http, binary=True)
            x = fresh()
            settle(server, client, x)
            assert counts(stats(server))["cache_hit"] >= 1
            assert "sesame" not in server.logs()
            client.close()


# Numbers, options


def metrics(server: ServerProcess) -> dict[str, float]:
    import urllib.request

    with urllib.request.urlopen(server.metrics_url, timeout=SECONDS) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}


def test_metrics_have_the_cache_and_each_model_that_asks_for_it(server: ServerProcess, client: Transport) -> None:
    x = fresh()
    settle(server, client, x)
    before = metrics(server)
    ask(client, x)
    ask(client, fresh())
    after = metrics(server)
    new = {name: after[name] - before.get(name, 0) for name in after if "cache" in name}
    counter = '{model="counter",version="1"}'
    assert new[f"nv_cache_num_hits_per_model{counter}"] == 1
    assert new[f"nv_cache_num_misses_per_model{counter}"] == 1
    assert new["nv_cache_num_hits"] == 1
    assert new["nv_cache_num_misses"] == 1
    assert new["nv_cache_num_lookups"] == 2
    assert new["nv_cache_num_evictions"] == 0
    assert {"nv_cache_lookup_duration", "nv_cache_insertion_duration"} <= set(new)
    assert 'nv_cache_num_hits_per_model{model="whole",version="1"}' in after
    assert 'nv_cache_num_hits_per_model{model="plain",version="1"}' not in after
    if "nv_cache_util" in after:
        assert new["nv_cache_num_entries"] == 1
        assert 0 < after["nv_cache_util"] < 1


def test_a_model_that_asks_where_there_is_no_cache_serves_and_says_so(models: Path) -> None:
    with ServerProcess(models, "--model-control-mode=explicit", "--load-model=counter") as server:
        client = TritonHttp(server.http, binary=True)
        x = fresh()
        assert run_of(ask(client, x)) != run_of(ask(client, x))
        assert "asks for a response cache, and the server has none" in server.logs()
        assert not [name for name in metrics(server) if "cache" in name]
        client.close()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("model_transaction_policy { decoupled: true }", "with 'decoupled' transaction policy"),
        ("sequence_batching { }", "with sequence batching scheduler"),
    ],
)
def test_models_that_cannot_be_kept_do_not_load(tmp_path: Path, config: str, text: str) -> None:
    save(tmp_path, "counter", COUNTER_CONFIG + config, COUNTER)
    with ServerProcess(tmp_path, "--cache-config=local,size=4096", "--exit-on-error=false", ready="live") as server:
        deadline = time.monotonic() + SECONDS
        while f"Response Cache does not currently support model counter {text}" not in server.logs():
            assert time.monotonic() < deadline, server.logs()
            threading.Event().wait(0.02)


def test_answers_in_order_though_one_is_at_hand(tmp_path: Path) -> None:
    """preserve_ordering: a hit waits for the request before it, which runs."""
    source = COUNTER.replace("answers = []", "answers = []\n        if any((pb_utils.get_input_tensor_by_name(r, 'x')"
                             ".as_numpy() == 77).any() for r in requests):\n            open(GATE).read()")  # fmt: skip
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    config = COUNTER_CONFIG.replace("dims: [ -1 ]", "dims: [ 3 ]") + (
        "max_batch_size: 4 dynamic_batching { preserve_ordering: true }"
    )
    save(tmp_path / "models", "counter", config, f"GATE = {str(gate)!r}\n{source}")
    with ServerProcess(tmp_path / "models", "--cache-config=local,size=1048576") as server:
        known, held = np.ones((1, 3), np.float32), np.full((1, 3), 77, np.float32)
        order: list[str] = []

        def answer(name: str, x: Any) -> None:
            client = TritonGrpc(server.grpc)
            ask(client, x)
            order.append(name)
            client.close()

        answer("before", known)
        first = threading.Thread(target=answer, args=("held", held))
        first.start()
        with gate.open("w"):  # the model has it open: it runs
            before = metrics(server)["nv_cache_num_hits"]
            second = threading.Thread(target=answer, args=("known", known))
            second.start()
            while metrics(server)["nv_cache_num_hits"] == before:
                threading.Event().wait(0.01)
            assert order == ["before"]
        first.join(SECONDS)
        second.join(SECONDS)
        assert sorted(order) == ["before", "held", "known"]


@needs_redis
@pytest.mark.parametrize(("name", "trusted"), [("localhost", True), ("other.example", False)])
def test_a_redis_behind_tls_must_have_the_name_asked_for(
    models: Path, tmp_path: Path, name: str, trusted: bool
) -> None:
    authority = Authority(tmp_path, "authority")
    cert, key = authority.issue("redis")
    redis = Redis("--port", "0", "--tls-auth-clients", "no", "--tls-cert-file", str(cert), "--tls-key-file", str(key))
    redis.start_with("--tls-port", str(redis.port), "--tls-ca-cert-file", str(authority.file))
    trust = (f"--cache-config=redis,cacert={authority.file}", f"--cache-config=redis,sni={name}")
    explicit = ("--model-control-mode=explicit", "--load-model=counter")
    try:
        with ServerProcess(models, *redis.options, *trust, *explicit) as server:
            client = TritonHttp(server.http, binary=True)
            x = fresh()
            if trusted:
                settle(server, client, x)
                assert counts(stats(server))["cache_hit"] >= 1, server.logs()
            else:
                assert run_of(ask(client, x)) != run_of(ask(client, x))
                assert "models answer themselves until it works again" in server.logs()
            client.close()
    finally:
        redis.stop()
