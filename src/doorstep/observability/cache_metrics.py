"""What the numbers of the response cache itself are called in /metrics: Triton's names of 22.x. Knows no HTTP.

Those per model, which today's Triton has, are in model_metrics.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric

from doorstep.cache.base import ResponseCache

CacheReading = dict[str, tuple[str, float]]


def cache_reading(cache: ResponseCache | None) -> CacheReading:
    """Name → (what it says, value). Only on the event loop."""
    if cache is None:
        return {}
    n = cache.numbers
    found: CacheReading = {
        "nv_cache_num_lookups": ("Look-ups in the response cache", n.lookups),
        "nv_cache_num_hits": ("Look-ups that found something", n.hits),
        "nv_cache_num_misses": ("Look-ups that found nothing", n.misses),
        "nv_cache_num_evictions": ("Entries that had to go for others", n.evictions),
        "nv_cache_lookup_duration": ("Microseconds in look-ups", n.lookup_ns // 1000),
        "nv_cache_insertion_duration": ("Microseconds in insertions", n.insert_ns // 1000),
    }
    usage = cache.usage()
    if usage is not None:
        found["nv_cache_num_entries"] = ("Entries in the response cache", usage[0])
        found["nv_cache_util"] = ("The share of the response cache that is in use, 0 to 1", usage[1])
    return found


def cache_families(reading: CacheReading) -> Iterable[Metric]:
    for name, (text, value) in reading.items():
        yield GaugeMetricFamily(name, text, value)
