"""Other models of the same server, as a `doorstep.Model` calls them: `self.server.infer("name", x=…)`.

Python values and arrays in, arrays out. Knows no transport: that is `ServerAccess`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from doorstep.backends.base import CallResponses, ModelCall, ServerAccess
from doorstep.backends.python import coroutines
from doorstep.backends.python.api import current
from doorstep.errors import BackendError, DoorstepError, InvalidArgument
from doorstep.request import InferenceRequest, Outputs, Parameter
from doorstep.types import BYTES, Array, Tensor, datatype_of


class Answer(dict[str, Array]):
    """A model's outputs by name; BYTES outputs are arrays of `bytes`. `parameters` are those of its response."""

    parameters: Mapping[str, Parameter]

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__({tensor.name: tensor.array for tensor in outputs})
        self.parameters = (outputs.parameters or {}) if type(outputs) is Outputs else {}


class OtherModel:
    """A model of the server, with what is the same for every call of it. Of any thread's."""

    def __init__(self, server: ServerAccess | None, name: str, options: Mapping[str, Any]) -> None:
        self._server = server
        self._name = name
        self._options = options

    def infer(self, **inputs: Any) -> Answer:
        """Waits for the answer. Raises DoorstepError: what the model, or the server, answered with."""
        answers = list(self.stream(**inputs))
        return self._only(answers)

    async def infer_async(self, **inputs: Any) -> Answer:
        """As `infer`, in `async def predict`; many may be on their way."""
        return self._only([answer async for answer in self.stream(**inputs)])

    def stream(self, **inputs: Any) -> Answers:
        """The answers of a model that gives several, one by one: for `for` and for `async for`."""
        if self._server is None:
            raise BackendError("the model does not run in a server, so there is none to ask")
        tensors = [_tensor(name, value) for name, value in inputs.items()]
        return Answers(self._server.call(ModelCall(self._name, tensors, parent=_parent(), **self._options)))

    def _only(self, answers: Sequence[Answer]) -> Answer:
        if len(answers) != 1:
            raise BackendError(f"model '{self._name}' gave {len(answers)} answers; take them with `stream`")
        return answers[0]


class Answers(Iterator[Answer], AsyncIterator[Answer]):
    """Answers as they come. Raises DoorstepError where one is an error."""

    def __init__(self, responses: CallResponses) -> None:
        self._responses = responses
        self._over = False

    def __next__(self) -> Answer:
        while not self._over:
            outputs, self._over = self._responses.get()
            if isinstance(outputs, DoorstepError):
                raise outputs
            if outputs is not None:
                return Answer(outputs)
        raise StopIteration

    async def __anext__(self) -> Answer:
        while not self._over:
            await self._ready()
            outputs, self._over = self._responses.get(0)
            if isinstance(outputs, DoorstepError):
                raise outputs
            if outputs is not None:
                return Answer(outputs)
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Nobody wants what is still to come."""
        if not self._over:
            self._responses.cancel()

    async def _ready(self) -> None:
        try:
            await coroutines.until_ready(self._responses, self.cancel)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __iter__(self) -> Answers:
        return self

    def __aiter__(self) -> Answers:
        return self


class ModelServer:
    """The server that a `doorstep.Model` runs in; `self.server` there."""

    def __init__(self, server: ServerAccess | None) -> None:
        self._server = server

    def infer(self, model: str, /, **inputs: Any) -> Answer:
        """One answer of another model: `self.server.infer("tokenizer", text=["a"])["ids"]`. Raises DoorstepError."""
        return self.model(model).infer(**inputs)

    async def infer_async(self, model: str, /, **inputs: Any) -> Answer:
        return await self.model(model).infer_async(**inputs)

    def stream(self, model: str, /, **inputs: Any) -> Answers:
        return self.model(model).stream(**inputs)

    def model(
        self,
        name: str,
        version: str = "",
        *,
        outputs: Sequence[str] = (),
        parameters: Mapping[str, Parameter] | None = None,
        timeout_us: int = 0,
        priority: int = 0,
        sequence: int | str = 0,
        sequence_start: bool = False,
        sequence_end: bool = False,
    ) -> OtherModel:
        """Another model with more said about it; no `version`: the newest."""
        options = {
            "model_version": str(version),
            "requested_outputs": tuple(outputs),
            "parameters": dict(parameters) if parameters else None,
            "timeout_us": timeout_us,
            "priority": priority,
            "correlation_id": sequence,
            "sequence_start": sequence_start,
            "sequence_end": sequence_end,
        }
        return OtherModel(self._server, name, options)

    def ready(self, model: str, version: str = "") -> bool:
        """Whether a model would take a request now. Raises NotFound for one the server does not know."""
        if self._server is None:
            raise BackendError("the model does not run in a server, so there is none to ask")
        return bool(self._server.ask("model_ready", {"name": model, "version": str(version)}))


def _parent() -> InferenceRequest | None:
    """The request that `predict` runs, where it is one alone: what it asks for is cancelled with it."""
    running = current.get()
    return running.requests[0] if running is not None and len(running.requests) == 1 else None


def _tensor(name: str, value: Any) -> Tensor:
    """A single value has shape [1]; lists have one dimension each. Strings are sent as UTF-8."""
    if not isinstance(value, np.ndarray):
        if isinstance(value, str | bytes | bool | int | float | np.generic):
            value = [value]
        elif not isinstance(value, list | tuple):
            raise InvalidArgument(
                f"input '{name}' is a {type(value).__name__}; an array, a list or a value is expected"
            )
        value = _array(name, value)
    if value.dtype.kind in "SU":
        value = value.astype(object)
    try:
        datatype = datatype_of(value)
    except KeyError:
        raise InvalidArgument(f"input '{name}' is an array of {value.dtype}, which no datatype is") from None
    if datatype is BYTES:
        flat = [item.encode() if isinstance(item, str) else bytes(item) for item in value.ravel().tolist()]
        shape = value.shape
        value = np.empty(len(flat), object)
        value[:] = flat
        value = value.reshape(shape)
    return Tensor(name, datatype, value)


def _array(name: str, value: Sequence[Any]) -> Array:
    first: Any = value
    while isinstance(first, list | tuple) and first:
        first = first[0]
    try:
        return np.array(value, object if isinstance(first, str | bytes) else None)
    except ValueError as error:
        raise InvalidArgument(f"input '{name}' is no tensor: {error}") from None
