"""What a framework's author writes: a `Backend` that loads models and a `ModelInstance` that runs them.

Knows no protocol, queue, thread or process: whoever calls it decides where it runs. One instance is never called by two
threads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from doorstep.backends.gather import Gatherer, Run
from doorstep.backends.ragged import RaggedGatherer
from doorstep.config.host_policy import ANYWHERE, HostPolicy
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError
from doorstep.request import Batch, InferenceRequest, Parameter
from doorstep.types import Array, Tensor

Execution = Literal["inline", "thread", "process", "auto"]


@dataclass(slots=True)
class ModelCall:
    """A request that model code makes of another model of the same server (Triton's BLS)."""

    model_name: str
    inputs: Sequence[Tensor]
    model_version: str = ""
    id: str = ""
    requested_outputs: Sequence[str] = ()
    parameters: dict[str, Parameter] | None = None
    correlation_id: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    timeout_us: int = 0
    priority: int = 0
    parent: InferenceRequest | None = None  # the request being run: cancelled with it, and traced as its child
    waiter: InferenceRequest | None = None  # only cancelled with it, if that is cancelled later


class CallResponses(Protocol):
    """The responses to a ModelCall, in order; the last is final. Of any thread's, but of one at a time."""

    def get(self, timeout: float | None = None) -> tuple[Sequence[Tensor] | DoorstepError | None, bool]:
        """The next (outputs, final), waiting for it; outputs None: only the news that no more comes. Raises
        TimeoutError. Not to be called again after the final one."""

    def notify(self, ready: Callable[[], None]) -> None:
        """Calls `ready` once, in whichever thread notices, as soon as `get` would not wait; maybe before this
        returns."""

    def cancel(self) -> None:
        """Nobody wants what is still to come; a final response comes all the same."""

    def stop(self) -> None:
        """The model is asked to stop. One that does not look goes on, and its responses come."""


class ServerAccess(Protocol):
    """What model code may ask of the server it runs in. Callable from any thread but the event loop's; may block."""

    def call(self, call: ModelCall) -> CallResponses:
        """Sends a request to another model. A refusal comes as the first response, which is an error."""

    def ask(self, what: str, payload: Any, data: bytes = b"") -> Any:
        """Asks one of `Services.handlers` and waits for its answer. Raises DoorstepError."""

    def tell(self, what: str, payload: Any) -> None:
        """As `ask`, without an answer: in order, and never waiting for the server."""


@dataclass(frozen=True, slots=True)
class PythonEnvironment:
    """Another Python for a model's process than the one the server runs in.

    The process has doorstep and what it needs all the same: the server's own packages come last on `sys.path` where
    both are the same minor version of Python; where they are not, the environment needs doorstep's requirements.
    """

    executable: Path | None = None  # None: the server's
    paths: tuple[str, ...] = ()  # first on sys.path
    variables: Mapping[str, str] = field(default_factory=dict)  # of the process; they win over the server's


@dataclass(frozen=True, slots=True)
class InstanceContext:
    """Everything an instance is told about itself."""

    config: ModelConfig
    version: str
    model_directory: Path  # <repository>/<model>
    version_directory: Path  # <repository>/<model>/<version>
    instance_name: str = ""  # <group>_<number>
    kind: str = "KIND_CPU"
    device_id: int = 0
    threads: int = 0  # how many cores this instance may count on; 0: the backend's own default
    backend_config: Mapping[str, str] = field(default_factory=dict)  # --backend-config=<backend>,<key>=<value>
    log: Callable[[str, str], None] | None = None  # log(level, message); level is INFO, WARNING, ERROR or VERBOSE
    host_policy: HostPolicy = ANYWHERE  # where its threads run
    server: ServerAccess | None = None  # None: there is no server to ask (doorstep check, a test)
    python: PythonEnvironment | None = None  # for an instance in a process; None: the server's own

    def artefact(self, default_filename: str) -> Path:
        """The model's file or folder: default_model_filename from the config, or what the backend calls it."""
        return self.version_directory / (self.config.proto.default_model_filename or default_filename)


class ModelInstance(ABC):
    """One executable copy of a model."""

    @abstractmethod
    def execute(self, batch: Batch) -> None:
        """Runs `batch`: sets `batch.results[i]` to the outputs, or the error, of `batch.requests[i]`.

        Also stamps `batch.input_end_ns` and `batch.output_start_ns` where it knows them. Whatever it raises fails the
        requests that have no result yet. Outputs a request did not ask for may be left out. Where a model is decoupled
        the result is LATER and the responses go out through `batch.emit` (see Batch).
        """

    def is_ready(self) -> bool:
        """Whether the instance can serve now: asked when a client asks whether the model is ready.

        The one method that another thread may call while `execute` runs."""
        return True

    def may_be_unready(self) -> bool:
        """Whether `is_ready` has anything to say; if not, nobody asks. Called once, after loading."""
        return type(self).is_ready is not ModelInstance.is_ready

    def unload(self) -> None:  # noqa: B027 (many have nothing to give back)
        """Gives back what the instance holds. Called once, after the last execute."""


class TensorInstance(ModelInstance):
    """For libraries that map named arrays to named arrays: gathers a batch, calls `run`, scatters what it returns."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._gather = gatherer(config, self.run)

    @abstractmethod
    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        """Runs the model once. `inputs` have the batch dimension first where the model batches; `outputs` names what
        somebody asked for. BYTES arrays hold `bytes` on the way in and may hold `str` or `bytes` on the way out."""

    def execute(self, batch: Batch) -> None:
        self._gather(batch)


def gatherer(config: ModelConfig, run: Run) -> Gatherer:
    """What gathers this model's batches."""
    return RaggedGatherer(config, run) if config.ragged else Gatherer(config, run)


class Backend(ABC):
    """A library that runs models, found by name. One object per server; keeps no state of any one model."""

    name: str
    default_filename: str = ""  # the artefact's name inside a version's folder: model.onnx …
    default_execution: Execution = "auto"  # where instances run unless the model's config says otherwise
    models_are_code: bool = False  # complete_config runs code of the model's: in a process of its own, never in a check

    def complete_config(  # noqa: B027 (not every backend can tell)
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        """Fills in what the config leaves out, from the model's files; `proto` is an inference.ModelConfig message.

        Never overwrites what the user wrote. Raises ConfigError with every problem found. Called in the loader pool."""

    def environment(
        self, proto: Any, model_directory: Path, version_directory: Path, backend_config: Mapping[str, str]
    ) -> PythonEnvironment | None:
        """The Python for the model's processes; None: the server's own. Asked before a process starts, for
        `complete_config` and for the instances. Raises DoorstepError. Called in the loader pool, maybe many times."""
        return None

    @abstractmethod
    def load_instance(self, context: InstanceContext) -> ModelInstance:
        """Loads one copy of the model. Called in the loader pool, or in the instance's own process."""

    def slots(self, config: ModelConfig) -> int:
        """How many requests an instance works on at once, of a backend that takes them one by one, answers each when it
        is ready (LATER), and batches by itself, as engines of language models do. 0: it gets batches, one at a time."""
        return 0

    def may_run_inline(self, context: InstanceContext) -> bool:
        """Whether `execution: auto` should try this model on the event loop, and measure. Cheap; loads nothing."""
        return False


@dataclass(frozen=True, slots=True)
class CompletionContext:
    """What a backend may need to complete a config."""

    backend_config: Mapping[str, str] = field(default_factory=dict)
    default_max_batch_size: int = 4  # --backend-config=default-max-batch-size=<n>
