"""What must be shown, as a table, and whether a figure shows it. Knows no server and measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the report: two numbers and what their ratio should be."""

    scenario: str
    quantity: str  # with its unit
    doorstep: float
    other: float  # the peer's, or the limit itself where there is no peer
    other_name: str
    goal: float  # for doorstep / other
    at: Literal["least", "most"]
    low: float = 0.0  # the smallest and largest ratio of any round
    high: float = 0.0

    @property
    def ratio(self) -> float:
        return self.doorstep / self.other

    @property
    def met(self) -> bool:
        return self.ratio >= self.goal if self.at == "least" else self.ratio <= self.goal


@dataclass(frozen=True, slots=True)
class Goal:
    """`quantity` of a series, Doorstep's over `peer`'s, at least or at most `factor`."""

    peer: str
    quantity: Literal["rate", "p50_us", "cpu_us"]
    at: Literal["least", "most"]
    factor: float


UNITS = {"rate": "requests/s", "p50_us": "median latency, µs", "cpu_us": "CPU per request, µs", "MB/s": "MB/s"}

FRONT_END = (
    Goal("triton", "rate", "least", 2.5),
    Goal("triton", "cpu_us", "most", 1 / 3),
    Goal("mlserver", "rate", "least", 10),
)
ONE_CONNECTION = (Goal("triton", "p50_us", "most", 0.5),)
GRPC = (Goal("triton", "rate", "least", 2.0),)
BYTES_HTTP = (Goal("triton", "rate", "least", 1.5),)
BYTES_GRPC = (Goal("triton", "rate", "least", 1.0),)

PYTHON_LATENCY = (Goal("triton", "p50_us", "most", 2 / 3),)
PYTHON_RATE = (Goal("triton", "rate", "least", 1.5),)
PYTHON_BYTES = (Goal("triton", "rate", "least", 1.5),)

ONE_MLP = "one MLP"
CACHE_LATENCY = (Goal(ONE_MLP, "p50_us", "most", 1.3),)
CACHE_CPU = (Goal(ONE_MLP, "cpu_us", "most", 1.3),)
ENSEMBLE_LATENCY = (Goal(ONE_MLP, "p50_us", "most", 1.5),)
ENSEMBLE_RATE = (Goal(ONE_MLP, "rate", "least", 0.5),)

LLM_SHARE = 0.97  # of the tokens per second of the engine in process
LLM_FIRST_TOKEN_MS = 5
LLM_GAP = 3

MINILM_SHARE = 0.95
START_S = 1.0
IDLE_MB = 150
PACKAGES = 20
AGREEMENT = 0.05  # how far doorstep bench may be from wrk
STREAMED = 50_000  # small responses a second through one connection
SEQUENCES_FULL = 0.8  # of max_batch_size
