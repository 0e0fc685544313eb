"""What a piece of an answer counts for, as numbers beside it: whoever keeps statistics need not read the piece.

Taken off before a response leaves the server. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from doorstep.backends.llm.job import COUNTS, Delta
from doorstep.types import INT64, Tensor

FINISHES = ("", "stop", "length", "tool_calls")


class Counts(NamedTuple):
    """-1: not known yet."""

    tokens: int  # that this piece stands for
    prompt: int
    cached: int
    completion: int  # in all; with the last piece
    prefill_us: int
    decode_us: int
    finish: int  # an index of FINISHES
    kv_ppm: int  # how full the engine's KV cache is, in millionths


def counts_tensor(delta: Delta, kv_usage: float) -> Tensor:
    usage = delta.usage
    finish = FINISHES.index(delta.finish) if delta.finish in FINISHES else 1
    if usage is None:
        numbers = (delta.tokens, -1, -1, -1, -1, -1, finish, round(kv_usage * 1e6))
    else:
        completion = usage.completion if delta.finish else -1
        numbers = (delta.tokens, usage.prompt, usage.cached, completion, usage.prefill_us, usage.decode_us, finish,
                   round(kv_usage * 1e6))  # fmt: skip
    return Tensor(COUNTS, INT64, np.array(numbers, np.int64))


def split_counts(outputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Counts | None]:
    """The outputs without the counts, and the counts."""
    if not outputs or outputs[-1].name != COUNTS:
        return outputs, None
    return outputs[:-1], Counts(*outputs[-1].array.tolist())
