"""`doorstep.Model`: what the author of a Python model derives from. Imports nothing of the server.

import doorstep

class Model(doorstep.Model):
    def predict(self, text: list[str]) -> list[str]:
        return [t.upper() for t in text]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar


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

    What `predict` raises becomes the error of the requests in that call: an internal error with the exception's type
    and text, or, for one of `doorstep.errors`, that very error (`raise InvalidArgument("…")` is the client's fault).
    """

    max_batch_size: ClassVar[int] = 0
    outputs: ClassVar[Mapping[str, Any] | None] = None
    context: ModelContext

    predict: Callable[..., Any]  # def predict(self, …) -> …; may be `async def`

    def load(self) -> None:
        """Called once before the first `predict`: the place to read weights. May be left out."""

    def unload(self) -> None:
        """Called once after the last `predict`. May be left out."""
