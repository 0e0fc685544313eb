"""The two variables with which tests of Triton hold its schedulers back until enough requests wait. Knows no queue.

They are read when a model is loaded.
"""

from __future__ import annotations

import os
import re


def scheduler_delay() -> int:
    """TRITONSERVER_DELAY_SCHEDULER: how many requests must be queued before the first batch of a model runs (dynamic
    batching; sequence batching with the strategy `direct`, where all of the model's slots count together)."""
    return _count("TRITONSERVER_DELAY_SCHEDULER")


def backlog_delay() -> int:
    """TRITONSERVER_BACKLOG_DELAY_SCHEDULER: how many requests of sequences without a slot must wait, beside what
    `scheduler_delay` asks for, before the first batch of a sequence model with the strategy `direct` runs."""
    return _count("TRITONSERVER_BACKLOG_DELAY_SCHEDULER")


def _count(variable: str) -> int:
    """As C's atoi reads it: what is no number is 0."""
    found = re.match(r"\s*\+?(\d+)", os.environ.get(variable, ""))
    return int(found[1]) if found else 0
