"""A language model served, beside its engine called in process: what streaming over HTTP costs. SmolLM2-135M, CPU.

`python -m benchmarks --only llm`. Users are closed loops: each asks, reads 64 tokens as they come, and asks again. The
engine in process has the same slots, threads and batch; llama.cpp's own server is that engine's listener.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.common import Bench
from benchmarks.goals import Figure
from benchmarks.llm_load import Tally, body, over_http
from doorstep.demo.build import LANGUAGE_MODEL
from doorstep.demo.fetch import cache_directory, fetch
from doorstep.testing.server import ServerProcess

ROOT = Path(__file__).resolve().parents[1]
SLOTS = 8
USERS = (1, 4, 8)
# A core for the server and the load, as Doorstep itself leaves one.
THREADS = max(len(os.sched_getaffinity(0)) - 1, 1)
CONFIG = f"""
parameters {{ key: "slots" value {{ string_value: "{SLOTS}" }} }}
parameters {{ key: "threads" value {{ string_value: "{THREADS}" }} }}
parameters {{ key: "context_size" value {{ string_value: "2048" }} }}
"""


def llm(bench: Bench) -> list[Figure]:
    cache = cache_directory() / "demo"
    fetch(LANGUAGE_MODEL, cache)
    model = cache / LANGUAGE_MODEL.members[0].keep_as
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "smol"
        (place / "1").mkdir(parents=True)
        (place / "1" / "model.gguf").symlink_to(model)
        (place / "config.pbtxt").write_text(CONFIG)
        with ServerProcess(place.parent) as server:
            where = f"http:{server.http_port}:smol"
            figures = _throughput(bench, model, where)
            figures += _prefix(server)
            figures += _beside_a_long_prompt(server)
    return figures


class _Load:
    """A process of llm_load."""

    def __init__(self, where: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.llm_load", where], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", where

    def measure(self, users: int, seconds: float) -> dict[str, float]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([users, seconds]) + "\n")
        process.stdin.flush()
        found: dict[str, float] = json.loads(process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def _loads(*wheres: str) -> Iterator[list[_Load]]:
    loads: list[_Load] = []
    try:
        for where in wheres:
            loads.append(_Load(where))  # noqa: PERF401 (known where the next one fails)
        yield loads
    finally:
        for load in reversed(loads):
            load.close()


def _throughput(bench: Bench, model: Path, ours: str) -> list[Figure]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    figures = []
    engine, listen = f"engine:{model}:{SLOTS}:{THREADS}", f"listen:{model}:{SLOTS}:{THREADS}:{port}"
    with _loads(ours, engine, listen, f"http:{port}:any") as (mine, bare, _, theirs):
        for users in USERS:
            found: dict[str, list[dict[str, float]]] = {"mine": [], "bare": [], "theirs": []}
            for _ in range(bench.plan.rounds):
                found["mine"].append(mine.measure(users, bench.plan.seconds))
                found["bare"].append(bare.measure(users, bench.plan.seconds))
                found["theirs"].append(theirs.measure(users, bench.plan.seconds))
            name = f"SmolLM2 chat streamed over HTTP, {users} user{'s' if users > 1 else ''}"
            figures.append(_ratio(name, found, "bare", "engine", goals.LLM_SHARE))
            figures.append(_ratio(name, found, "theirs", "llama.cpp", 1))
            if users == 1:
                added = [a["first_ms"] - b["first_ms"] for a, b in zip(found["mine"], found["bare"], strict=True)]
                limit = goals.LLM_FIRST_TOKEN_MS
                figures.append(
                    Figure(name, "ms added to the first token", statistics.median(added), limit, "limit", 1, "most",
                           min(added) / limit, max(added) / limit)
                )  # fmt: skip
    return figures


def _ratio(name: str, found: dict[str, list[dict[str, float]]], other: str, other_name: str, goal: float) -> Figure:
    mine = [one["tokens_per_s"] for one in found["mine"]]
    others = [one["tokens_per_s"] for one in found[other]]
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    return Figure(
        name, "tokens/s", statistics.median(mine), statistics.median(others), other_name, goal, "least",
        min(ratios), max(ratios),
    )  # fmt: skip


def _prefix(server: ServerProcess) -> list[Figure]:
    """A prompt of some 900 tokens, asked twice: how much of it is worked off again."""
    text = " ".join(f"Line {n} of the report says that the tide came in at {n % 24} o'clock." for n in range(45))
    times, cached, total = [], 0, 0
    for _ in range(2):
        asked = {"model": "smol", "max_tokens": 1, "messages": [{"role": "user", "content": text}]}
        start = time.perf_counter()
        said = _post(server.http_port, asked)
        times.append(time.perf_counter() - start)
        usage = said["usage"]
        total, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    name = f"a prompt of {total} tokens for the second time"
    return [
        Figure(name, "tokens out of the cache", cached, total, "all", 0.95, "least", cached / total, cached / total),
        Figure(name, "ms to its answer", times[1] * 1000, times[0] * 1000, "first", 0.25, "most",
               times[1] / times[0], times[1] / times[0]),
    ]  # fmt: skip


def _beside_a_long_prompt(server: ServerProcess) -> list[Figure]:
    """A short chat while somebody's long prompt is worked off: the longest gaps between its tokens."""
    tally = Tally()
    ask = over_http(server.http_port, "smol")
    done = threading.Event()

    def long_prompts() -> None:
        turn = 0
        while not done.is_set():
            text = f"{turn} " + " ".join(f"word{n}" for n in range(500))
            _post(server.http_port, {"model": "smol", "max_tokens": 1, "messages": [{"role": "user", "content": text}]})
            turn += 1

    thread = threading.Thread(target=long_prompts)
    thread.start()
    for turn in range(3):
        ask(body(7, turn, tokens=32), tally)
    done.set()
    thread.join()
    gaps = sorted(tally.gaps_s)
    p99, median = gaps[int(len(gaps) * 0.99)], statistics.median(gaps)
    return [
        Figure("a chat beside prompts of 1,500 tokens", "p99 between tokens, ms", p99 * 1000, median * 1000,
               "median", goals.LLM_GAP, "most", p99 / median, p99 / median)
    ]  # fmt: skip


def _post(port: int, asked: dict[str, Any]) -> Any:
    import urllib.request

    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
