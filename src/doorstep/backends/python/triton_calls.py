"""What model code asks of the server by `pb_utils`: other models' answers (BLS), loading and unloading of models.

Knows the words of both sides, and no transport: that is `ServerAccess`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from doorstep.backends.base import CallResponses, ModelCall
from doorstep.backends.python import coroutines, triton_runtime
from doorstep.backends.python.triton_arguments import text_of
from doorstep.backends.python.triton_errors import TritonError, TritonModelException, from_server
from doorstep.backends.python.triton_requests import (
    SEQUENCE_END,
    SEQUENCE_START,
    InferenceRequest,
    InferenceResponse,
)
from doorstep.backends.python.triton_runtime import Phase
from doorstep.backends.python.triton_tensor import from_server as tensor_from_server
from doorstep.backends.python.triton_tensor import to_server as tensor_to_server
from doorstep.errors import DoorstepError, FailureReason
from doorstep.request import Outputs

# (model, version) of those that were not decoupled when first called. One that was is asked about again, as a reload
# may have changed it; that another has become decoupled shows in its responses.
_plain: set[tuple[str, str]] = set()


def run(request: InferenceRequest, *, decoupled: bool) -> InferenceResponse | ResponseIterator:
    """Waits for the response; with `decoupled`, for the first one, as Triton does."""
    try:
        call, responses = _begin(request, decoupled=decoupled)
    except DoorstepError as error:
        refused = _refused(request, error)
        return ResponseIterator(request, None, refused) if decoupled else refused
    if decoupled:
        return ResponseIterator(request, responses, _response(request, *responses.get()))
    del call  # the inputs are on their way, and may be large
    return _only(request, responses, None)


def run_async(request: InferenceRequest, *, decoupled: bool) -> asyncio.Future[Any]:
    """As `run`, as a future of the running loop. Cancelled, it cancels the request."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    try:
        _, responses = _begin(request, decoupled=decoupled)
    except DoorstepError as error:
        refused = _refused(request, error)
        future.set_result(ResponseIterator(request, None, refused) if decoupled else refused)
        return future
    first: list[_Item] = []

    def take() -> None:
        if future.done():
            return
        try:
            while True:
                try:
                    outputs, final = responses.get(0)
                except TimeoutError:
                    responses.notify(tell)
                    return
                if decoupled:
                    item = _response(request, outputs, final)
                    future.set_result(ResponseIterator(request, responses, item))
                    return
                first.append(_response(request, outputs, final, flagged=False))
                if final:
                    future.set_result(_chosen(request, first))
                    return
        except Exception as error:
            future.set_exception(error)

    def tell() -> None:
        if not coroutines.call_in(loop, take):
            responses.cancel()

    def forgotten(future: asyncio.Future[Any]) -> None:
        if future.cancelled():
            responses.cancel()

    future.add_done_callback(forgotten)
    responses.notify(tell)
    return future


class ResponseIterator:
    """The responses of a decoupled model, as they come. The last may be empty: Triton says so that no more comes.

    Iterated again, it gives the same responses again."""

    def __init__(
        self, request: InferenceRequest, responses: CallResponses | None, first: InferenceResponse | _Item
    ) -> None:
        self._request = request
        self._responses = responses
        item = first if isinstance(first, _Item) else _Item(first, final=True)
        self._seen: list[InferenceResponse] = [item.response]
        self._finished = item.final
        self._at = 0

    def __iter__(self) -> Iterator[InferenceResponse]:
        if self._finished and self._at >= len(self._seen):
            self._at = 0
        return self

    def __next__(self) -> InferenceResponse:
        if self._at == len(self._seen):
            if self._finished or self._responses is None:
                raise StopIteration("Iteration is done for the responses.")
            self._note(_response(self._request, *self._responses.get()))
        self._at += 1
        return self._seen[self._at - 1]

    def __aiter__(self) -> AsyncIterator[InferenceResponse]:
        self.__iter__()
        return self

    async def __anext__(self) -> InferenceResponse:
        if self._at == len(self._seen):
            if self._finished or self._responses is None:
                raise StopAsyncIteration
            await coroutines.until_ready(self._responses, lambda: None)
            self._note(_response(self._request, *self._responses.get(0)))
        self._at += 1
        return self._seen[self._at - 1]

    def cancel(self) -> None:
        """Asks the model to stop. What it sends all the same still comes, and a final response in any case."""
        if not self._finished and self._responses is not None:
            self._responses.stop()

    def _note(self, item: _Item) -> None:
        self._seen.append(item.response)
        self._finished = item.final


class _Item:
    """A response, and whether it is the last; `flagged`: it is nothing but the news that no more comes."""

    __slots__ = ("final", "flagged", "response")

    def __init__(self, response: InferenceResponse, *, final: bool, flagged: bool = False) -> None:
        self.response = response
        self.final = final
        self.flagged = flagged


def _begin(request: InferenceRequest, *, decoupled: bool) -> tuple[ModelCall, CallResponses]:
    """Sends the request. Raises DoorstepError for what can be refused at once."""
    if triton_runtime.phase is not Phase.SERVING:
        raise TritonModelException("BLS is only supported during the 'execute' function.")
    server = triton_runtime.server()
    version = "" if request._model_version < 0 else str(request._model_version)
    which = (request._model_name, version)
    if not decoupled and which not in _plain:
        if server.ask("model_properties", {"name": which[0], "version": version})["decoupled"]:
            raise _needs_decoupled(request._model_name)
        _plain.add(which)
    call = ModelCall(
        model_name=request._model_name,
        inputs=[tensor_to_server(tensor) for tensor in request._inputs],
        model_version=version,
        id=request._request_id,
        requested_outputs=request._requested_output_names,
        parameters=dict(request._parameters) if request._parameters else None,
        correlation_id=request._correlation_id,
        sequence_start=bool(request._flags & SEQUENCE_START),
        sequence_end=bool(request._flags & SEQUENCE_END),
        timeout_us=request._timeout,
        parent=request._trace._request if request._trace is not None else None,
        waiter=triton_runtime.running.get(),
    )
    return call, server.call(call)


def _only(request: InferenceRequest, responses: CallResponses, timeout: float | None) -> InferenceResponse:
    items = []
    while True:
        outputs, final = responses.get(timeout)
        items.append(_response(request, outputs, final, flagged=False))
        if final:
            return _chosen(request, items)


def _chosen(request: InferenceRequest, items: list[_Item]) -> InferenceResponse:
    """The one response of a model that is not decoupled."""
    real = [item.response for item in items if not item.flagged]
    if len(real) > 1:  # it has become decoupled since it was first called
        _plain.clear()
        return _refused(request, _needs_decoupled(request._model_name))
    return real[0] if real else InferenceResponse([], TritonError("Unexpected empty response."))


def _response(request: InferenceRequest, outputs: Any, final: bool, *, flagged: bool = True) -> _Item:
    if isinstance(outputs, DoorstepError):
        if outputs.reason is not FailureReason.BACKEND and outputs.reason is not FailureReason.CANCELED:
            return _Item(_refused(request, outputs), final=True)
        return _Item(InferenceResponse([], from_server(outputs)), final=True)
    if outputs is None:
        return _Item(InferenceResponse([]), final=final, flagged=not flagged)
    parameters = outputs.parameters if type(outputs) is Outputs else None
    response = InferenceResponse([tensor_from_server(tensor) for tensor in outputs])
    response._parameters = parameters
    return _Item(response, final=final)


def _refused(request: InferenceRequest, error: DoorstepError) -> InferenceResponse:
    """For a request that never ran."""
    text = f"Model {request._model_name} - Error when running inference: {error.message}"
    return InferenceResponse([], TritonError(text))


def _needs_decoupled(name: str) -> DoorstepError:
    return DoorstepError(
        f"Model {name} is using the decoupled. The current BLS request call doesn't support models using the decoupled "
        "transaction policy. Please use 'decoupled=True' argument to the 'exec' or 'async_exec' calls for decoupled "
        "models.'"
    )


# Control of models


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> None:
    """Loads or reloads a model, and waits for it. `config` is JSON; `files` are by "file:<version>/<path>"."""
    model_name, config = text_of(model_name, "load_model: model_name"), text_of(config, "load_model: config")
    if files is not None and not isinstance(files, dict):
        raise TritonModelException(
            f"failed to load model '{model_name}', files should be a dictionary of file paths and file contents"
        )
    contents = {path: bytes(content) for path, content in (files or {}).items()}
    sizes = [[path, len(content)] for path, content in contents.items()]
    payload = {"name": model_name, "config": config, "files": sizes, "loading": _loading()}
    _ask("Failed to load model", "load_model", payload, b"".join(contents.values()))


def unload_model(model_name: str, unload_dependents: bool = False) -> None:
    """Starts unloading; requests that the model has are still answered."""
    model_name = text_of(model_name, "unload_model: model_name")
    payload = {"name": model_name, "unload_dependents": bool(unload_dependents), "loading": _loading()}
    _ask("Failed to unload model", "unload_model", payload)


def _loading() -> bool:
    """Whether the model waits while it is being loaded itself."""
    return triton_runtime.phase is Phase.LOADING


def is_model_ready(model_name: str, model_version: str = "") -> bool:
    text = "Failed to check model readiness"
    model_name = text_of(model_name, "is_model_ready: model_name")
    model_version = text_of(model_version, "is_model_ready: model_version")
    if model_version and not model_version.removeprefix("-").isdecimal():
        raise TritonModelException(
            f"{text}: failed to get model version from specified version string '{model_version}' (details: stol), "
            "version should be an integral value > 0"
        )
    if model_version.startswith("-"):
        raise TritonModelException(
            f"{text}: failed to get model version from specified version string '{model_version}', version should be "
            "an integral value > 0"
        )
    return bool(_ask(text, "model_ready", {"name": model_name, "version": model_version}))


def _ask(text: str, what: str, payload: Mapping[str, Any], data: bytes = b"") -> Any:
    server = triton_runtime.server()
    try:
        return server.ask(what, payload, data)
    except DoorstepError as error:
        raise TritonModelException(f"{text}: {error.message}") from None
