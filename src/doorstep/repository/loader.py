"""Makes what is wanted of one model so: loads, publishes, drains, closes. Knows no directory and no control mode.

Loading and closing run in the loader pool; everything else on the event loop, which alone writes the lives and the
serving map. One call at a time per model is the caller's business.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

from doorstep.errors import BackendError, Cancelled, DoorstepError, ErrorCode, InvalidArgument
from doorstep.repository.base import ModelState, Servable, Updatable, VersionSpec
from doorstep.repository.lifecycle import UNLOADED, Life, ModelLifecycle
from doorstep.repository.overrides import OverrideDirectory
from doorstep.repository.reconcile import Abandon, Load, Stamp, Swap, reconcile
from doorstep.repository.serving_map import ServingMap

logger = logging.getLogger("doorstep.repository")
S = TypeVar("S", bound=Servable)
T = TypeVar("T")

STOPPED = "loading was stopped"
MOST_CALLED = 64  # models loaded at a time because others, which are being loaded, wait for them

_called: ContextVar[bool] = ContextVar("called", default=False)


@contextmanager
def called_by_loading(called: bool = True) -> Iterator[None]:
    """What is begun within is waited for by model code that is being loaded, and so by a thread of the pool."""
    token = _called.set(called or _called.get())
    try:
        yield
    finally:
        _called.reset(token)


# How Triton words a status in the reason of an index row.
_CODE_WORDS = {
    ErrorCode.UNKNOWN: "Unknown",
    ErrorCode.INTERNAL: "Internal",
    ErrorCode.NOT_FOUND: "Not found",
    ErrorCode.INVALID_ARG: "Invalid argument",
    ErrorCode.UNAVAILABLE: "Unavailable",
    ErrorCode.UNSUPPORTED: "Unsupported",
    ErrorCode.ALREADY_EXISTS: "Already exists",
    ErrorCode.CANCELLED: "Cancelled",
}


class Loader(Generic[S]):
    """Touched only from the event loop."""

    def __init__(
        self,
        load_model: Callable[[VersionSpec], S],
        lifecycle: ModelLifecycle[S],
        serving: ServingMap[S],
        *,
        threads: int,
        retries: int,
    ) -> None:
        self._load_model = load_model
        self._lifecycle = lifecycle
        self._serving = serving
        self._retries = retries
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="doorstep-load")
        self._pool_of_called = ThreadPoolExecutor(MOST_CALLED, thread_name_prefix="doorstep-load")
        self._jobs: dict[Future[Any], str] = {}  # in the pool, and what they do
        self._retiring: dict[asyncio.Task[None], Life[S]] = {}

    async def bring_up(
        self,
        name: str,
        specs: Mapping[int, VersionSpec],
        stamps: Mapping[int, Stamp],
        files: OverrideDirectory | None = None,
    ) -> None:
        """Serves exactly `specs`: all of them or, if one fails, what was served before.

        Holds `files` as long as something that was loaded from them lives. Raises InvalidArgument with the reasons, in
        Triton's words.
        """
        loaded: dict[int, Life[S]] = {}
        failed: dict[int, str] = {}
        serve_on: set[int] = set()  # of those that failed: they are as they were

        async def load(version: int) -> None:
            if (serving := self._updatable(name, specs[version])) is not None:
                if reason := await self._update(serving, specs[version], stamps[version]):
                    failed[version] = reason
                    serve_on.add(version)
                return
            life = self._lifecycle.begin(specs[version], stamps[version])
            if files is not None:
                files.hold()
                life.files = files
            reason = await self._load(life)
            if reason is None:
                loaded[version] = life
            else:
                failed[version] = reason
                self._end(life, reason)

        try:
            while action := reconcile(stamps, self._stamps(name), {v: x.stamp for v, x in loaded.items()}, failed):
                match action:
                    case Load(versions):
                        await asyncio.gather(*map(load, versions))
                    case Abandon(versions):
                        for version in versions:
                            self._retire(loaded.pop(version), f"not served: version {min(failed)} failed to load")
                    case Swap(publish, retire):
                        self._swap(name, [loaded.pop(v) for v in publish], retire)
        except asyncio.CancelledError:
            for life in loaded.values():
                self._retire(life, STOPPED)
            raise
        if failed:
            states = {v: "READY" if v in serve_on else "UNAVAILABLE" for v in failed}
            reasons = "".join(f"version {v} is at {states[v]} state: {failed[v]};" for v in sorted(failed))
            raise InvalidArgument(f"load failed for model '{name}': {reasons}\n")

    def _updatable(self, name: str, spec: VersionSpec) -> Life[S] | None:
        """The life that serves the version, where it need not be loaded again: only its instances change."""
        life = self._lifecycle.ready(name).get(int(spec.version))
        if life is None or life.servable is None or not spec.files:
            return None
        if (life.spec.files, life.spec.version_directory) != (spec.files, spec.version_directory):
            return None
        servable = life.servable
        return life if isinstance(servable, Updatable) and servable.can_become(spec.config, life.spec.config) else None

    async def _update(self, life: Life[S], spec: VersionSpec, stamp: Stamp) -> str | None:
        """Returns None, or why it failed; then it serves on as it was."""
        assert isinstance(life.servable, Updatable)
        try:
            await life.servable.update_instances(spec.config)
        except DoorstepError as error:
            return f"{_CODE_WORDS[error.code]}: {_without_paths(error.message, spec)}"
        except Exception as error:  # of the model's own code
            logger.exception("%s: new instances failed", _label(life))
            return f"Internal: unexpected {type(error).__name__}: {error}"
        life.spec, life.stamp = spec, stamp
        return None

    def take_down(self, name: str) -> None:
        """Serves no version of `name` any more. What is in flight is answered, then the versions are closed."""
        ready = self._lifecycle.ready(name)
        self._serving.publish(name, {})
        for life in ready.values():
            self._retire(life, UNLOADED)

    async def stop(self, timeout_s: float) -> list[str]:
        """Waits until all is drained and closed, at most `timeout_s`. Returns what had not ended by then.

        A thread that hangs in a model's own code cannot be ended, and Python waits for it at exit: where the list is
        not empty, only `os._exit` ends the process for certain.
        """
        jobs = [asyncio.ensure_future(_settled(job)) for job in self._jobs]
        if pending := {*self._retiring, *jobs}:
            await asyncio.wait(pending, timeout=timeout_s)
        left = [what for job, what in self._jobs.items() if not job.done()]
        left += [
            f"draining {_label(life)} ({life.servable.inflight_count} in flight)"
            for life in self._retiring.values()
            if life.servable is not None and life.servable.inflight_count
        ]
        unfinished = [task for task in (*self._retiring, *jobs) if not task.done()]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        for pool in (self._pool, self._pool_of_called):
            pool.shutdown(wait=False, cancel_futures=True)
        return left

    def _stamps(self, name: str) -> dict[int, Stamp]:
        return {version: life.stamp for version, life in self._lifecycle.ready(name).items()}

    async def _load(self, life: Life[S]) -> str | None:
        """Loads, as often as retries allow. Returns None, with `life.servable` set, or why it failed."""
        reason = ""
        what = f"loading {_label(life)}"
        for attempt in range(self._retries + 1):
            if attempt:
                logger.warning("%s failed, attempt %d of %d: %s", what, attempt, self._retries + 1, reason)
            load = _Load(self._load_model, life.spec)
            try:
                life.servable = await self._in_pool(what, load.run)
            except asyncio.CancelledError:
                life.servable = load.abandon()
                if life.servable is None:
                    self._end(life, STOPPED)
                else:
                    self._retire(life, STOPPED)
                raise
            except DoorstepError as error:
                reason = f"{_CODE_WORDS[error.code]}: {error.message}"
            else:
                return None
        return reason

    def _swap(self, name: str, publish: Collection[Life[S]], retire: Collection[int]) -> None:
        """In one step of the loop: no request can come between."""
        ready = self._lifecycle.ready(name)
        old = [ready.pop(version) for version in retire]
        ready.update({life.version: life for life in publish})
        self._serving.publish(name, {v: life.servable for v, life in ready.items() if life.servable is not None})
        for life in publish:
            self._lifecycle.change(life, ModelState.READY)
        for life in old:
            self._retire(life, UNLOADED)

    def _retire(self, life: Life[S], reason: str) -> None:
        """It is out of the serving map: stop it now, drain and close it in the background."""
        self._lifecycle.change(life, ModelState.UNLOADING)
        if life.servable is not None:
            life.servable.stop()
        task = asyncio.get_running_loop().create_task(self._drain_and_close(life, reason))
        self._retiring[task] = life
        task.add_done_callback(lambda task: self._retiring.pop(task, None))

    async def _drain_and_close(self, life: Life[S], reason: str) -> None:
        servable = life.servable
        assert servable is not None
        try:
            await servable.drain()
            await self._in_pool(f"closing {_label(life)}", _contained, servable.close, servable)
        except DoorstepError as error:
            logger.error("closing %s failed: %s", _label(life), error.message)
        life.servable = None
        self._end(life, reason)

    def _end(self, life: Life[S], reason: str) -> None:
        self._lifecycle.change(life, ModelState.UNAVAILABLE, reason)
        if life.files is not None and life.files.release():
            self._submit(f"removing the files of {_label(life)}", life.files.remove)

    async def _in_pool(self, what: str, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.wrap_future(self._submit(what, function, *arguments))

    def _submit(self, what: str, function: Callable[..., T], *arguments: Any) -> Future[T]:
        job = (self._pool_of_called if _called.get() else self._pool).submit(function, *arguments)
        self._jobs[job] = what
        loop = asyncio.get_running_loop()

        def forget(job: Future[T]) -> None:
            try:
                loop.call_soon_threadsafe(self._jobs.pop, job, None)
            except RuntimeError:  # `stop` gave up on it, and the loop is closed
                pass

        job.add_done_callback(forget)
        return job


class _Load(Generic[S]):
    """One load in the pool, which may be given up while it runs: what it then makes is closed in its own thread."""

    __slots__ = ("_abandoned", "_load_model", "_lock", "_made", "_spec")

    def __init__(self, load_model: Callable[[VersionSpec], S], spec: VersionSpec) -> None:
        self._load_model = load_model
        self._spec = spec
        self._lock = threading.Lock()  # around the two fields below, which both threads write
        self._abandoned = False
        self._made: S | None = None

    def run(self) -> S:
        try:
            made = _contained(lambda: self._load_model(self._spec), self._spec)
        except DoorstepError as error:
            text = _without_paths(error.message, self._spec)
            raise DoorstepError(text, code=error.code, reason=error.reason) from error
        with self._lock:
            if not self._abandoned:
                self._made = made
                return made
        _contained(made.close, made)
        raise Cancelled(STOPPED)

    def abandon(self) -> S | None:
        """Nobody waits for it any more. Returns what was made, if it is already there: it is then the caller's."""
        with self._lock:
            self._abandoned = True
            return self._made


def _contained(function: Callable[[], T], about: object) -> T:
    """In the loader pool. Whatever a model's own code raises, SystemExit included, is that model's failure alone."""
    try:
        return function()
    except DoorstepError:
        raise
    except BaseException as error:
        logger.exception("%s from %r", type(error).__name__, about)
        raise BackendError(f"unexpected {type(error).__name__}: {error}") from None


def _without_paths(message: str, spec: VersionSpec) -> str:
    """The text with paths that begin at the model's folder: where that is, is not a client's business. Looks at the
    disk: a folder may be a link."""
    for directory in (spec.version_directory.parent, spec.model_directory):
        message = message.replace(str(directory), spec.name)
    for directory in (spec.version_directory.resolve().parent, spec.model_directory.resolve()):
        message = message.replace(str(directory), spec.name)
    return message


async def _settled(job: Future[Any]) -> None:
    """Returns when the job is over, whatever came of it."""
    over = asyncio.wrap_future(job)
    await asyncio.wait([over])
    if not over.cancelled():
        over.exception()  # seen


def _label(life: Life[Any]) -> str:
    return f"{life.spec.identity}:{life.spec.version}"
