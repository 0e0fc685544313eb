"""Sends every case to a server, in order, and gathers its answers. Judges nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import grpc

from . import (
    cache_cases,
    ensemble_cases,
    grpc_cases,
    http_binary_cases,
    http_control_cases,
    http_infer_cases,
    http_option_cases,
    sequence_cases,
    settings_cases,
)
from .repository import LOADED, write_repository
from .wire import Answer, GrpcCase, HttpCase, normal, send_grpc, send_http

Case = HttpCase | GrpcCase
DEATH_S = 3.0  # how long a server that dropped a connection may take to turn out dead


@dataclass(frozen=True, slots=True)
class Run:
    """One server's life: how it is started and what it is asked."""

    name: str
    options: tuple[str, ...]
    models: tuple[str, ...] | None
    cases: tuple[Case, ...]


RUNS = (
    Run(
        "explicit",
        ("--model-control-mode=explicit", *(f"--load-model={name}" for name in LOADED)),
        None,
        (
            *http_infer_cases.CASES,
            *http_option_cases.CASES,
            *http_binary_cases.CASES,
            *http_control_cases.CASES,
            *grpc_cases.CASES,
        ),
    ),
    Run("none", (), ("multi",), (*http_control_cases.MODE_CASES, *grpc_cases.MODE_CASES)),
    Run(
        "poll",
        ("--model-control-mode=poll", "--repository-poll-secs=2"),
        ("multi",),
        (*http_control_cases.MODE_CASES, *grpc_cases.MODE_CASES),
    ),
    Run("ensembles", ensemble_cases.OPTIONS, tuple(ensemble_cases.MODELS), tuple(ensemble_cases.CASES)),
    Run("cache", cache_cases.OPTIONS, tuple(cache_cases.MODELS), cache_cases.CASES),
    Run("settings", settings_cases.OPTIONS, ("multi",), tuple(settings_cases.CASES)),
    Run("sequences", ("--exit-timeout-secs=1",), tuple(sequence_cases.MODELS), sequence_cases.CASES),
)


class Server(Protocol):
    """What `doorstep.testing.ServerProcess` and `benchmarks.peers.triton.TritonProcess` have in common."""

    http_port: int
    grpc: str

    @property
    def running(self) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: Any) -> None: ...


StartServer = Callable[[Path, Sequence[str]], Server]


def identifier(run: Run, case: Case) -> str:
    """What a case is called in recordings and tables: `grpc explicit ModelInfer: raw`."""
    return f"{'grpc' if isinstance(case, GrpcCase) else 'http'} {run.name} {case.name}"


def gather(start: StartServer, folder: Path, skip: Iterable[str] = ()) -> dict[str, Answer]:
    """Every answer by its case's identifier. Cases in `skip` are not sent."""
    left_out = set(skip)
    answers: dict[str, Answer] = {}
    for run in RUNS:
        repository = write_repository(folder / run.name, run.models)
        todo = [case for case in run.cases if identifier(run, case) not in left_out]
        while todo:
            with start(repository, run.options) as server, grpc.insecure_channel(server.grpc) as channel:
                while todo:
                    case = todo.pop(0)
                    answer = _send(server, channel, case)
                    died = _lost(answer) and _dies(server)
                    answers[identifier(run, case)] = {"crash": True} if died else normal(answer, repository)
                    if died:
                        break
    return answers


def _send(server: Server, channel: grpc.Channel, case: Case) -> Answer:
    return send_grpc(channel, case) if isinstance(case, GrpcCase) else send_http(server.http_port, case)


def _lost(answer: Answer) -> bool:
    """Whether the answer looks as if the server had gone away."""
    lost_call = answer.get("code") == "UNAVAILABLE" and (
        "closed" in answer["details"] or "connect" in answer["details"]
    )
    return "closed" in answer or lost_call


def _dies(server: Server) -> bool:
    deadline = time.monotonic() + DEATH_S
    while server.running and time.monotonic() < deadline:
        time.sleep(0.1)  # there is nothing to wait on: a server that writes its last words is still running
    return not server.running
