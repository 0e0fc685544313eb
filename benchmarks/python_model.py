"""A Python model, the same model.py and config.pbtxt in both servers: what a worker process's round trip costs."""

from __future__ import annotations

from benchmarks import goals
from benchmarks.common import Bench, bytes_of, check_grpc, check_http, grpc_run, http_run, series_of
from benchmarks.goals import Figure

NAMES = ("doorstep", "triton")


def python_small(bench: Bench) -> list[Figure]:
    """Identity of 16 floats."""
    body, message = bench.payloads.python_json, bench.payloads.python_grpc
    check_http(bench, NAMES, "python_small", body, 60)
    size = check_grpc(bench, NAMES, message)
    figures = []
    for connections, wanted in ((1, goals.PYTHON_LATENCY), (32, goals.PYTHON_RATE)):
        many = f"{connections} connection{'s' * (connections > 1)}"
        name = f"Python model, 16 floats, HTTP JSON, {many}"
        figures += series_of(bench, name, NAMES, http_run("python_small", body, connections), wanted)
        name = f"Python model, 16 floats, gRPC, {many}"
        figures += series_of(bench, name, NAMES, grpc_run(message, size, connections), wanted)
    return figures


def python_large(bench: Bench) -> list[Figure]:
    """Identity of 600 KB."""
    body, message = bench.payloads.image_binary, bench.payloads.python_image_grpc
    check_http(bench, NAMES, "python_large", body, 602_112)
    size = check_grpc(bench, NAMES, message)
    return [
        *bytes_of(
            bench, "Python model", "HTTP binary", goals.PYTHON_BYTES, lambda n: http_run("python_large", body, n)
        ),
        *bytes_of(bench, "Python model", "gRPC", goals.PYTHON_BYTES, lambda n: grpc_run(message, size, n)),
    ]
