"""What the numbers of language models are called in /metrics: ours, and vLLM's names for those that routers scrape.

Knows no HTTP and no engine. The aliases are what the Gateway API's inference extension reads of a model server to
choose among several (its model server protocol): they are there for as long as a language model is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from doorstep.llm_stats import LLMStatistics
from doorstep.observability.histograms import add_histogram
from doorstep.scheduler.slots import SlotScheduler
from doorstep.stats import Histogram

_P = "doorstep_llm_"


class LLMReading:
    """What may be asked of a language model only on the event loop."""

    __slots__ = ("adapters_known", "adapters_running", "adapters_waiting", "labels", "llm", "waiting")

    def __init__(self, scheduler: SlotScheduler, labels: dict[str, str], adapters_known: int) -> None:
        self.labels = labels
        self.llm: LLMStatistics = scheduler.llm
        self.waiting = scheduler.queued_count
        self.adapters_known = adapters_known
        self.adapters_running = scheduler.adapters_running()
        self.adapters_waiting = scheduler.adapters_waiting()


_Read = Callable[[LLMReading], float]
GAUGES: tuple[tuple[str, str, _Read], ...] = (
    (_P + "running_requests", "Requests that have a slot", lambda m: m.llm.running),
    (_P + "waiting_requests", "Requests that wait for a slot", lambda m: m.waiting),
    (_P + "slots", "Requests that can run at once", lambda m: m.llm.slots),
    (_P + "kv_cache_usage_ratio", "How full the cache of keys and values is, 0 to 1", lambda m: m.llm.kv_usage),
    (_P + "context_tokens", "Tokens of prompt and answer that one request may have", lambda m: m.llm.context_size),
)
COUNTERS: tuple[tuple[str, str, _Read], ...] = (
    (_P + "prompt_tokens", "Tokens of prompts, cached ones included", lambda m: m.llm.prompt_tokens),
    (_P + "cached_prompt_tokens", "Tokens of prompts that had been worked off before", lambda m: m.llm.cached_tokens),
    (_P + "generated_tokens", "Tokens of answers", lambda m: m.llm.generated_tokens),
)
HISTOGRAMS: tuple[tuple[str, str, Callable[[LLMStatistics], Histogram]], ...] = (
    (_P + "time_to_first_token_seconds", "From a request's arrival to the first token of its answer",
     lambda s: s.first_token_s),
    (_P + "inter_token_latency_seconds", "From a token to the next one", lambda s: s.next_token_s),
    (_P + "queue_seconds", "From a request's arrival to its slot", lambda s: s.queue_s),
    (_P + "prefill_seconds", "From the slot to the first token", lambda s: s.prefill_s),
    (_P + "decode_seconds", "From the first token to the last", lambda s: s.decode_s),
    (_P + "inference_seconds", "From the slot to the end", lambda s: s.inference_s),
    (_P + "request_seconds", "From a request's arrival to the end", lambda s: s.end_to_end_s),
    (_P + "request_prompt_tokens", "Tokens per prompt", lambda s: s.request_prompt_tokens),
    (_P + "request_generated_tokens", "Tokens per answer", lambda s: s.request_generated_tokens),
)  # fmt: skip
ALIASES: tuple[tuple[str, str, _Read], ...] = (
    ("vllm:num_requests_running", "doorstep_llm_running_requests, for routers", lambda m: m.llm.running),
    ("vllm:num_requests_waiting", "doorstep_llm_waiting_requests, for routers", lambda m: m.waiting),
    ("vllm:kv_cache_usage_perc", "doorstep_llm_kv_cache_usage_ratio, for routers", lambda m: m.llm.kv_usage),
)


def llm_families(readings: Sequence[LLMReading]) -> Iterable[Metric]:
    """Nothing where no language model is loaded."""
    if not readings:
        return
    for name, text, read in GAUGES:
        yield _filled(GaugeMetricFamily(name, text), name, readings, read)
    for name, text, read in COUNTERS:
        yield _filled(CounterMetricFamily(name, text), f"{name}_total", readings, read)
    finished = CounterMetricFamily(_P + "finished_requests", "Requests that had a slot, by how they ended")
    rejected = CounterMetricFamily(_P + "rejected_requests", "Requests that never had a slot, by why not")
    for model in readings:
        for reason, count in model.llm.finished.items():
            finished.add_sample(f"{finished.name}_total", model.labels | {"reason": reason}, count)
        for reason, count in model.llm.rejected.items():
            rejected.add_sample(f"{rejected.name}_total", model.labels | {"reason": reason}, count)
    yield finished
    yield rejected
    for name, text, choose in HISTOGRAMS:
        family = HistogramMetricFamily(name, text)
        for model in readings:
            histogram = choose(model.llm)
            add_histogram(family, model.labels, histogram, histogram.bounds, 1)
        yield family
    yield from _aliases(readings)


def _aliases(readings: Sequence[LLMReading]) -> Iterable[Metric]:
    for name, text, read in ALIASES:
        family = GaugeMetricFamily(name, text)
        for model in readings:
            family.add_sample(name, {"model_name": model.labels["model"]}, read(model))
        yield family
    config = GaugeMetricFamily("vllm:cache_config_info", "The cache of keys and values, in blocks of one token")
    loras = GaugeMetricFamily("vllm:lora_requests_info", "LoRA adapters of requests; the value is the time")
    for model in readings:
        named = {"model_name": model.labels["model"]}
        blocks = {"block_size": "1", "num_gpu_blocks": str(model.llm.context_size * model.llm.slots)}
        config.add_sample(config.name, named | blocks, 1)
        adapters = {
            "max_lora": str(model.adapters_known),
            "running_lora_adapters": ",".join(model.adapters_running),
            "waiting_lora_adapters": ",".join(model.adapters_waiting),
        }
        loras.add_sample(loras.name, named | adapters, time.time())
    yield config
    yield loras


def _filled(family: Metric, sample: str, readings: Sequence[LLMReading], read: _Read) -> Metric:
    for model in readings:
        family.add_sample(sample, model.labels, read(model))
    return family
