"""`doorstep.Model`: what the author of a Python model derives from. Imports nothing of the server.

import doorstep

class Model(doorstep.Model):
    def predict(self, text: list[str]) -> list[str]:
        return [t.upper() for t in text]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from doorstep.backends.python.calling import ModelServer


@dataclass(frozen=True, slots=True)
class ModelContext:
    """What a model is told about itself; `self.context` in a `doorstep.Model`, from `__init__` on."""

    name: str
    version: str
    instance: str  # <group>_<number>
    directory: Path  # <repository>/<model>/<version>: where model.py is
    model_directory: Path  # <repository>/<model>
    parameters: Mapping[str, str] = field(default_factory=dict)  # `parameters` of config.pbtxt
    config: Mapping[str, Any] = field(default_factory=dict)  # the complete config, as JSON has it
    kind: str = "KIND_CPU"
    device_id: int = 0
    threads: int = 0  # how many cores this instance may count on; 0: not said
    log: Callable[[str], None] = print  # one line into the server's log; `print` works as well


@dataclass(slots=True)
class Request:
    """What a request says beside its inputs; `self.request` while `predict` runs."""

    id: str
    parameters: Mapping[str, Any]  # the client's custom parameters
    sequence: int | str  # the correlation id; 0: part of no sequence
    timeout_us: int  # 0: none
    is_cancelled: Callable[[], bool]  # whether the client has left, or has cancelled: ask now and then in long work
    response_parameters: dict[str, Any] = field(default_factory=dict)  # put in what the next response is to say


class Running:
    """The requests of the call of `predict` that runs; what is told of them is made when somebody asks."""

    __slots__ = ("requests", "told")

    def __init__(self, requests: Sequence[Any]) -> None:
        self.requests = requests  # the server's
        self.told: list[Request] | None = None

    def tell(self) -> list[Request]:
        if self.told is None:
            self.told = [
                Request(r.id, r.parameters or {}, r.correlation_id, r.timeout_us, partial(getattr, r, "cancelled"))
                for r in self.requests
            ]
        return self.told


current: ContextVar[Running | None] = ContextVar("current", default=None)


class Model:
    """Derive from it and write `predict`; its type hints are the model's inputs and outputs.

    Arguments are inputs by name; one with a default value, or `| None`, is optional. Types:

    - `str`, `bytes`, `int`, `float`, `bool`: one value, shape [1]
    - `list[str]` …, `list[list[float]]` …: any number of values, one dimension per `list`
    - `npt.NDArray[np.float32]`: an array of one dimension; `Annotated[npt.NDArray[np.float32], (3, 224, 224)]` says
      another shape, where -1 is any size; `np.ndarray[tuple[int, int], np.dtype[np.float32]]` says two dimensions

    Python's `int` is INT64, `float` FP64, `str` and `bytes` BYTES (str: UTF-8).

    A plain return value is the output named "output". For several outputs return a TypedDict, a NamedTuple or a
    dataclass, annotated; or a dict, with the class attribute `outputs` saying what is in it:
    `outputs = {"label": list[str], "score": list[float]}`.

    With `max_batch_size` above 0 requests are put together: every argument then has the batch as its first dimension
    (`list[str]` holds one string per row), and every output must have as many rows. Otherwise each request is a call.

    A `predict` that yields answers with several responses, one for each `yield` (a decoupled model, for streaming
    clients); its hint is `Iterator[str]`, or `AsyncIterator[str]` for an `async def`.

    `self.server` calls other models of the server; `self.request` is the request being run, and `self.requests` are all
    those of the batch.

    What `predict` raises becomes the error of the requests in that call: an internal error with the exception's type
    and text, or, for one of `doorstep.errors`, that very error (`raise InvalidArgument("…")` is the client's fault).
    """

    max_batch_size: ClassVar[int] = 0
    outputs: ClassVar[Mapping[str, Any] | None] = None
    context: ModelContext
    server: ModelServer

    predict: Callable[..., Any]  # def predict(self, …) -> …; may be `async def`, and may yield

    @property
    def request(self) -> Request:
        """Inside `predict` only."""
        return self.requests[0]

    @property
    def requests(self) -> Sequence[Request]:
        """One for each request of the batch, in the order of its rows."""
        running = current.get()
        if running is None:
            raise RuntimeError("self.request is there while predict runs")
        return running.tell()

    def load(self) -> None:
        """Called once before the first `predict`: the place to read weights. May be left out."""

    def unload(self) -> None:
        """Called once after the last `predict`. May be left out."""
