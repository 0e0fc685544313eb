"""Answers kept for requests that come again. Knows no model and no queue; scheduler/cached.py asks it."""

from __future__ import annotations

from doorstep.cache.base import ResponseCache
from doorstep.cache.local import LocalCache
from doorstep.config.cache_options import CacheOptions, LocalCacheOptions


def make_cache(options: CacheOptions) -> ResponseCache:
    """Raises InvalidArgument where its library is not installed."""
    if isinstance(options, LocalCacheOptions):
        return LocalCache(options.size)
    from doorstep.cache.redis import RedisCache

    return RedisCache(options)
