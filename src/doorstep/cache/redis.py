"""The cache in a Redis. A Redis that is gone, slow or emptied costs a model run, never an answer.

Each look-up and each insertion is a task: the only place on a request's path that has one, and only of models that ask
for a cache of this kind. After a failure Redis is left alone for a second, so that requests do not queue up behind its
timeouts.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import Any

from doorstep.cache.base import CacheNumbers, Entry
from doorstep.cache.pack import pack_entry, unpack_entry
from doorstep.config.cache_options import RedisCacheOptions
from doorstep.errors import InvalidArgument

logger = logging.getLogger("doorstep.cache")

PREFIX = b"doorstep:"
REST_S = 1.0  # after a failure
MOST_INSERTIONS = 256  # at a time; more are not waited for
LONG_BYTES = 1 << 20  # packed and unpacked in a thread


class RedisCache:
    """See the module. Touched only from the event loop."""

    name = "redis"
    shared = True
    at_once = False

    def __init__(self, options: RedisCacheOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.numbers = CacheNumbers()
        self._options = options
        self._clock = clock
        self._client: Any = None
        self._library = _library()
        self._resting_until = 0.0
        self._failing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._insertions = 0

    def get(self, key: bytes) -> Entry | None:
        raise AssertionError("a Redis does not answer at once")

    def find(self, key: bytes, then: Callable[[Entry | None], None]) -> None:
        if self._clock() < self._resting_until:
            then(None)
        else:
            self._start(self._find(key, then))

    def put(self, key: bytes, entry: Entry) -> bool:
        if self._insertions < MOST_INSERTIONS and self._clock() >= self._resting_until:
            self._insertions += 1
            self._start(self._put(key, entry))
        else:
            self.numbers.refused += 1
        return True

    def usage(self) -> tuple[int, float] | None:
        return None

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _find(self, key: bytes, then: Callable[[Entry | None], None]) -> None:
        entry = None
        try:
            data = await self._connected().get(PREFIX + key.hex().encode())
            self._works()
            if data is not None:
                entry = unpack_entry(data) if len(data) < LONG_BYTES else await asyncio.to_thread(unpack_entry, data)
                if entry is None:
                    logger.warning("the entry %s in Redis is not one of Doorstep's", key.hex())
        except Exception as error:
            self._fails("look up", error)
        finally:
            then(entry)

    async def _put(self, key: bytes, entry: Entry) -> None:
        try:
            data = pack_entry(entry) if entry.size < LONG_BYTES else await asyncio.to_thread(pack_entry, entry)
            await self._connected().set(PREFIX + key.hex().encode(), data)
            self._works()
        except Exception as error:
            self._fails("insert", error)
        finally:
            self._insertions -= 1

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks but weakly
        task.add_done_callback(self._tasks.discard)

    def _works(self) -> None:
        if self._failing:
            self._failing = False
            logger.info("the response cache in Redis answers again")

    def _fails(self, what: str, error: Exception) -> None:
        self._resting_until = self._clock() + REST_S
        if not self._failing:
            self._failing = True
            where = f"{self._options.host}:{self._options.port}"
            logger.warning(
                "Redis at %s failed to %s a response (%s: %s); models answer themselves until it works again",
                where,
                what,
                type(error).__name__,
                error,
            )

    def _connected(self) -> Any:
        if self._client is None:
            self._client = self._made()
        return self._client

    def _made(self) -> Any:
        o = self._options
        client, retry, backoff = self._library
        more: dict[str, Any] = {}
        if o.tls:
            more = {
                "connection_class": _named(client.SSLConnection, o.sni) if o.sni else client.SSLConnection,
                "ssl_certfile": o.cert or None,
                "ssl_keyfile": o.key or None,
                "ssl_ca_certs": o.cacert or None,
                "ssl_ca_path": o.cacert_dir or None,
                "ssl_min_version": ssl.TLSVersion.TLSv1_2,
            }
        pool = client.BlockingConnectionPool(
            host=o.host,
            port=o.port,
            db=o.db,
            username=o.user or None,
            password=o.password or None,
            socket_timeout=o.socket_timeout_ms / 1000 or None,
            socket_connect_timeout=o.connect_timeout_ms / 1000 or None,
            max_connections=o.pool_size,
            timeout=o.wait_timeout_ms / 1000 or None,
            retry=retry.Retry(backoff.NoBackoff(), 0),
            **more,
        )
        return client.Redis(connection_pool=pool)

    def __repr__(self) -> str:
        return f"<RedisCache {self._options.host}:{self._options.port}{' failing' if self._failing else ''}>"


def _named(connection: Any, name: str) -> Any:
    """A kind of connection that asks for `name`, and checks it, whatever host it goes to."""

    class Named(connection):  # type: ignore[misc]
        def _connection_arguments(self) -> Any:
            return {**super()._connection_arguments(), "server_hostname": name}

    return Named


def _library() -> tuple[Any, Any, Any]:
    try:
        return (
            importlib.import_module("redis.asyncio"),
            importlib.import_module("redis.asyncio.retry"),
            importlib.import_module("redis.backoff"),
        )
    except ImportError:
        raise InvalidArgument("--cache-config=redis,… needs the package redis: pip install 'doorstep[redis]'") from None
