"""Runs a `doorstep.Model`: requests in, calls of `predict`, outputs out. Knows no process and no protocol."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from doorstep.backends.base import InstanceContext, ModelInstance
from doorstep.backends.python import coroutines
from doorstep.backends.python.api import ModelContext, Running, current
from doorstep.backends.python.calling import ModelServer
from doorstep.backends.python.hints import Hint, ToValue, to_array, to_value
from doorstep.backends.python.signature import read_signature
from doorstep.backends.python.source import Source, describe, location_of, problem_of
from doorstep.config.model import TensorSpec
from doorstep.config.render import config_json
from doorstep.errors import BackendError, DoorstepError
from doorstep.request import LATER, Batch, InferenceRequest, Outputs
from doorstep.types import Array, Tensor

_ANY_ARRAY = Hint("np.ndarray", "array", None, None, None)


class PredictInstance(ModelInstance):
    def __init__(self, source: Source, context: InstanceContext) -> None:
        """Makes the model and calls its `load`. Raises BackendError."""
        config = context.config
        self._source = source
        self._name = config.name
        self._context = context
        self._batched = config.max_batch_size > 0
        signature, problems = read_signature(source.model, source.module)
        if problems:
            raise BackendError(f"{source.path}: {'; '.join(problems)}")
        self._to_values: dict[str, ToValue] = {}
        self._reshaped = {name: spec for name, spec in config.inputs.items() if spec.reshape is not None}
        for name, spec in config.inputs.items():
            if name not in signature.inputs:
                raise BackendError(f"{source.path}: config has input '{name}', but predict has no such argument")
            self._to_values[name] = to_value(signature.inputs[name] or _ANY_ARRAY, name, spec.datatype)
        hints = signature.outputs or {}
        self._outputs = [(name, spec, hints.get(name, _ANY_ARRAY)) for name, spec in config.outputs.items()]
        self._unpack = signature.unpack
        self._streams = signature.streams
        try:
            self._model = _make(source.model, context)
            self._model.load()
        except DoorstepError:
            raise
        except BaseException as error:  # SystemExit too
            self._log_traceback(error)
            raise BackendError(f"load() of model '{self._name}' failed: {problem_of(error, source.path)}") from error
        self._predict: Callable[..., Any] = self._model.predict

    def execute(self, batch: Batch) -> None:
        requests = batch.requests
        batch.input_end_ns = time.monotonic_ns()
        if self._streams:
            for i, request in enumerate(requests):
                batch.results[i] = LATER
                self._stream(batch, request)
            return
        if not self._batched:
            for i, request in enumerate(requests):
                batch.results[i] = self._run_alone(request)
            return
        groups: dict[Any, list[int]] = {}
        for i, request in enumerate(requests):
            key = tuple((name, tensor.array.shape[1:]) for name, tensor in sorted(request.inputs.items()))
            groups.setdefault(key, []).append(i)
        for members in groups.values():
            self._run_together(batch, members)

    def unload(self) -> None:
        self._model.unload()

    def _run_alone(self, request: InferenceRequest) -> Sequence[Tensor] | DoorstepError:
        try:
            arrays = {name: tensor.array for name, tensor in request.inputs.items()}
            told = self._tell([request])
            tensors = self._call(arrays, None)
        except Exception as error:
            return self._error(error)
        return _answer(_asked_for(tensors, request), told, 0)

    def _run_together(self, batch: Batch, members: list[int]) -> None:
        """Requests of the same inputs and row shapes, as one call."""
        requests = [batch.requests[i] for i in members]
        try:
            if len(requests) == 1:
                arrays = {name: tensor.array for name, tensor in requests[0].inputs.items()}
            else:
                arrays = {
                    name: np.concatenate([request.inputs[name].array for request in requests])
                    for name in requests[0].inputs
                }
            told = self._tell(requests)
            tensors = self._call(arrays, sum(request.rows for request in requests))
        except Exception as error:
            failed = self._error(error)
            for i in members:
                batch.results[i] = failed
            return
        start = 0
        for number, (i, request) in enumerate(zip(members, requests, strict=True)):
            end = start + request.rows
            piece = [Tensor(t.name, t.datatype, t.array[start:end]) for t in tensors] if len(requests) > 1 else tensors
            batch.results[i] = _answer(_asked_for(piece, request), told, number)
            start = end

    def _tell(self, requests: Sequence[InferenceRequest]) -> Running:
        """What `self.request`, and calls of other models, see from here on."""
        running = Running(requests)
        current.set(running)
        return running

    # Several responses

    def _stream(self, batch: Batch, request: InferenceRequest) -> None:
        """Sends a response for everything that `predict` yields."""
        try:
            told = self._tell([request])
            values = self._predict(**self._values({name: tensor.array for name, tensor in request.inputs.items()}))
            if hasattr(values, "__aiter__"):
                coroutines.start(self._stream_async(batch, request, told, values), _nothing_is_left)
                return
            for value in values:
                if request.cancelled:
                    break
                self._yielded(batch, request, told, value)
            if hasattr(values, "close"):
                values.close()  # what it has to give back, it gives back now
        except Exception as error:
            batch.emit(request, self._error(error), True)
        else:
            batch.emit(request, None, True)

    async def _stream_async(self, batch: Batch, request: InferenceRequest, told: Running, values: Any) -> None:
        """Beside the next batch: many may be on their way."""
        try:
            async for value in values:
                if request.cancelled:
                    break
                self._yielded(batch, request, told, value)
            if hasattr(values, "aclose"):
                await values.aclose()
        except BaseException as error:
            batch.emit(request, self._error(error), True)
            if not isinstance(error, Exception):
                raise
        else:
            batch.emit(request, None, True)

    def _yielded(self, batch: Batch, request: InferenceRequest, told: Running, value: Any) -> None:
        tensors = _asked_for(self._tensors(value, request.rows if self._batched else None), request)
        answer = _answer(tensors, told, 0)
        if isinstance(answer, DoorstepError):
            raise answer
        batch.emit(request, answer, False)
        if told.told is not None:
            told.told[0].response_parameters.clear()

    # One call

    def _call(self, arrays: Mapping[str, Array], rows: int | None) -> list[Tensor]:
        value = self._predict(**self._values(arrays))
        if asyncio.iscoroutine(value):
            value = coroutines.run(value)
        return self._tensors(value, rows)

    def _values(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
        to_values = self._to_values
        for name, spec in self._reshaped.items():
            if name in arrays:
                array = arrays[name]
                lead = array.shape[: len(spec.shape) - len(spec.dims)]
                arrays = {**arrays, name: array.reshape(lead + (spec.reshape or ()))}
        return {name: to_values[name](array) for name, array in arrays.items()}

    def _tensors(self, value: Any, rows: int | None) -> list[Tensor]:
        named = self._unpack(value)
        if len(named) != len(self._outputs):
            self._check_names(named)
        return [self._output(name, spec, hint, named, rows) for name, spec, hint in self._outputs]

    def _output(self, name: str, spec: TensorSpec, hint: Hint, named: Mapping[str, Any], rows: int | None) -> Tensor:
        if name not in named:
            self._check_names(named)
        array = to_array(hint, name, spec.datatype, named[name])
        expected = spec.shape
        if array.ndim == len(expected) - 1 and expected[-1] in (1, -1):
            array = array.reshape((*array.shape, 1))  # one value, or one for each row
        elif spec.reshape is not None and array.ndim == len(expected) - len(spec.dims) + len(spec.reshape):
            array = array.reshape(array.shape[: len(expected) - len(spec.dims)] + spec.dims)
        shape = array.shape
        if len(shape) != len(expected) or any(e not in (-1, s) for e, s in zip(expected, shape, strict=True)):
            raise BackendError(f"output '{name}' has shape {list(shape)}; expected {list(expected)}")
        if rows is not None and shape[0] != rows:
            raise BackendError(f"output '{name}' has {shape[0]} rows; the batch has {rows}, and each must get its own")
        return Tensor(name, spec.datatype, array)

    def _check_names(self, named: Mapping[str, Any]) -> None:
        expected = [name for name, _, _ in self._outputs]
        missing = [name for name in expected if name not in named]
        unknown = [str(name) for name in named if name not in expected]
        if missing:
            raise BackendError(f"predict returned no output '{missing[0]}'; it returned: {', '.join(named) or 'none'}")
        raise BackendError(
            f"predict returned '{unknown[0]}', which is no output; the outputs are: {', '.join(expected)}"
        )

    def _error(self, error: BaseException) -> DoorstepError:
        if isinstance(error, DoorstepError):
            return error
        self._log_traceback(error)
        return BackendError(describe(error))

    def _log_traceback(self, error: BaseException) -> None:
        if self._context.log is not None:
            text = "".join(traceback.format_exception(error)).rstrip()
            where = location_of(error, self._source.path)
            self._context.log("ERROR", f"model '{self._name}' raised at {where}\n{text}")


def _make(model: type[Any], context: InstanceContext) -> Any:
    """The model object; its `context` is there before `__init__` runs, whether or not that calls ours."""
    made: Any = object.__new__(model)
    log = context.log
    made.context = ModelContext(
        name=context.config.name,
        version=context.version,
        instance=context.instance_name,
        directory=context.version_directory,
        model_directory=context.model_directory,
        parameters=context.config.parameters,
        config=config_json(context.config.proto),
        kind=context.kind,
        device_id=context.device_id,
        threads=context.threads,
        log=(lambda text: log("INFO", str(text))) if log is not None else print,
    )
    made.server = ModelServer(context.server)
    made.__init__()
    return made


def _nothing_is_left(error: BaseException | None) -> None:
    """What went wrong has been said to the client, and to the log."""


def _answer(tensors: list[Tensor], running: Running, number: int) -> Sequence[Tensor] | DoorstepError:
    """The outputs with the parameters that the model put in `self.request.response_parameters`, if any."""
    if running.told is None:
        return tensors
    parameters = running.told[number].response_parameters
    for key, value in parameters.items():
        if not isinstance(key, str) or not isinstance(value, bool | int | str | float):
            return BackendError(f"response parameter {key!r} is {value!r}; bool, int, float and str are sent")
    return Outputs(tensors, dict(parameters)) if parameters else tensors


def _asked_for(tensors: list[Tensor], request: InferenceRequest) -> list[Tensor]:
    if not request.requested_outputs:
        return tensors
    return [tensor for tensor in tensors if tensor.name in request.requested_outputs]
