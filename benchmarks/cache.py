"""Answers from the response cache beside runs of an MLP, in the same server: what a hit costs."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks import goals, models
from benchmarks.common import Bench, check_http, http_run, series_of
from benchmarks.goals import Figure
from benchmarks.load import Load
from benchmarks.measure import Target
from doorstep.testing.server import ServerProcess

MODEL_OF = {"doorstep": "cached_mlp", goals.ONE_MLP: "mlp"}  # both targets are the same server


def cache(bench: Bench) -> list[Figure]:
    body = bench.payloads.mlp_json
    with (
        tempfile.TemporaryDirectory(prefix="doorstep-bench-") as folder,
        ServerProcess(models.cached_repository(Path(folder)), "--cache-config=local,size=1048576") as server,
    ):
        targets = {name: Target(name, server, server.http_port, server.grpc_port) for name in MODEL_OF}
        beside = replace(bench, targets=targets)
        for model in MODEL_OF.values():
            check_http(beside, ("doorstep",), model, body, 60)
        figures = []
        for connections, wanted in ((1, goals.CACHE_LATENCY), (32, goals.CACHE_CPU)):

            def run(target: Target, seconds: float, connections: int = connections) -> Load:
                return http_run(MODEL_OF[target.name], body, connections)(target, seconds)

            scenario = f"Response-cache hit, HTTP JSON, {connections} connection{'s' * (connections > 1)}"
            figures += series_of(beside, scenario, tuple(MODEL_OF), run, wanted)
    return figures
