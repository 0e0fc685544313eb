"""--cache-config: which response cache, and its settings. Parses text; opens nothing.

Names, units (milliseconds) and defaults are those of Triton's caches (local_cache, redis_cache).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from doorstep.errors import InvalidArgument

_FORMAT = "--cache-config option format is '<cache name>,<setting>=<value>'"


@dataclass(frozen=True, slots=True)
class LocalCacheOptions:
    """A cache in the server's own memory."""

    size: int  # bytes


@dataclass(frozen=True, slots=True)
class RedisCacheOptions:
    """A cache in a Redis that servers may share."""

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)
    db: int = 0
    connect_timeout_ms: int = 1000
    socket_timeout_ms: int = 1000
    pool_size: int = 16
    wait_timeout_ms: int = 100
    tls: bool = False
    cert: str = ""
    key: str = ""
    cacert: str = ""
    cacert_dir: str = ""
    sni: str = ""


CacheOptions = LocalCacheOptions | RedisCacheOptions


def parse_cache_setting(text: str) -> tuple[str, str, str]:
    """(cache, setting, value). Raises InvalidArgument with Triton's text (command_line_parser.cc)."""
    name, comma, rest = text.partition(",")
    if not comma or not name:
        raise InvalidArgument(
            "No cache specified. --cache-config option format is <cache name>,<setting>=<value>. Got " + text
        )
    setting, equals, value = rest.partition("=")
    if not equals or not setting or not value:
        raise InvalidArgument(f"{_FORMAT}. Got {text}")
    return name, setting, value


def cache_options(
    settings: Sequence[tuple[str, str, str]], environment: Mapping[str, str] = os.environ
) -> CacheOptions | None:
    """From what `parse_cache_setting` gave, in order; None for nothing. Raises InvalidArgument."""
    by_cache: dict[str, dict[str, str]] = {}
    for name, setting, value in settings:
        by_cache.setdefault(name, {})[setting] = value
    if not by_cache:
        return None
    if len(by_cache) > 1:
        raise InvalidArgument(
            "found multiple cache configurations, but only a single cache is currently supported: "
            + ", ".join(by_cache)
        )
    ((name, given),) = by_cache.items()
    if name == "local":
        return _local(given)
    if name == "redis":
        return _redis(given, environment)
    raise InvalidArgument(f"--cache-config={name},…: unknown cache '{name}'; expected local or redis")


def _local(given: dict[str, str]) -> LocalCacheOptions:
    _refuse_unknown("local", given, ("size",))
    if "size" not in given:
        raise InvalidArgument("--cache-config=local,size=<bytes>: the size is missing")
    return LocalCacheOptions(_number("local", "size", given["size"], least=1))


_NUMBERS = {
    "port": ("port", 1), "db": ("db", 0), "connect_timeout": ("connect_timeout_ms", 0),
    "socket_timeout": ("socket_timeout_ms", 0), "pool_size": ("pool_size", 1), "wait_timeout": ("wait_timeout_ms", 0),
}  # fmt: skip
_TEXTS = ("host", "user", "password", "cert", "key", "cacert", "cacert_dir", "sni")


def _redis(given: dict[str, str], environment: Mapping[str, str]) -> RedisCacheOptions:
    _refuse_unknown("redis", given, (*_TEXTS, *_NUMBERS, "tls_enabled"))
    if "host" not in given or "port" not in given:
        raise InvalidArgument(
            "Failed to initialize RedisCache, didn't specify address. Must at a minimum specify 'host' and 'port' in "
            "the configuration, as in --cache-config=redis,host=redis --cache-config=redis,port=6379"
        )
    values: dict[str, Any] = {name: given[name] for name in _TEXTS if name in given}
    for setting, (name, least) in _NUMBERS.items():
        if setting in given:
            values[name] = _number("redis", setting, given[setting], least=least)
    # What is a secret is better not on the command line, where every user of the machine can read it.
    values.setdefault("user", environment.get("TRITONCACHE_REDIS_USERNAME", ""))
    values.setdefault("password", environment.get("TRITONCACHE_REDIS_PASSWORD", ""))
    tls = given.get("tls_enabled", "").lower()
    if tls not in ("", "true", "false"):
        raise InvalidArgument(f"--cache-config=redis,tls_enabled={tls}: expected true or false")
    files = any(values.get(name) for name in ("cert", "key", "cacert", "cacert_dir", "sni"))
    return RedisCacheOptions(tls=tls == "true" or (files and tls != "false"), **values)


def _refuse_unknown(cache: str, given: Mapping[str, str], known: Sequence[str]) -> None:
    for setting in given:
        if setting not in known:
            raise InvalidArgument(
                f"--cache-config={cache},{setting}=…: unknown setting '{setting}'; expected one of {', '.join(known)}"
            )


def _number(cache: str, setting: str, text: str, *, least: int) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text) < 2**63):
        raise InvalidArgument(f"--cache-config={cache},{setting}={text}: expected a whole number, {least} or more")
    return int(text)
