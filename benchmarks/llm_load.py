"""Users of a chat, each a thread with one conversation turn after another: tokens, first tokens, and the gaps between.

`python -m benchmarks.llm_load WHERE`, where WHERE is `http:PORT:MODEL` (streamed over HTTP) or
`engine:GGUF:SLOTS:THREADS`, which calls xllamacpp in this process: the engine that Doorstep runs, with nothing around
it. `listen:GGUF:SLOTS:THREADS:PORT` is the same and serves HTTP as well, by llama.cpp's own server.
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TOKENS = 64  # of each answer: none ends earlier
Ask = Callable[[dict[str, Any], "Tally"], None]  # (a chat's body, whose pieces are counted as they come)


def body(user: int, turn: int, tokens: int = TOKENS) -> dict[str, Any]:
    """Every prompt is another one, and of one length."""
    text = f"User {user:02d}, question {turn:04d}: tell me a story about a lighthouse."
    return {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "stream": True}  # fmt: skip


@dataclass
class Tally:
    """One user's."""

    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    _last: float = 0.0
    _is_first: bool = True

    def begin(self) -> None:
        self._last, self._is_first = time.perf_counter(), True

    def token(self) -> None:
        now = time.perf_counter()
        (self.first_s if self._is_first else self.gaps_s).append(now - self._last)
        self._last, self._is_first = now, False
        self.tokens += 1


def drive(ask: Ask, users: int, seconds: float) -> dict[str, float]:
    """Closed loop. What was begun within the time is finished, and counts with the time that it took."""
    tallies = [Tally() for _ in range(users)]
    begin = time.perf_counter()

    def user(number: int) -> None:
        turn = 0
        while time.perf_counter() - begin < seconds:
            ask(body(number, turn), tallies[number])
            turn += 1

    threads = [threading.Thread(target=user, args=(number,)) for number in range(users)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begin
    first = [s for tally in tallies for s in tally.first_s]
    gaps = sorted(s for tally in tallies for s in tally.gaps_s)
    return {
        "tokens_per_s": sum(tally.tokens for tally in tallies) / took,
        "first_ms": statistics.median(first) * 1000,
        "gap_ms": statistics.median(gaps) * 1000,
        "gap_p99_ms": gaps[int(len(gaps) * 0.99)] * 1000,
    }


def over_http(port: int, model: str) -> Ask:
    """Reads the events of a streamed chat with the standard library."""

    def ask(asked: dict[str, Any], tally: Tally) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        tally.begin()
        text = json.dumps({"model": model, **asked})
        connection.request("POST", "/v1/chat/completions", text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(answer.read().decode())
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:])["choices"]
                if choices and choices[0]["delta"].get("content"):
                    tally.token()
        connection.close()

    return ask


def engine(path: str, slots: int, threads: int, port: int = 0, batch: int = 64) -> Any:
    """xllamacpp with what Doorstep gives it."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = path
    p.n_parallel = slots
    p.n_ctx = 2048 * slots
    p.n_batch = p.n_ubatch = batch
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.cache_ram_mib = 256
    p.verbosity = -1
    p.offline = True
    p.ui = False
    p.fit_params = p.ctx_shift = False
    p.n_threads_http = slots + 4
    if port:
        p.hostnames, p.port = ["127.0.0.1"], port
    else:
        p.hostnames = [tempfile.mktemp(suffix=".sock")]
    return xllamacpp.Server(p)


def in_process(server: Any) -> Ask:
    def ask(asked: dict[str, Any], tally: Tally) -> None:
        def piece(chunk: dict[str, Any]) -> bool:
            choices = chunk.get("choices")
            if choices and choices[0]["delta"].get("content"):
                tally.token()
            return False

        tally.begin()
        server.handle_chat_completions(asked, piece)

    return ask


def main() -> None:
    """Each line of standard input is [users, seconds]; each line of output what came of it."""
    kind, *rest = sys.argv[1].split(":")
    if kind == "http":
        ask = over_http(int(rest[0]), rest[1])
    else:
        server = engine(rest[0], int(rest[1]), int(rest[2]), int(rest[3]) if kind == "listen" else 0)
        ask = in_process(server)
    ask(body(99, 0), Tally())  # warm
    print("ready", flush=True)
    for line in sys.stdin:
        users, seconds = json.loads(line)
        print(json.dumps(drive(ask, users, seconds)), flush=True)


if __name__ == "__main__":
    main()
