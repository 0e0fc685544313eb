"""Runs a `TritonPythonModel`: its life cycle, and batches to and from `execute`. Knows no process and no protocol."""

from __future__ import annotations

import asyncio
import json
import time
import traceback
from typing import Any

from doorstep import proto as messages
from doorstep.backends.base import InstanceContext, ModelInstance
from doorstep.backends.python import coroutines, triton_runtime
from doorstep.backends.python.source import Source, describe, location_of, problem_of
from doorstep.backends.python.triton_config import ModelConfig
from doorstep.backends.python.triton_errors import ExecuteError, TritonModelException, to_server
from doorstep.backends.python.triton_requests import InferenceRequest, InferenceResponse, made_for
from doorstep.backends.python.triton_runtime import Phase
from doorstep.backends.python.triton_tensor import bytes_array
from doorstep.config.render import config_json
from doorstep.errors import BackendError, ConfigError, DoorstepError, Problem
from doorstep.request import LATER, RESCHEDULE, Batch, Outputs, Result
from doorstep.request import InferenceRequest as Request
from doorstep.types import BYTES
from doorstep.types import Tensor as ServerTensor


def complete_from_triton(proto: Any, source: Source) -> None:
    """Runs the class's `auto_complete_config`, if it has one, and takes over what that may change."""
    complete = getattr(source.model, "auto_complete_config", None)
    if complete is None:
        return
    triton_runtime.set_up(str(source.model_directory), None)
    helper = ModelConfig(json.dumps(config_json(proto)))
    try:
        completed = complete(helper)
    except BaseException as error:  # SystemExit too
        raise ConfigError(proto.name, [problem_of(error, source.path)]) from error
    if not isinstance(completed, ModelConfig):
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
        self.name = context.config.name
        self.decoupled = context.config.decoupled
        self._all_outputs = sorted(context.config.outputs)
        self._remarked: set[str] = set()  # outputs that are not as the config says, and the log has said so
        triton_runtime.set_up(str(source.model_directory), context.log, context.server)
        triton_runtime.start_cleaning()
        if not callable(getattr(source.model, "execute", None)):
            raise BackendError(f"Python model {source.path} does not implement `execute` method.")
        try:
            self._model = source.model()
            if hasattr(self._model, "initialize"):
                self._model.initialize(self._arguments())
        except BaseException as error:  # SystemExit too
            self._log_traceback(error)
            raise BackendError(f"initialize of model '{self.name}' failed: {problem_of(error, source.path)}") from error
        triton_runtime.become(Phase.SERVING)

    def execute(self, batch: Batch) -> None:
        emit, outputs = batch.emit, self._all_outputs
        requests = [made_for(request, self, emit, outputs) for request in batch.requests]
        triton_runtime.running.set(batch.requests[0] if len(requests) == 1 else None)
        batch.input_end_ns = time.monotonic_ns()
        try:
            returned = self._model.execute(requests)
            if asyncio.iscoroutine(returned):
                if self.decoupled:
                    self._run_beside(returned, requests)
                    returned = None
                else:
                    returned = coroutines.run(returned)
            batch.output_start_ns = time.monotonic_ns()
            responses = self._check(requests, returned)
        except Exception as error:
            if not isinstance(error, DoorstepError):
                self._log_traceback(error)
            failure = BackendError(self._failed(error))
            for i, made in enumerate(requests):
                batch.results[i] = made.get_response_sender().give_up(failure)
            return
        for i, response in enumerate(responses):
            batch.results[i] = (
                self._verdict(requests[i]) if response is None else self.result(batch.requests[i], response)
            )

    def is_ready(self) -> bool:
        """What the model's own `is_ready` says. Raises TritonModelException where that is no bool."""
        own = getattr(self._model, "is_ready", None)
        if own is None:
            return True
        ready = own()
        if asyncio.iscoroutine(ready):
            ready = coroutines.run(ready)
        if not isinstance(ready, bool):
            raise TritonModelException("is_ready() must return a boolean value")
        return ready

    def may_be_unready(self) -> bool:
        return hasattr(self._model, "is_ready")

    def unload(self) -> None:
        triton_runtime.become(Phase.ENDING)
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

    # What execute returned

    def _check(self, requests: list[InferenceRequest], responses: Any) -> list[InferenceResponse | None]:
        """One entry for each request; None where the answer goes another way. Raises ExecuteError."""
        if responses is None:
            return [None] * len(requests)
        if self.decoupled:
            raise ExecuteError(
                f"Python model '{self._context.instance_name}' is using the decoupled mode and the execute function "
                "must return None."
            )
        if not isinstance(responses, list):
            raise ExecuteError(f"Expected a list in the execute return, found type '{type(responses)}'.")
        if len(responses) != len(requests):
            raise ExecuteError(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(requests)}, and InferenceResponse(s) size is:{len(responses)}\n"
            )
        for request, response in zip(requests, responses, strict=True):
            if response is None:
                continue
            if request.rescheduled:
                raise ExecuteError(
                    "Expected a None object in the execute function return list for reschduled request, found type "
                    f"'{type(response)}'."
                )
            if not isinstance(response, InferenceResponse):
                raise ExecuteError(
                    "Expected an 'InferenceResponse' object in the execute function return list, found type "
                    f"'{type(response)}'."
                )
            try:
                request.get_response_sender().count(response, final=True)
            except TritonModelException as error:
                raise ExecuteError(str(error)) from None
        return responses

    def _verdict(self, request: InferenceRequest) -> Result:
        """For a request that execute has not answered by returning."""
        sender = request.get_response_sender()
        if request.rescheduled and not sender.closed:
            sender.close()
            return RESCHEDULE
        sender.owe()
        return LATER

    def result(self, request: Request, response: InferenceResponse) -> Result:
        """A response as the server knows it: outputs, or an error."""
        error = response.error()
        if error is not None:
            return to_server(error)
        asked = request.requested_outputs
        outputs = self._context.config.outputs
        tensors = []
        for tensor in response.output_tensors():
            name = tensor._name
            if asked and name not in asked:
                continue
            spec = outputs.get(name)
            if spec is None:
                self._remark(name, "is not in its config: it is not sent")
                continue
            if tensor._type is not spec.datatype:
                self._remark(name, f"is {tensor._type}, but its config says {spec.datatype.config_name}: sent as it is")
            array = tensor._array
            if tensor._type is BYTES:
                array = bytes_array(array)
            if spec.reshape is not None:
                lead = array.shape[: len(spec.shape) - len(spec.dims)]
                shape = lead + spec.dims
                if spec.dims.count(-1) <= 1:
                    try:
                        array = array.reshape(shape)
                    except ValueError:
                        return BackendError(
                            f"output '{name}' of model '{self.name}' has the shape {list(array.shape)}, which cannot "
                            f"be reshaped to {list(shape)}, as its config says"
                        )
            tensors.append(ServerTensor(name, tensor._type, array))
        return Outputs(tensors, response._parameters) if response._parameters else tensors

    def _remark(self, name: str, text: str) -> None:
        """Triton says nothing of it, and existing models live with that; the log says it once for each output."""
        if name not in self._remarked:
            self._remarked.add(name)
            triton_runtime.log("WARNING", f"output '{name}' of model '{self.name}' {text}")

    # What it raised

    def _run_beside(self, coroutine: Any, requests: list[InferenceRequest]) -> None:
        """`async def execute` of a decoupled model: the next batch does not wait for it, as in Triton."""
        senders = [request.get_response_sender() for request in requests]

        def done(error: BaseException | None) -> None:
            if error is not None:
                self._log_traceback(error)
                for sender in senders:
                    sender.fail(self._failed(error))
            senders.clear()

        coroutines.start(coroutine, done)

    def _failed(self, error: BaseException) -> str:
        text = str(error) if isinstance(error, DoorstepError | ExecuteError) else describe(error)
        return f"Failed to process the request(s) for model '{self._context.instance_name}', message: {text}"

    def _log_traceback(self, error: BaseException) -> None:
        if self._context.log is not None:
            text = "".join(traceback.format_exception(error)).rstrip()
            where = location_of(error, self._source.path)
            self._context.log("ERROR", f"model '{self.name}' raised at {where}\n{text}")
