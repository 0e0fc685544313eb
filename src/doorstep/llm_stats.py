"""Numbers of one language model: tokens, and the times that matter to who reads along. Knows no engine and no protocol.

Written only from the event loop, read from anywhere. What each means is in docs/observability.md; the phases are vLLM's
(queue, prefill, decode, inference), so that they can be shown under its names as well.
"""

from __future__ import annotations

from doorstep.stats import Histogram

# Seconds: a first token may take milliseconds or minutes, a next one a millisecond or a second (vLLM's buckets).
FIRST_TOKEN_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
NEXT_TOKEN_BUCKETS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
PHASE_BUCKETS_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
)  # fmt: skip
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
FINISHES = ("stop", "length", "tool_calls", "abort", "error")
REJECTIONS = ("queue_full", "timeout", "stopping")


class LLMStatistics:
    def __init__(self, slots: int, context_size: int) -> None:
        self.slots = slots  # of all instances
        self.context_size = context_size
        self.running = 0
        self.kv_usage = 0.0  # 0 to 1; of the instance that said something last
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.finished = dict.fromkeys(FINISHES, 0)
        self.rejected = dict.fromkeys(REJECTIONS, 0)  # requests that never had a slot
        self.first_token_s = Histogram(FIRST_TOKEN_BUCKETS_S)
        self.next_token_s = Histogram(NEXT_TOKEN_BUCKETS_S)
        self.queue_s = Histogram(PHASE_BUCKETS_S)
        self.prefill_s = Histogram(PHASE_BUCKETS_S)
        self.decode_s = Histogram(PHASE_BUCKETS_S)
        self.inference_s = Histogram(PHASE_BUCKETS_S)
        self.end_to_end_s = Histogram(PHASE_BUCKETS_S)
        self.request_prompt_tokens = Histogram(TOKEN_BUCKETS)
        self.request_generated_tokens = Histogram(TOKEN_BUCKETS)

    def reject(self, reason: str) -> None:
        self.rejected[reason] += 1


class Progress:
    """One request on its way through the engine. Times are time.monotonic_ns()."""

    __slots__ = ("cached", "first_ns", "last_ns", "prompt", "started_ns", "tokens")

    def __init__(self, started_ns: int) -> None:
        self.started_ns = started_ns  # it got its slot
        self.first_ns = 0
        self.last_ns = 0
        self.tokens = 0
        self.prompt = 0
        self.cached = 0
