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
from pathlib import Path

from benchmarks import bare, goals, models, procfs
from benchmarks.cache import cache
from benchmarks.common import (
    INFER,
    Bench,
    Plan,
    bytes_of,
    check_grpc,
    check_http,
    grpc_run,
    http_run,
    series_of,
)
from benchmarks.ensemble import ensemble
from benchmarks.goals import Figure
from benchmarks.llm import llm
from benchmarks.load import HttpBody
from benchmarks.measure import Series, Target, measure, post_once
from benchmarks.python_model import python_large, python_small
from benchmarks.sequences import sequences
from benchmarks.streaming import streaming
from doorstep.testing.server import ServerProcess, doorstep_command

ROOT = Path(__file__).resolve().parents[1]


def mlp_json(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton", "mlserver")
    body = bench.payloads.mlp_json
    check_http(bench, names, "mlp", body, 60)
    return [
        *series_of(bench, "MLP, HTTP JSON, 32 connections", names, http_run("mlp", body, 32), goals.FRONT_END),
        *series_of(bench, "MLP, HTTP JSON, 1 connection", names, http_run("mlp", body, 1), goals.ONE_CONNECTION),
    ]


def mlp_binary(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton")  # MLServer has no binary extension over HTTP
    body = bench.payloads.mlp_binary
    check_http(bench, names, "mlp", body, 60)
    return [
        *series_of(bench, "MLP, HTTP binary, 32 connections", names, http_run("mlp", body, 32), goals.FRONT_END),
        *series_of(bench, "MLP, HTTP binary, 1 connection", names, http_run("mlp", body, 1), goals.ONE_CONNECTION),
    ]


def mlp_grpc(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton", "mlserver")
    message = bench.payloads.mlp_grpc
    size = check_grpc(bench, names, message)
    return [
        *series_of(bench, "MLP, gRPC, 32 connections", names, grpc_run(message, size, 32), goals.GRPC),
        *series_of(bench, "MLP, gRPC, 1 connection of 32 streams", names, grpc_run(message, size, 1, 32), goals.GRPC),
        *series_of(bench, "MLP, gRPC, 1 connection", names, grpc_run(message, size, 1), goals.ONE_CONNECTION),
    ]


def image_http(bench: Bench) -> list[Figure]:
    names = ("doorstep", "triton")
    body = bench.payloads.image_binary
    check_http(bench, names, "identity", body, 602_112)
    return bytes_of(bench, "identity", "HTTP binary", goals.BYTES_HTTP, lambda n: http_run("identity", body, n))


def image_grpc(bench: Bench) -> list[Figure]:
    message = bench.payloads.image_grpc
    size = check_grpc(bench, ("doorstep", "triton"), message)
    assert size > 602_112, f"an answer of {size} bytes"
    return bytes_of(bench, "identity", "gRPC", goals.BYTES_GRPC, lambda n: grpc_run(message, size, n))


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
            run = http_run("minilm", body, 16)
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
    run = http_run("mlp", bench.payloads.mlp_json, 32)
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


__all__ = ["PEERLESS", "SCENARIOS", "Bench", "Plan"]

SCENARIOS: dict[str, Callable[[Bench], list[Figure]]] = {
    "mlp-json": mlp_json,
    "mlp-binary": mlp_binary,
    "mlp-grpc": mlp_grpc,
    "image-http": image_http,
    "image-grpc": image_grpc,
    "python-small": python_small,
    "python-large": python_large,
    "ensemble": ensemble,
    "cache": cache,
    "streaming": streaming,
    "sequences": sequences,
    "minilm": minilm,
    "llm": llm,
    "start-up": start_up,
    "install": install,
    "agreement": agreement,
}
# These start what they need themselves.
PEERLESS = {"ensemble", "cache", "streaming", "sequences", "minilm", "llm", "start-up", "install"}
