"""InferenceServer: what every protocol talks to. Knows models and the repository; no protocol, no connection.

All methods are called on the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from doorstep._version import __version__
from doorstep.client_memory import Regions
from doorstep.errors import DoorstepError, ErrorCode, Unavailable
from doorstep.model import Model
from doorstep.repository.base import IndexEntry, LoadRequest
from doorstep.repository.repository import ModelRepository, StartReport
from doorstep.request import InferenceRequest
from doorstep.scheduler.dynamic import STOPPING
from doorstep.trace import Tracer

# The names tritonserver lists, in its order; clients look for them (protocol/README.md).
EXTENSIONS = (
    "classification",
    "sequence",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
)


class TraceControl(Protocol):
    """Trace settings, as far as clients may see and change them."""

    def update(self, model: str, changes: Mapping[str, Any]) -> None:
        """`model` "": the setting of all. None as a change clears the field. Raises InvalidArgument."""

    def describe(self, model: str) -> dict[str, list[str]]: ...


class LogControl(Protocol):
    """Log settings, likewise."""

    def update(self, changes: Mapping[str, Any]) -> None: ...

    def describe(self) -> dict[str, str | bool | int]: ...


class InferenceServer:
    def __init__(
        self,
        repository: ModelRepository[Model],
        *,
        name: str = "doorstep",
        strict_readiness: bool = True,
        regions: Regions | None = None,
    ) -> None:
        self.regions = regions or Regions()  # shared memory of clients'
        self.name = name
        self.version = __version__
        self.extensions = list(EXTENSIONS)
        self.repository = repository
        self._find = repository.find
        self.trace_settings: TraceControl | None = None
        self.log_settings: LogControl | None = None
        self.tracer: Tracer | None = None  # while requests may be traced; fronts ask it about each
        self._strict_readiness = strict_readiness
        self._started = False  # the repository has loaded, or tried to load, what it should at start-up
        self._stopping = False

    # Health

    @property
    def live(self) -> bool:
        """Whoever can ask is answered by a living process."""
        return True

    @property
    def ready(self) -> bool:
        """Started, not stopping and, with --strict-readiness, every model that should be served is."""
        if self._stopping or not self._started:
            return False
        return not self._strict_readiness or self.repository.all_ready

    def model_ready(self, name: str, version: str = "") -> bool:
        """Raises NotFound for a model or version that is not there; False while it loads, or after it failed to."""
        try:
            self._find(name, version)
        except DoorstepError as error:
            if error.code is ErrorCode.UNAVAILABLE:
                return False
            raise
        return not self._stopping

    async def check_ready(self, name: str, version: str = "") -> bool:
        """`model_ready`, and then what the model's instances say, which may take seconds. Raises NotFound."""
        if not self.model_ready(name, version):
            return False
        return await self._find(name, version).check_ready()

    # Inference

    def infer(self, request: InferenceRequest, model: Model | None = None) -> None:
        """Takes the request: from here on it is answered through its sender, maybe before this returns.

        `model` is what `model()` gave for the request in this very turn of the loop, where the caller needed it anyway.
        Raises DoorstepError for one that is refused; it is still the caller's then."""
        if self._stopping and not self._goes_on(request):
            raise Unavailable(STOPPING)
        if model is None:
            model = self._find(request.model_name, request.model_version)
        model.infer(request)

    def enqueue(self, request: InferenceRequest, model: Model) -> None:
        """As `infer`, for a request that a front of this server made, whose tensors are no client's to name."""
        if self._stopping:
            raise Unavailable(STOPPING)
        model.enqueue(request)

    def _goes_on(self, request: InferenceRequest) -> bool:
        """Whether it belongs to a sequence that may have begun; a server that stops lets those go on."""
        if not request.correlation_id or request.sequence_start:
            return False
        return self._find(request.model_name, request.model_version).sequence_count > 0

    # Models

    def model(self, name: str, version: str = "") -> Model:
        """The ready version, by default the newest. Raises NotFound or Unavailable."""
        return self._find(name, version)

    def versions(self, name: str) -> list[str]:
        """The ready versions, lowest first."""
        return self.repository.versions(name)

    def models(self) -> list[Model]:
        """Every ready version."""
        return self.repository.servables()

    def statistics(self, name: str = "", version: str = "") -> list[Model]:
        """The models whose statistics are asked for: one version, all of a model's, or all. Raises NotFound."""
        if not name:
            return self.models()
        if version:
            return [self._find(name, version)]
        self._find(name)
        return [self._find(name, v) for v in self.versions(name)]

    def index(self, ready_only: bool = False) -> list[IndexEntry]:
        return self.repository.index(ready_only)

    async def refresh_index(self) -> None:
        """Looks at the disk, so that models that came since are in the index."""
        await self.repository.refresh()

    async def load(self, name: str, request: LoadRequest, asker: str = "") -> None:
        """`asker`: a model whose own loading waits for this one."""
        await self.repository.load(name, request, asker)

    async def unload(self, name: str, unload_dependents: bool = False, asker: str = "") -> None:
        await self.repository.unload(name, unload_dependents, asker)

    # Life

    async def start(self) -> StartReport:
        """Loads what should be loaded. What failed is in the report; the others serve."""
        report = await self.repository.start()
        self._started = True
        return report

    def stop_accepting(self) -> None:
        """Not ready from now on, and no new inference but in sequences that have begun."""
        self._stopping = True

    async def drain(self, timeout_s: float) -> bool:
        """Returns when every request taken has been answered and every sequence has ended (True), or after
        `timeout_s`."""
        self._stopping = True
        waiting = [asyncio.ensure_future(model.drain()) for model in self.models() if model.inflight_count]
        waiting += [asyncio.ensure_future(model.sequences_ended()) for model in self.models() if model.sequence_count]
        if not waiting:
            return True
        _, unfinished = await asyncio.wait(waiting, timeout=timeout_s)
        for task in unfinished:
            task.cancel()
        return not unfinished

    async def stop(self, timeout_s: float) -> list[str]:
        """Unloads everything. Returns, after `timeout_s` at the latest, what had not ended by then."""
        self._stopping = True
        return await self.repository.stop(timeout_s)
