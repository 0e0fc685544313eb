"""Runs a `TritonPythonModel`: its life cycle, and batches to and from `execute`. Knows no process and no protocol."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from typing import Any

from doorstep import proto as messages
from doorstep.backends.base import InstanceContext, ModelInstance
from doorstep.backends.python import coroutines, triton_compat
from doorstep.backends.python.source import Source, describe, location_of, problem_of
from doorstep.backends.python.triton_compat import InferenceRequest, InferenceResponse, Tensor, TritonModelException
from doorstep.config.render import config_json
from doorstep.errors import BackendError, ConfigError, DoorstepError, FailureReason, Problem
from doorstep.request import Batch
from doorstep.request import InferenceRequest as Request
from doorstep.types import BYTES, Array
from doorstep.types import Tensor as ServerTensor


def complete_from_triton(proto: Any, source: Source) -> None:
    """Runs the class's `auto_complete_config`, if it has one, and takes over what that may change."""
    complete = getattr(source.model, "auto_complete_config", None)
    if complete is None:
        return
    triton_compat._set_up(str(source.path.parent), None)
    helper = triton_compat.ModelConfig(json.dumps(config_json(proto)))
    try:
        completed = complete(helper)
    except BaseException as error:  # SystemExit too
        raise ConfigError(proto.name, [problem_of(error, source.path)]) from error
    if not isinstance(completed, triton_compat.ModelConfig):
        raise ConfigError(
            proto.name,
            [
                Problem(
                    str(source.path),
                    f"auto_complete_config function in model '{proto.name}' must return a valid pb.ModelConfig object.",
                    "end it with `return auto_complete_model_config`",
                )
            ],
        )
    from google.protobuf import json_format  # slow to import, and few models come here

    try:
        changed = json_format.ParseDict(completed.as_dict(), messages.ModelConfig())
    except json_format.ParseError as error:
        raise ConfigError(
            proto.name, [Problem(str(source.path), f"auto_complete_config made no valid config: {error}")]
        ) from None
    proto.max_batch_size = changed.max_batch_size
    for field in ("input", "output"):
        proto.ClearField(field)
        getattr(proto, field).MergeFrom(getattr(changed, field))
    for field in ("dynamic_batching", "model_transaction_policy"):
        if changed.HasField(field):
            getattr(proto, field).CopyFrom(getattr(changed, field))


class TritonInstance(ModelInstance):
    def __init__(self, source: Source, context: InstanceContext) -> None:
        """Makes the model and calls its `initialize`. Raises BackendError."""
        self._source = source
        self._context = context
        self._name = context.instance_name
        self._all_outputs = sorted(context.config.outputs)
        triton_compat._set_up(str(source.path.parent), context.log)
        if context.config.decoupled:
            raise BackendError(
                f"model '{context.config.name}' is decoupled, which is not supported by this version of Doorstep"
            )
        if not callable(getattr(source.model, "execute", None)):
            raise BackendError(f"Python model {source.path} does not implement `execute` method.")
        try:
            self._model = source.model()
            if hasattr(self._model, "initialize"):
                self._model.initialize(self._arguments())
        except BaseException as error:  # SystemExit too
            self._log_traceback(error)
            raise BackendError(
                f"initialize of model '{context.config.name}' failed: {problem_of(error, source.path)}"
            ) from error

    def execute(self, batch: Batch) -> None:
        requests = [_triton_request(request, self._all_outputs) for request in batch.requests]
        batch.input_end_ns = time.monotonic_ns()
        try:
            responses = self._model.execute(requests)
            if asyncio.iscoroutine(responses):
                responses = coroutines.run(responses)
            batch.output_start_ns = time.monotonic_ns()
            self._check(requests, responses)
        except Exception as error:
            if not isinstance(error, DoorstepError):
                self._log_traceback(error)
            text = str(error) if isinstance(error, DoorstepError | TritonModelException) else describe(error)
            batch.fail(BackendError(f"Failed to process the request(s) for model '{self._name}', message: {text}"))
            return
        for i, response in enumerate(responses):
            batch.results[i] = self._result(batch.requests[i], response)

    def unload(self) -> None:
        if hasattr(self._model, "finalize"):
            self._model.finalize()

    def _arguments(self) -> dict[str, str]:
        context = self._context
        return {
            "model_config": json.dumps(config_json(context.config.proto)),
            "model_instance_kind": context.kind.removeprefix("KIND_"),
            "model_instance_name": context.instance_name,
            "model_instance_device_id": str(context.device_id),
            "model_repository": str(context.model_directory),
            "model_version": context.version,
            "model_name": context.config.name,
        }

    def _check(self, requests: list[InferenceRequest], responses: Any) -> None:
        if not isinstance(responses, list):
            raise TritonModelException(f"Expected a list in the execute return, found type '{type(responses)}'.")
        if len(responses) != len(requests):
            raise TritonModelException(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(responses)}"
            )
        for response in responses:
            if not isinstance(response, InferenceResponse):
                raise TritonModelException(
                    "Expected an 'InferenceResponse' object in the execute function return list, found type "
                    f"'{type(response)}'."
                )

    def _result(self, request: Request, response: InferenceResponse) -> list[ServerTensor] | DoorstepError:
        error = response.error()
        if error is not None:
            code = triton_compat._CODES[error.code()]
            return DoorstepError(error.message(), code=code, reason=FailureReason.BACKEND)
        asked = request.requested_outputs
        outputs = self._context.config.outputs
        tensors = []
        for tensor in response.output_tensors():
            name = tensor.name()
            if asked and name not in asked:
                continue
            spec = outputs.get(name)
            if spec is None:
                return BackendError(f"unexpected inference output '{name}' for model '{self._context.config.name}'")
            if tensor._type is not spec.datatype:
                return BackendError(
                    f"output '{name}' of model '{self._context.config.name}' is {tensor._type}, but its config says "
                    f"{spec.datatype.config_name}"
                )
            array = tensor.as_numpy()
            if tensor._type is BYTES:
                array = _bytes(array)
            if spec.reshape is not None:
                lead = array.shape[: len(spec.shape) - len(spec.dims)]
                if spec.dims.count(-1) <= 1:
                    array = array.reshape(lead + spec.dims)
            tensors.append(ServerTensor(name, spec.datatype, array))
        return tensors

    def _log_traceback(self, error: BaseException) -> None:
        if self._context.log is not None:
            text = "".join(traceback.format_exception(error)).rstrip()
            where = location_of(error, self._source.path)
            self._context.log("ERROR", f"model '{self._context.config.name}' raised at {where}\n{text}")


def _triton_request(request: Request, all_outputs: list[str]) -> InferenceRequest:
    made = InferenceRequest.__new__(InferenceRequest)
    inputs = []
    for tensor in request.inputs.values():
        wrapped = Tensor.__new__(Tensor)
        wrapped._name = tensor.name
        wrapped._type = tensor.datatype
        wrapped._array = tensor.array
        inputs.append(wrapped)
    made._inputs = inputs
    made._request_id = request.id
    made._correlation_id = request.correlation_id
    # Sorted, and all of them where the client names none, as Triton's set has them (core, infer_request.cc: Normalize).
    made._requested_output_names = sorted(request.requested_outputs) or list(all_outputs)
    made._model_name = request.model_name
    made._model_version = int(request.model_version) if request.model_version.isdecimal() else -1
    made._flags = request.sequence_start | request.sequence_end << 1
    made._timeout = request.timeout_us
    made._preferred_memory = None
    made._trace = None
    made._parameters = json.dumps(request.parameters) if request.parameters else "{}"
    made._is_cancelled = lambda: request.cancelled
    return made


def _bytes(array: Array) -> Array:
    """As the rest of the server knows it: an object array of `bytes`. (numpy drops zero bytes at the end of an S.)"""
    if array.dtype.kind != "O":
        return array.astype(object)
    return array
