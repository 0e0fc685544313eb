"""One measurement of one server: a load beside it, and what it cost. Knows no scenario.

A `Target` is a running server under a name; a `Sample` is what came of one run; a `Series` is runs of several targets
that alternated in one session.
"""

from __future__ import annotations

import statistics
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from benchmarks import procfs
from benchmarks.load import SERVICE_PATH, HttpBody, Load
from doorstep.testing.server import ManagedProcess

WARM_UP_S = 1.0


@dataclass(slots=True)
class Target:
    """A server under measurement."""

    name: str
    process: ManagedProcess
    http_port: int
    grpc_port: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: requests per second, latency in µs, CPU in µs per request (server and its children)."""

    rate: float
    p50_us: float
    p99_us: float
    cpu_us: float


@dataclass(slots=True)
class Series:
    """Samples by target, in the order they were taken."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def median(self, target: str, of: str) -> float:
        return float(statistics.median(getattr(sample, of) for sample in self.samples[target]))


Run = Callable[[Target, float], Load]  # (target, seconds) → what came of it


def alternate(targets: list[Target], run: Run, *, seconds: float, rounds: int) -> Series:
    """A B A B …: one short run of each to warm up, then `rounds` measured runs of each, turn about."""
    series = Series({target.name: [] for target in targets})
    for target in targets:
        run(target, WARM_UP_S)
    for _ in range(rounds):
        for target in targets:
            series.samples[target.name].append(measure(target, run, seconds))
    return series


def measure(target: Target, run: Run, seconds: float) -> Sample:
    before = procfs.cpu_seconds(target.process.pid)
    load = run(target, seconds)
    spent = procfs.cpu_seconds(target.process.pid) - before
    return Sample(load.rate, load.p50_us, load.p99_us, spent * 1e6 / load.requests)


def post_once(port: int, path: str, body: HttpBody) -> bytes:
    """The answer to one request; raises where it is not 200. What is measured is checked first."""
    headers = {"Content-Type": body.content_type}
    if body.json_length is not None:
        headers["Inference-Header-Content-Length"] = str(body.json_length)
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body.path.read_bytes(), headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return bytes(response.read())
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path}: {error.code} {error.read()[:500]!r}") from error


def call_once(port: int, framed: bytes) -> bytes:
    """The answer to one gRPC message (its 5-byte prefix is cut off); raises grpc.RpcError where it is not OK."""
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        return bytes(channel.unary_unary(SERVICE_PATH)(framed[5:], timeout=30))
