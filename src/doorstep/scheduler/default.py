"""The scheduler of a model that does not ask for batching: each request runs alone. Knows what dynamic.py knows."""

from __future__ import annotations

from doorstep.scheduler.dynamic import DynamicBatchScheduler
from doorstep.scheduler.plan import BatchPolicy

ALONE = BatchPolicy(max_rows=0, together=False)


class DefaultScheduler(DynamicBatchScheduler):
    """The dynamic scheduler under the policy `ALONE`: the queue, the order and the endings are the same."""
