"""Load generators: wrk over HTTP/1.1, h2load over HTTP/2 for gRPC. One process each, beside the server. Knows no model.

Both are closed loops: a connection sends its next request when the last one is answered. A run with a failed request
raises.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

LUA = Path(__file__).with_name("lua") / "post.lua"
SERVICE_PATH = "/inference.GRPCInferenceService/ModelInfer"
WINDOW_BITS = 24  # HTTP/2 receive windows of h2load: 16 MB, so that flow control of the client is not what is measured


class LoadFailed(RuntimeError):
    """The generator ended badly, or a request of its run failed."""


@dataclass(frozen=True, slots=True)
class Load:
    """What came of one run."""

    requests: int
    seconds: float
    p50_us: float
    p99_us: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


@dataclass(frozen=True, slots=True)
class HttpBody:
    """A request body in a file, and the headers that go with it."""

    path: Path
    content_type: str = "application/json"
    json_length: int | None = None  # Inference-Header-Content-Length


def wrk(port: int, path: str, body: HttpBody, *, connections: int, seconds: float) -> Load:
    """POSTs `body` in a closed loop over `connections` keep-alive connections."""
    env = {**os.environ, "BODY": str(body.path), "CONTENT_TYPE": body.content_type}
    if body.json_length is not None:
        env["JSON_LENGTH"] = str(body.json_length)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(LUA)]
    done = subprocess.run(
        [*command, f"http://127.0.0.1:{port}{path}"], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise LoadFailed(f"wrk ended with {done.returncode}: {done.stderr or done.stdout}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["errors"] or not found["requests"]:
        raise LoadFailed(f"wrk: {found['errors']} failed requests of {found['requests']}: {done.stdout}")
    return Load(found["requests"], found["seconds"], found["p50_us"], found["p99_us"])


def h2load(
    port: int,
    message: Path,
    *,
    answer_bytes: int,
    connections: int,
    seconds: float,
    streams: int = 1,
    path: str = SERVICE_PATH,
) -> Load:
    """Calls ModelInfer, or the method at `path`, with the gRPC message in `message` (its 5-byte prefix included),
    `streams` at once a connection.

    h2load sees HTTP's status, not gRPC's, but an error has no message: `answer_bytes` a request must have come back.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [
            "h2load",
            "-t1",
            f"-c{connections}",
            f"-m{streams}",
            f"-D{max(1, round(seconds))}",
            f"-w{WINDOW_BITS}",
            f"-W{WINDOW_BITS}",
            f"-d{message}",
            f"--log-file={log}",
            "-Hcontent-type: application/grpc",
            "-Hte: trailers",
            f"http://127.0.0.1:{port}{path}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LoadFailed(f"h2load ended with {done.returncode}: {done.stderr or done.stdout}")
        # start of the request in µs since the epoch, HTTP status, µs until its last byte
        rows = [line.split("\t") for line in log.read_text().splitlines()]
    failed = re.search(r"requests: .* (\d+) failed, (\d+) errored", done.stdout)
    data = re.search(r"traffic: .*\((\d+)\) data", done.stdout)
    if failed is None or data is None or failed.group(1) != "0" or any(row[1] != "200" for row in rows) or not rows:
        raise LoadFailed(f"h2load: {done.stdout}")
    if int(data.group(1)) < 0.95 * answer_bytes * len(rows):
        raise LoadFailed(f"h2load: {data.group(1)} bytes for {len(rows)} answers of {answer_bytes}: {done.stdout}")
    took = sorted(int(row[2]) for row in rows)
    first = min(int(row[0]) for row in rows)
    last = max(int(row[0]) + int(row[2]) for row in rows)
    return Load(len(rows), (last - first) / 1e6, statistics.median(took), took[int(len(took) * 0.99)])
