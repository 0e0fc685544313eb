"""ModelRepository: which models are served, by control mode, load calls and polling. Knows no library and no protocol.

Operations on one model wait for each other in order of arrival; those on different models run side by side.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from doorstep.errors import DoorstepError, Internal, InvalidArgument, NotFound, Unavailable
from doorstep.repository.agents import run_agents
from doorstep.repository.base import IndexEntry, LoadRequest, ModelState, Servable, VersionSpec
from doorstep.repository.dependencies import Dependencies, Needed, identity, split
from doorstep.repository.layout import without_versions
from doorstep.repository.lifecycle import Listener, ModelLifecycle
from doorstep.repository.loader import Loader, called_by_loading
from doorstep.repository.overrides import OverrideDirectory
from doorstep.repository.reconcile import Stamp
from doorstep.repository.serving_map import ServingMap
from doorstep.repository.source import DuplicateModel, FoundModel, Source
from doorstep.repository.turns import Setbacks, Turns
from doorstep.repository.version_policy import choose, policy_of
from doorstep.repository.waits import Waits

logger = logging.getLogger("doorstep.repository")
S = TypeVar("S", bound=Servable)
T = TypeVar("T")

ControlMode = Literal["none", "explicit", "poll"]
NOT_UNIQUE = "model appears in two or more repositories"  # the reason in the index, Triton's


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """What the server's command line says about the repository."""

    repositories: Sequence[Path]
    control: ControlMode = "none"
    poll_s: float = 15.0
    startup_models: Sequence[str] = ()  # --load-model, explicit mode only; ("*",) is all of them
    load_threads: int = 4
    load_retries: int = 0
    namespacing: bool = False  # the same name may be in several repositories


@dataclass(frozen=True, slots=True)
class StartReport:
    """What became of the models at the start. The caller decides whether a failure ends the server."""

    loaded: tuple[str, ...]
    failures: dict[str, str] = field(default_factory=dict)  # model, or repository's path → why


@dataclass(frozen=True, slots=True)
class _Plan:
    """The versions of a model that should be served, and what each is made from."""

    specs: dict[int, VersionSpec]
    stamps: dict[int, Stamp]
    overridden: bool
    config: Any

    @property
    def is_ensemble(self) -> bool:
        return bool(self.config.ensemble_scheduling.step)


class ModelRepository(Generic[S]):
    """Touched only from the event loop."""

    def __init__(
        self,
        options: RepositoryOptions,
        load_model: Callable[[VersionSpec], S],
        read_config: Callable[[Path, str], Any],
        parse_config: Callable[[str], Any],
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        check_ensemble: Callable[[Any], None] = lambda config: None,
    ) -> None:
        """`read_config(model_directory, name)` and `parse_config(json)` return an inference.ModelConfig message, or
        raise a DoorstepError; they are called off the loop. `check_ensemble(config)` is called on it when the models of
        the steps are served: it raises InvalidArgument where they do not fit, and completes the config."""
        self.options = options
        self._source = Source(options.repositories, namespaced=options.namespacing)
        self._read_config = read_config
        self._parse_config = parse_config
        self._sleep = sleep
        self._lifecycle: ModelLifecycle[S] = ModelLifecycle()
        self.serving: ServingMap[S] = ServingMap(self._known, self._identities if options.namespacing else None)
        self.find = self.serving.find  # find(name, version="") on every request's path: no hop between
        self._loader = Loader(
            load_model, self._lifecycle, self.serving, threads=options.load_threads, retries=options.load_retries
        )
        self._turns = Turns()
        self._calls = (
            Turns()
        )  # of load and unload calls, by the name they say: a load looks at the disk before its turn
        self._waits = Waits()
        self._setbacks = Setbacks()
        self._operations: set[asyncio.Task[Any]] = set()
        self._names: set[str] = set()  # of the models on disk, as of the last look
        self._applied: dict[str, FoundModel] = {}  # what is served is exactly what this look found
        self._problems: dict[str, str] = {}  # models whose files are not served as they are now, and why
        self._wanted: set[str] = set()  # models that are to be served
        self._explicit: set[str] = set()  # those of them that somebody asked for by name, or that start with the server
        self._check_ensemble = check_ensemble
        self._dependencies = Dependencies()
        self._ensembles: dict[str, tuple[FoundModel, _Plan]] = {}  # those wanted, as they were last found
        self._considered: dict[str, str] = {}  # the generation of their steps' models when they were last looked at
        self._invalid: set[str] = set()  # ensembles whose steps are not there, or do not fit
        self._read: dict[str, tuple[FoundModel, Any]] = {}  # configs read, and not yet looked at
        self._following: dict[str, asyncio.Task[None]] = {}  # under way after the last look at the disk
        self._override_number = count(1)
        self._poller: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def on_change(self) -> list[Listener]:
        """Functions called, on the loop, with every StateChange."""
        return self._lifecycle.listeners

    # ---- what is there

    def versions(self, name: str) -> list[str]:
        """The versions that can be called, lowest first."""
        return self.serving.versions(name)

    def servables(self) -> list[S]:
        """Everything that can be called, by name and version."""
        return self.serving.all()

    @property
    def all_ready(self) -> bool:
        """Every model that is to be served is, with one version at least (--strict-readiness).

        Unlike Triton's, it does not turn false while a new version loads, fails or an old one drains beside one that
        serves: taking the whole server out of rotation would lose what still works.
        """
        return all(map(self._lifecycle.ready, self._wanted))

    def index(self, ready_only: bool = False) -> list[IndexEntry]:
        """Every model, as of the last look at the disk (see `refresh`), with the states of its versions."""
        rows: list[IndexEntry] = []
        for name in sorted({*self._names, *self._lifecycle.names()}):
            namespace, bare = split(name)
            problem = self._problems.get(name, "")
            lives = list(self._lifecycle.shown(name))
            if name not in self._names and all(life.state is ModelState.UNAVAILABLE for life in lives):
                continue  # gone from the disk, and from memory
            for life in lives:
                ready = life.state is ModelState.READY
                if ready or not ready_only:
                    reason = life.reason or (problem if ready else "")
                    rows.append(IndexEntry(bare, life.spec.version, life.state.value, reason, namespace))
            if not lives and not ready_only:
                state = ModelState.UNAVAILABLE.value if problem else ""
                rows.append(IndexEntry(bare, "", state, problem, namespace))
        return rows

    async def refresh(self) -> None:
        """Looks at the disk for models that came or went, so that `index` lists them. Loads nothing."""
        names, unlisted = await _off_loop(self._source.names)
        self._names = names | (self._names if unlisted else set())

    # ---- beginning and end

    async def start(self) -> StartReport:
        """Loads what the control mode says is to be served from the beginning.

        Raises InvalidArgument for a repository that is no directory, and for options that contradict each other."""
        options = self.options
        for path in await _off_loop(self._source.missing):
            raise InvalidArgument(f"repository path '{path}' is not a valid directory")
        everything = options.control != "explicit" or "*" in options.startup_models
        if "*" in options.startup_models and len(options.startup_models) > 1:
            raise InvalidArgument("Wildcard model name '*' must be the ONLY startup model if specified at all.")
        for name in options.startup_models:
            _check_name(name)
        if options.startup_models and options.control != "explicit":
            raise InvalidArgument("--load-model needs --model-control-mode=explicit")
        listing = await _off_loop(self._source.scan)
        self._names = listing.names
        failures = {str(path): f"failed to poll model repository: {why}" for path, why in listing.unlisted.items()}
        for line in map(": ".join, failures.items()):
            logger.error("%s", line)
        if everything:
            loads = await self._follow_all(listing.models)
            for name, error in listing.problems.items():
                failures[name] = self._note(name, error)
        else:
            loads = {name: self._operation(self._load_called(name)) for name in dict.fromkeys(options.startup_models)}
        await _all_over(loads.values())
        for name, task in loads.items():
            if task.cancelled():
                failures[name] = "the server is stopping"
            elif failure := task.exception():
                failures[name] = failure.message.rstrip("\n") if isinstance(failure, DoorstepError) else repr(failure)
        if options.control == "poll" and not self._stopping:
            self._poller = asyncio.get_running_loop().create_task(self._poll_for_ever())
        return StartReport(tuple(sorted(n for n in loads if n not in failures)), failures)

    async def stop(self, timeout_s: float) -> list[str]:
        """Loads nothing more, serves nothing more; answers what is in flight and closes everything.

        Returns, after `timeout_s` at the latest, what had not ended by then (see Loader.stop)."""
        self._stopping = True
        tasks = [*self._operations, *([self._poller] if self._poller is not None else [])]
        for task in tasks:
            task.cancel()
        await _all_over(tasks)
        for name in list(self._lifecycle.names()):
            self._loader.take_down(name)
        return await self._loader.stop(timeout_s)

    # ---- repositories that come and go

    def add_repository(self, path: Path) -> None:
        """One more, whose models can be loaded from now on (SageMaker's multi-model endpoints)."""
        self._check_explicit()
        self._source = Source([*self._source.repositories, path], namespaced=self.options.namespacing)

    def remove_repository(self, path: Path) -> None:
        """What is served from it goes on being served."""
        self._source = Source([r for r in self._source.repositories if r != path], namespaced=self.options.namespacing)

    # ---- load and unload calls

    async def load(self, name: str, request: LoadRequest | None = None, asker: str = "") -> None:
        """Serves what the repository has of `name` now; returns when it does. A model that is unchanged stays as it is.

        With `request`, its config and files instead of the repository's. Whatever fails leaves what was served.
        `asker`: a model whose own loading waits for this one. Raises InvalidArgument, Internal or Unavailable in
        Triton's words."""
        self._check_explicit()
        _check_name(name)
        with self._waits.noted(asker, name) as within, called_by_loading(bool(asker)):
            await self._finish(self._operation(self._load_called(name, request, within)))

    async def unload(self, name: str, unload_dependents: bool = False, asker: str = "") -> None:
        """Ceases to serve `name` at once; what is in flight is answered, then its memory is given back, in the
        background. Nothing to unload is no error. With `unload_dependents`, the models of an ensemble's steps too, but
        for those that were loaded by name, or that another ensemble needs."""
        self._check_explicit()
        with self._waits.noted(asker, name), called_by_loading(bool(asker)):
            await self._finish(self._operation(self._unload_called(name, unload_dependents)))

    async def _load_called(self, name: str, request: LoadRequest | None = None, within: tuple[str, ...] = ()) -> None:
        """All models of that name: with namespaces there may be several."""
        models = [name]
        async with self._calls.take(name):
            if self.options.namespacing and not (request is not None and request.files):
                models = await _off_loop(self._source.identities, name) or models
            self._explicit.update(models)
            loads = [self._load_named(model, request, within) for model in models]
            for result in await asyncio.gather(*loads, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result

    async def _unload_called(self, name: str, unload_dependents: bool) -> None:
        async with self._calls.take(name):
            for model in self._identities(name) or [name]:
                await self._unload_named(model, unload_dependents)

    async def _load_named(self, name: str, request: LoadRequest | None = None, within: tuple[str, ...] = ()) -> None:
        """The models that it needs first, then itself, then the ensembles that need it. `within`: those it is loaded
        for."""
        await self._load_needed(name, request, within)
        try:
            await self._load_one(name, request)
        finally:
            await self._reconsider_all(name, within)

    async def _load_needed(self, name: str, request: LoadRequest | None, within: tuple[str, ...]) -> None:
        """What is wrong with any of them, or with the config, is told when the ensemble's own turn comes."""
        try:
            if request is not None and request.config is not None:
                self._dependencies.note(name, await _off_loop(self._parse_config, request.config))
            else:
                await self._peek(await _off_loop(self._source.find, name))
        except DoorstepError:
            return
        names = self._dependencies.names_needed_by(name)
        if self.options.namespacing:
            for bare in names:
                there = await _off_loop(self._source.identities, bare)
                self._names = {known for known in self._names if split(known)[1] != bare}.union(there)
        needed = [self._resolve_on_disk(name, bare) for bare in names]
        chain = (*within, name)
        await asyncio.gather(
            *(self._load_named(model, None, chain) for model in dict.fromkeys(needed) if model not in chain),
            return_exceptions=True,
        )

    async def _load_one(self, name: str, request: LoadRequest | None = None) -> None:
        """Triton's text for whatever goes wrong before loading begins; then the reason, which Triton only logs."""
        async with self._turns.take(name):
            files: OverrideDirectory | None = None
            text = f"failed to load '{name}', failed to poll from model repository"
            try:
                config = None
                if request is not None and request.config is not None:
                    config = await _off_loop(self._parse_config, request.config)
                if request is not None and request.files:
                    if config is None:
                        raise InvalidArgument("Load parameter 'config' must be specified for model file override")
                    files = await _off_loop(OverrideDirectory, name, request.files)
                source = self._source if files is None else Source([files.directory.parent])
                found = await _off_loop(source.find, name)
                if config is None and self._is_served(found):
                    return
                plan = await self._plan(found, config)
            except NotFound as error:
                logger.error("%s", error.message, extra={"model": name})
                raise Internal(text) from None
            except DoorstepError as error:
                self._note(name, error)
                raise Internal(f"{text}: {error.message}") from None
            else:
                self._names.add(name)
                await self._serve(found, plan, files)
            finally:
                if files is not None and files.release():
                    await _off_loop(files.remove)

    async def _unload_named(self, name: str, unload_dependents: bool) -> None:
        needed = [self._resolve(name, bare) for bare in self._dependencies.names_needed_by(name)]
        async with self._turns.take(name):
            # Together with what cannot be without it: no request finds the one and misses the other.
            for ensemble in reversed(self._dependencies.all_that_need(name, self._ensembles)):
                if name in map(partial(self._resolve, ensemble), self._dependencies.names_needed_by(ensemble)):
                    self._take_down(ensemble)
            self._forget(name)
            for names in (self._wanted, self._explicit, self._invalid):
                names.discard(name)
            self._ensembles.pop(name, None)
            self._considered.pop(name, None)
            self._dependencies.forget(name)
            self._take_down(name)
        await self._reconsider_all(name)
        if unload_dependents:
            for model in dict.fromkeys(needed):
                if model not in self._explicit and not self._dependencies.that_need(model, self._ensembles):
                    await self._unload_named(model, True)

    # ---- polling

    async def poll(self) -> list[asyncio.Task[None]]:
        """Looks at the disk once and begins what follows from it; the tasks end when it is done.

        A model that still has an operation under way is left to the next look."""
        listing = await _off_loop(self._source.scan)
        for path, why in listing.unlisted.items():
            logger.error("failed to poll model repository '%s': %s", path, why)
        # What is in a repository that cannot be listed just now is not gone: keep it.
        gone = set() if listing.unlisted else self._wanted - listing.names
        self._names = listing.names | (self._names if listing.unlisted else set())
        for name, error in listing.problems.items():
            self._note(name, error)
        tasks = [
            self._operation(self._unload_named(name, False)) for name in sorted(gone) if not self._turns.busy(name)
        ]
        fresh = {
            name: found
            for name, found in listing.models.items()
            if not (self._turns.busy(name) or self._is_served(found) or self._setbacks.rests(found))
        }
        return tasks + list((await self._follow_all(fresh)).values())

    async def _poll_for_ever(self) -> None:
        while True:
            await self._sleep(self.options.poll_s)
            try:
                for task in await self.poll():
                    task.add_done_callback(_seen)
            except Exception:
                logger.exception("polling failed; it goes on")

    async def _follow_all(self, models: Mapping[str, FoundModel]) -> dict[str, asyncio.Task[None]]:
        """All configs are read first: an ensemble waits for those of its steps that load now."""
        await asyncio.gather(*(self._peek(found) for found in models.values()), return_exceptions=True)
        self._explicit.update(models)
        tasks = {name: self._operation(self._follow(name, found)) for name, found in models.items()}
        for name, task in tasks.items():
            self._following[name] = task
            task.add_done_callback(partial(self._followed, name))
        return tasks

    def _followed(self, name: str, task: asyncio.Task[None]) -> None:
        if self._following.get(name) is task:
            del self._following[name]

    async def _follow(self, name: str, found: FoundModel) -> None:
        """Serves what a look at the disk found."""
        needed = [self._resolve_on_disk(name, bare) for bare in self._dependencies.names_needed_by(name)]
        if needed and not self._dependencies.cycle(name, self._resolve_on_disk):
            await _all_over(self._following[model] for model in needed if model in self._following)
        try:
            async with self._turns.take(name):
                if self._is_served(found):
                    return
                try:
                    await self._serve(found, await self._plan(found))
                except DoorstepError as error:
                    self._setbacks.add(found)
                    self._note(name, error)
                    raise
        finally:
            await self._reconsider_all(name)

    def _known(self, name: str) -> Collection[int] | None:
        """A model of which no version was chosen, or none could be read, is not unknown."""
        versions = self._lifecycle.known(name)
        return () if versions is None and name in self._wanted else versions

    # ---- ensembles and the models they need

    def _identities(self, name: str) -> list[str]:
        """The models wanted that are called so."""
        return sorted(model for model in self._wanted if split(model)[1] == name)

    def _resolve(self, ensemble: str, name: str) -> str:
        """Which model of that name an ensemble means: that of its own namespace, or the only one there is."""
        if not self.options.namespacing:
            return name
        own = identity(split(ensemble)[0], name)
        if own in self._wanted:
            return own
        others = self._identities(name)
        return others[0] if len(others) == 1 else own

    def _resolve_on_disk(self, ensemble: str, name: str) -> str:
        if not self.options.namespacing:
            return name
        own = identity(split(ensemble)[0], name)
        places = [model for model in self._names if split(model)[1] == name]
        return own if own in places or len(places) != 1 else places[0]

    async def _peek(self, found: FoundModel) -> None:
        """Reads the config, so that what the model needs is known before its turn. Raises what is wrong with it."""
        config = await _off_loop(self._read_config, found.directory, split(found.name)[1])
        self._dependencies.note(found.name, config)
        self._read[found.name] = found, config
        self._names.add(found.name)

    def _generation(self, ensemble: str) -> str:
        needed = self._dependencies.names_needed_by(ensemble)
        return self._dependencies.generation(self._resolve(ensemble, name) for name in needed)

    def _needed(self, model: str) -> Needed | None:
        if model not in self._wanted:
            return None
        why = self._problems.get(model, "").removeprefix(f"load failed for model '{model}': ")
        return Needed(tuple(self._lifecycle.ready(model)), why, model in self._invalid)

    def _with_steps(self, name: str, plan: _Plan) -> _Plan:
        """The plan of an ensemble with the models of its steps as they are now. One that cannot be without what it
        lacks is not served any more. Raises InvalidArgument."""
        self._considered[name] = generation = self._generation(name)
        config = deepcopy(plan.config)
        config.name = config.name or split(name)[1]
        for step in config.ensemble_scheduling.step:
            step.model_namespace = split(self._resolve(name, step.model_name))[0]
        what = self._dependencies.problem(name, self._needed, self._resolve)
        if not what:
            try:
                self._check_ensemble(config)
            except DoorstepError as error:
                what = error.message
        if what:
            self._invalid.add(name)
            self._take_down(name)
            logger.error("%s", what, extra={"model": name})
            raise InvalidArgument(f"load failed for model '{name}': {what}\n")
        self._invalid.discard(name)
        return replace(
            plan,
            stamps={version: f"{stamp}-{generation}" for version, stamp in plan.stamps.items()},
            specs={version: replace(spec, config=deepcopy(config)) for version, spec in plan.specs.items()},
        )

    async def _reconsider_all(self, name: str, within: Sequence[str] = ()) -> None:
        """Serves the ensembles that need `name` anew, or no more. One of whose models another is under way is left to
        whoever ends last, and those that it is loaded for have their turn still to come."""
        if self._stopping:
            return
        for ensemble in self._dependencies.that_need(name, self._ensembles):
            busy = any(
                self._turns.busy(self._resolve(ensemble, needed))
                for needed in self._dependencies.names_needed_by(ensemble)
            )
            if ensemble not in within and not busy and self._considered.get(ensemble) != self._generation(ensemble):
                await self._reconsider(ensemble)

    async def _reconsider(self, name: str) -> None:
        async with self._turns.take(name):
            known = self._ensembles.get(name)
            if known is None:
                return
            try:
                await self._serve(*known)
            except InvalidArgument:
                pass  # logged, and in the index
        await self._reconsider_all(name)

    def _take_down(self, name: str) -> None:
        if self._lifecycle.ready(name):
            self._dependencies.changed(name)
        self._applied.pop(name, None)
        self._loader.take_down(name)

    # ---- what all of them come to; the caller holds the model's turn

    def _is_served(self, found: FoundModel) -> bool:
        """Nothing has changed since: there is nothing to do."""
        name = found.name
        if self._applied.get(name) != found:
            return False
        if name in self._ensembles and self._considered.get(name) != self._generation(name):
            return False
        self._problems.pop(name, None)
        return True

    async def _plan(self, found: FoundModel, config: Any = None) -> _Plan:
        """What is to be served of what was found. Raises what is wrong with the config."""
        namespace, name = split(found.name)
        special = ""
        read = self._read.pop(found.name, None)
        if config is None:
            if read is not None and read[0] == found:
                config = read[1]
            else:
                config = await _off_loop(self._read_config, found.directory, name)
        else:  # loads again even where no file has changed, and so does the next load without an override
            special = f"-override-{next(self._override_number)}"
        if config.name and config.name != name:
            what = f"unexpected directory name '{name}' for model '{config.name}'"
            raise InvalidArgument(f"{what}, directory name must equal model name")
        if config.model_repository_agents.agents:
            await _off_loop(run_agents, config, found.directory)
        self._dependencies.note(found.name, config)
        chosen, absent = choose(policy_of(config), found.versions)
        for version in absent:
            line = "version %d is specified for model '%s', but the version directory is not present"
            logger.error(line, version, name, extra={"model": name})
        for directory in found.ignored:
            line = "ignore version directory '%s' which contains leading zeros in its directory name"
            logger.warning(line, directory, extra={"model": name})
        return _Plan(
            stamps={v: f"{found.common}-{found.versions[v]}{special}" for v in chosen},
            specs={
                v: VersionSpec(
                    name,
                    str(v),
                    found.directory,
                    found.directory / str(v),
                    deepcopy(config),
                    namespace,
                    f"{found.beside}-{found.versions[v]}",
                )
                for v in chosen
            },
            overridden=bool(special),
            config=config,
        )

    async def _serve(self, found: FoundModel, plan: _Plan, files: OverrideDirectory | None = None) -> None:
        """Raises InvalidArgument, and leaves what was served, if any version cannot be loaded."""
        name = found.name
        self._wanted.add(name)
        self._applied.pop(name, None)
        try:
            if not plan.specs:
                what = f"at least one version must be available under the version policy of model '{name}'"
                advice = partial(without_versions, found.directory, is_ensemble=plan.is_ensemble)
                fix = "" if found.versions else f" ({await _off_loop(advice)})"
                logger.error("failed to load model '%s': %s%s", name, what, fix, extra={"model": name})
                raise InvalidArgument(f"load failed for model '{name}': {what}\n")
            if plan.is_ensemble:
                self._ensembles[name] = found, plan
                plan = self._with_steps(name, plan)
            else:
                self._ensembles.pop(name, None)
            served = self._lifecycle.ready(name)
            await self._loader.bring_up(name, plan.specs, plan.stamps, files)
            if self._lifecycle.ready(name) != served:
                self._dependencies.changed(name)
        except InvalidArgument as error:
            self._problems[name] = error.message.rstrip("\n")  # logged already
            raise
        self._forget(name)
        if not plan.overridden:
            self._applied[name] = found

    def _note(self, name: str, error: DoorstepError) -> str:
        """Remembers, and says once, why a model cannot be told."""
        reason = NOT_UNIQUE if isinstance(error, DuplicateModel) else error.message.rstrip("\n")
        if self._problems.get(name) != reason:
            self._problems[name] = reason
            text = error.message if isinstance(error, DuplicateModel) else f"failed to poll model '{name}': {reason}"
            logger.error("%s", text, extra={"model": name})
        return error.message

    def _forget(self, name: str) -> None:
        """What was remembered of a model no longer holds."""
        self._applied.pop(name, None)
        self._problems.pop(name, None)
        self._setbacks.forget(name)

    # ---- tasks and turns

    def _check_explicit(self) -> None:
        if self._stopping:
            raise Unavailable("Server not ready")
        if self.options.control != "explicit":
            raise Unavailable("explicit model load / unload is not allowed if polling is enabled")

    def _operation(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs on even where whoever asked for it goes away."""
        task = asyncio.get_running_loop().create_task(work)
        self._operations.add(task)
        task.add_done_callback(self._operations.discard)
        return task

    async def _finish(self, task: asyncio.Task[None]) -> None:
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by `stop`
                raise Unavailable("Server not ready") from None
            task.add_done_callback(_seen)
            raise

    def __repr__(self) -> str:
        return f"<ModelRepository {self.options.control} {len(self.serving.all())} versions served>"


def _check_name(name: str) -> None:
    if not name.strip():
        raise InvalidArgument("Model name cannot be empty. Please enter a valid name to deploy.")
    if name.strip() in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise InvalidArgument(f"invalid model name '{name}', model name must not contain path traversal characters")


def _seen(task: asyncio.Task[Any]) -> None:
    """Its failure has been logged where it happened."""
    if not task.cancelled():
        task.exception()


async def _all_over(tasks: Iterable[asyncio.Task[Any]]) -> None:
    if tasks := list(tasks):
        await asyncio.wait(tasks)


async def _off_loop(function: Callable[..., T], *arguments: Any) -> T:
    """Runs what blocks on the disk in a thread. Whatever it raises is a DoorstepError."""
    try:
        return await asyncio.to_thread(function, *arguments)
    except DoorstepError:
        raise
    except Exception as error:
        logger.exception("%s%r failed", getattr(function, "__name__", function), arguments)
        raise Internal(f"unexpected {type(error).__name__}: {error}") from None
