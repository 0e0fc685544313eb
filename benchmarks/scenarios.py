"""What is measured, one function a scenario, each giving the figures of its lines in the report. Knows no report.

A scenario is checked (the request is answered, and rightly shaped) before it is measured.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bare, goals, models, procfs
from benchmarks.goals import Figure, Goal
from benchmarks.load import HttpBody, Load, h2load, wrk
from benchmarks.measure import Run, Series, Target, alternate, call_once, measure, post_once
from benchmarks.payloads import Payloads
from doorstep.testing.server import ServerProcess, doorstep_command

ROOT = Path(__file__).resolve().parents[1]
INFER = "/v2/models/{}/infer"
IMAGE_MB = 4 * 3 * 224 * 224 * 2 / 1e6  # in and out again


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often."""

    seconds: float = 5.0
    rounds: int = 3


@dataclass(frozen=True, slots=True)
class Bench:
    """The servers that run, and what they are sent."""

    targets: dict[str, Target]  # by name; "doorstep" is one of them
    payloads: Payloads
    plan: Plan
    raw: dict[str, Series]  # every sample of every scenario, for the JSON


def _series(bench: Bench, scenario: str, names: tuple[str, ...], run: Run, wanted: tuple[Goal, ...]) -> list[Figure]:
    targets = [bench.targets[name] for name in names if name in bench.targets]
    series = bench.raw[scenario] = alternate(targets, run, seconds=bench.plan.seconds, rounds=bench.plan.rounds)
    return [_figure(scenario, series, goal) for goal in wanted if goal.peer in series.samples]


def _figure(scenario: str, series: Series, goal: Goal) -> Figure:
    ours, theirs = series.samples["doorstep"], series.samples[goal.peer]
    ratios = [getattr(a, goal.quantity) / getattr(b, goal.quantity) for a, b in zip(ours, theirs, strict=True)]
    return Figure(
        scenario,
        goals.UNITS[goal.quantity],
        series.median("doorstep", goal.quantity),
        series.median(goal.peer, goal.quantity),
        goal.peer,
        goal.factor,
        goal.at,
        min(ratios),
        max(ratios),
    )


def _http(model: str, body: HttpBody, connections: int) -> Run:
    def run(target: Target, seconds: float) -> Load:
        return wrk(target.http_port, INFER.format(model), body, connections=connections, seconds=seconds)

    return run


def _grpc(message: Path, answer_bytes: int, connections: int, streams: int = 1) -> Run:
    def run(target: Target, seconds: float) -> Load:
        return h2load(
            target.grpc_port,
            message,
            answer_bytes=answer_bytes,
            connections=connections,
            seconds=seconds,
            streams=streams,
        )

    return run


def _check(bench: Bench, names: tuple[str, ...], model: str, body: HttpBody, least: int) -> None:
    for name in names:
        if name in bench.targets:
            answer = post_once(bench.targets[name].http_port, INFER.format(model), body)
            assert len(answer) >= least, f"{name} answers {model} with {answer[:200]!r}"


def _check_grpc(bench: Bench, names: tuple[str, ...], message: Path) -> int:
    """The length of the shortest answer."""
    framed = message.read_bytes()
    return min(len(call_once(bench.targets[name].grpc_port, framed)) for name in names if name in bench.targets)


def mlp_json(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton", "mlserver")
    body = bench.payloads.mlp_json
    _check(bench, names, "mlp", body, 60)
    return [
        *_series(bench, "MLP, HTTP JSON, 32 connections", names, _http("mlp", body, 32), goals.FRONT_END),
        *_series(bench, "MLP, HTTP JSON, 1 connection", names, _http("mlp", body, 1), goals.ONE_CONNECTION),
    ]


def mlp_binary(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton")  # MLServer has no binary extension over HTTP
    body = bench.payloads.mlp_binary
    _check(bench, names, "mlp", body, 60)
    return [
        *_series(bench, "MLP, HTTP binary, 32 connections", names, _http("mlp", body, 32), goals.FRONT_END),
        *_series(bench, "MLP, HTTP binary, 1 connection", names, _http("mlp", body, 1), goals.ONE_CONNECTION),
    ]


def mlp_grpc(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton", "mlserver")
    message = bench.payloads.mlp_grpc
    size = _check_grpc(bench, names, message)
    return [
        *_series(bench, "MLP, gRPC, 32 connections", names, _grpc(message, size, 32), goals.GRPC),
        *_series(bench, "MLP, gRPC, 1 connection of 32 streams", names, _grpc(message, size, 1, 32), goals.GRPC),
        *_series(bench, "MLP, gRPC, 1 connection", names, _grpc(message, size, 1), goals.ONE_CONNECTION),
    ]


def image_http(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton")
    body = bench.payloads.image_binary
    _check(bench, names, "identity", body, 602_112)
    return _bytes(bench, "HTTP binary", goals.BYTES_HTTP, lambda n: _http("identity", body, n))


def image_grpc(bench: Bench) -> list[Figure]:
    message = bench.payloads.image_grpc
    size = _check_grpc(bench, ("doorstep", "triton"), message)
    assert size > 602_112, f"an answer of {size} bytes"
    return _bytes(bench, "gRPC", goals.BYTES_GRPC, lambda n: _grpc(message, size, n))


def _bytes(bench: Bench, protocol: str, wanted: tuple[Goal, ...], run: Callable[[int], Run]) -> list[Figure]:
    figures = []
    for connections in (1, 16):
        scenario = f"identity [1,3,224,224] FP32, {protocol}, {connections} connection{'s' * (connections > 1)}"
        for f in _series(bench, scenario, ("doorstep", "triton"), run(connections), wanted):
            ours, theirs = f.doorstep * IMAGE_MB, f.other * IMAGE_MB
            figures.append(
                Figure(scenario, "MB/s, in and out", ours, theirs, f.other_name, f.goal, f.at, f.low, f.high)
            )
    return figures


def minilm(bench: Bench) -> list[Figure]:
    """16 connections and dynamic batching against the bare loop at its best batch size, turn about."""
    with tempfile.TemporaryDirectory() as folder:
        repository = models.minilm_repository(Path(folder))
        model = repository / "minilm" / "1" / "model.onnx"
        rates = {batch: bare.run(model, batch, bench.plan.seconds / 2) for batch in bare.BATCH_SIZES}
        best = max(rates, key=lambda batch: rates[batch])
        with ServerProcess(repository) as server:
            target = Target("doorstep", server, server.http_port, server.grpc_port)
            body = bench.payloads.minilm_binary
            assert len(post_once(server.http_port, INFER.format("minilm"), body)) > models.TOKENS * 384 * 4
            run = _http("minilm", body, 16)
            run(target, 1.0)
            scenario = f"MiniLM int8, {models.TOKENS} tokens, 16 connections (limit: bare loop, batch {best})"
            series = bench.raw[scenario] = Series({"doorstep": []})
            limit = []
            for _ in range(bench.plan.rounds):
                series.samples["doorstep"].append(measure(target, run, bench.plan.seconds))
                limit.append(bare.run(model, best, bench.plan.seconds))
    ours = series.median("doorstep", "rate")
    ratios = [sample.rate / rate for sample, rate in zip(series.samples["doorstep"], limit, strict=True)]
    return [
        Figure(
            scenario,
            "sentences/s",
            ours,
            statistics.median(limit),
            "onnxruntime",
            goals.MINILM_SHARE,
            "least",
            min(ratios),
            max(ratios),
        )
    ]


def start_up(bench: Bench) -> list[Figure]:
    """From the creation of the process to its first answer; and what it holds when idle."""
    took, held = [], []
    with tempfile.TemporaryDirectory() as folder:
        repository = models.bare_repository(Path(folder))
        for _ in range(bench.plan.rounds + 2):
            server = ServerProcess(repository)
            server.launch()
            try:
                took.append(_first_answer(server, bench.payloads.mlp_json))
                server.wait_ready()
                time.sleep(1.0)  # let it settle: what it holds a second later is what it holds idle
                held.append(procfs.resident_bytes(server.pid) / 1e6)
                server.stop()
            finally:
                server.kill()
                server.log_path.unlink(missing_ok=True)
    scenario = "one ONNX model without a config"
    return [
        Figure(
            scenario, "s from start to first answer", statistics.median(took), goals.START_S, "limit", 1, "most",
            min(took), max(took),
        ),
        Figure(
            scenario, "MB resident when idle", statistics.median(held), goals.IDLE_MB, "limit", 1, "most",
            min(held) / goals.IDLE_MB, max(held) / goals.IDLE_MB,
        ),
    ]  # fmt: skip


def _first_answer(server: ServerProcess, body: HttpBody) -> float:
    payload = body.path.read_bytes()
    head = f"POST {INFER.format('mlp')} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    while True:
        try:
            with socket.create_connection(("127.0.0.1", server.http_port), timeout=5) as sock:
                sock.sendall(head.encode() + payload)
                if sock.recv(65_536).startswith(b"HTTP/1.1 200"):
                    return (time.monotonic_ns() - server.started_ns) / 1e9
        except ConnectionError:
            pass
        assert server.running, f"the server ended: {server.logs()}"
        assert time.monotonic_ns() - server.started_ns < 60e9, f"no answer in 60 s: {server.logs()}"
        time.sleep(0.005)


def agreement(bench: Bench) -> list[Figure]:
    """`doorstep bench` beside wrk on one server, turn about: before its figures are quoted they must be wrk's."""
    target = bench.targets["doorstep"]
    run = _http("mlp", bench.payloads.mlp_json, 32)
    run(target, 1.0)
    by_wrk, by_bench = [], []
    for _ in range(bench.plan.rounds):
        by_wrk.append(run(target, bench.plan.seconds).rate)
        by_bench.append(_doorstep_bench(target, bench.plan.seconds))
    ratios = [a / b for a, b in zip(by_bench, by_wrk, strict=True)]
    ours, theirs = statistics.median(by_bench), statistics.median(by_wrk)
    return [
        Figure(
            "doorstep bench, MLP, HTTP JSON, 32 connections",
            "requests/s",
            ours,
            theirs,
            "wrk",
            # The bound on the side where it lies: within 5 % above as below.
            1 + goals.AGREEMENT if ours > theirs else 1 - goals.AGREEMENT,
            "most" if ours > theirs else "least",
            min(ratios),
            max(ratios),
        )
    ]


def _doorstep_bench(target: Target, seconds: float) -> float:
    """Requests per second, as `doorstep bench` counts them."""
    command = [*doorstep_command(), "bench", "mlp", f"--url=http://127.0.0.1:{target.http_port}", "--connections=32"]
    options = [f"--duration={seconds}", "--quiet", "--json=-"]
    found = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return float(json.loads(found.stdout)["requests_per_second"])


def install(bench: Bench) -> list[Figure]:
    """The packages of a clean install, counted as pip counts them (pip itself left out)."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", str(ROOT)], check=True)
        listed = subprocess.run([*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    names = {line.split("==")[0].lower() for line in listed.splitlines()} - {"pip", "setuptools", "wheel"}
    return [Figure("core install", "packages", len(names), goals.PACKAGES, "limit", 1, "most", 1, 1)]


SCENARIOS: dict[str, Callable[[Bench], list[Figure]]] = {
    "mlp-json": mlp_json,
    "mlp-binary": mlp_binary,
    "mlp-grpc": mlp_grpc,
    "image-http": image_http,
    "image-grpc": image_grpc,
    "minilm": minilm,
    "start-up": start_up,
    "install": install,
    "agreement": agreement,
}
PEERLESS = {"minilm", "start-up", "install"}  # these start what they need themselves
