"""`pb_utils.InferenceRequest`, `InferenceResponse` and the sender of responses. Knows no transport and no scheduler.

The rules of sending, and the texts when they are broken, are Triton's (python_backend, response_sender.cc).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from doorstep.backends.python import triton_runtime
from doorstep.backends.python.triton_arguments import integer_of, text_of
from doorstep.backends.python.triton_errors import TritonError, TritonModelException
from doorstep.backends.python.triton_tensor import Tensor
from doorstep.errors import BackendError, DoorstepError
from doorstep.request import LATER, Result
from doorstep.request import InferenceRequest as ServerRequest

if TYPE_CHECKING:
    from doorstep.backends.python.triton_calls import ResponseIterator

SEQUENCE_START = 1
SEQUENCE_END = 2
COMPLETE_FINAL = 1
RELEASE_ALL = 1
RELEASE_RESCHEDULE = 2
_INT64 = (-(2**63), 2**63 - 1)
_UINT32 = (0, 2**32 - 1)
_UINT64 = (0, 2**64 - 1)


class PreferredMemory:
    """Where a called model's outputs should lie. There is main memory only, so it is noted and changes nothing."""

    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


class InferenceTrace:
    """Given on to a called model, it makes that request a child of this one: in the trace, and in being cancelled."""

    __slots__ = ("_request",)

    def __init__(self, request: ServerRequest | None = None) -> None:
        self._request = request

    def get_context(self) -> str | None:
        """The request's W3C trace context as JSON; None while it is not traced."""
        context = getattr(getattr(self._request, "trace", None), "context", None)
        return str(context) if context else None


class InferenceResponse:
    """Output tensors, or an error, and maybe parameters."""

    __slots__ = ("_error", "_output_tensors", "_parameters")

    def __init__(
        self,
        output_tensors: Iterable[Tensor] = (),
        error: TritonError | TritonModelException | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._output_tensors = list(output_tensors)
        if not all(isinstance(tensor, Tensor) for tensor in self._output_tensors):
            raise TritonModelException("Output tensor for inference response should not be empty.")
        if isinstance(error, TritonModelException):
            error = TritonError(str(error))
        if error is not None and not isinstance(error, TritonError):
            raise TypeError(f"InferenceResponse: error must be a TritonError, not {type(error).__name__}")
        self._error = error
        self._parameters = checked_parameters(parameters)

    def output_tensors(self) -> list[Tensor]:
        return self._output_tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        """As JSON."""
        return json.dumps(self._parameters) if self._parameters else "{}"


class Outlet(Protocol):
    """Where a request's responses go: the instance that runs it."""

    decoupled: bool
    name: str  # the model's

    def result(self, request: ServerRequest, response: InferenceResponse) -> Result:
        """The response as the server knows it: outputs, or an error."""


class InferenceResponseSender:
    """Sends the responses of one request, from any thread, until the final one."""

    __slots__ = ("__weakref__", "_closed", "_count", "_emit", "_held", "_lock", "_outlet", "_owing", "_request")

    def __init__(self, request: ServerRequest, outlet: Outlet, emit: Callable[..., None]) -> None:
        self._request = request
        self._outlet = outlet
        self._emit = emit
        self._closed = False
        self._count = 0
        self._owing = False  # the batch is done and the server waits for what this sends
        self._held: Result = None  # the one response of a model that is not decoupled, until it is said to be final
        self._lock: threading.Lock | None = None

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        """`flags` is 0, or TRITONSERVER_RESPONSE_COMPLETE_FINAL for the last. Raises TritonModelException."""
        if flags not in (COMPLETE_FINAL, 0):
            raise TritonModelException("Unable to send response. Unsupported flag provided.")
        if flags == 0 and response is None:
            raise TritonModelException(
                "Inference Response object must be provided when the response flags is set to zero."
            )
        if response is not None and not isinstance(response, InferenceResponse):
            raise TypeError(f"send: response must be an InferenceResponse, not {type(response).__name__}")
        with self._locked():
            self.count(response, final=flags == COMPLETE_FINAL)
            result = None if response is None else self._outlet.result(self._request, response)
            if self._outlet.decoupled:
                self._emit(self._request, result, flags == COMPLETE_FINAL)
                if isinstance(result, DoorstepError):
                    self._emit = _nobody_listens  # an error is the last thing that a client is told
                return
            if flags == 0:
                self._held = result
            else:
                self._emit(self._request, self._held if result is None else result, True)
                self._held = None

    def count(self, response: InferenceResponse | None, *, final: bool) -> None:
        """Notes that `response` goes out. Raises TritonModelException for one too many."""
        if not self._outlet.decoupled:
            if response is not None and self._count:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send more than one response."
                )
            if response is None and final and not self._count:
                raise TritonModelException(
                    "Unable to send response. Non-decoupled model cannot send complete final before sending a response."
                )
        if self._closed:
            raise TritonModelException("Unable to send response. Response sender has been closed.")
        self._closed = final
        self._count += 1

    def is_cancelled(self) -> bool:
        return self._request.cancelled

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """The server answers the request in another way."""
        self._closed = True

    def give_up(self, failure: BackendError) -> Result:
        """`execute` raised: what the request gets. A response that was sent before stands, as in Triton."""
        if self._closed:
            return LATER
        self._closed = True
        held, self._held = self._held, None
        return failure if held is None else held

    def owe(self) -> None:
        """The batch is done, and this request is not: from now on its answer depends on this object alone."""
        self._owing = True

    def fail(self, text: str) -> None:
        """Ends the request with an error, unless it has ended."""
        with self._locked():
            if not self._closed:
                self._closed = True
                self._emit(self._request, BackendError(text), True)

    def _locked(self) -> threading.Lock:
        if self._lock is None:
            with _making:
                self._lock = self._lock or threading.Lock()
        return self._lock

    def __del__(self) -> None:
        """Nobody can answer any more. In Triton the client would wait for ever; here it is told."""
        if self._owing and not self._closed:
            self._closed = True
            held = self._held
            if held is not None:  # the answer is there, and only the word that it is the last is missing
                triton_runtime.later(self._emit, self._request, held, True)
                return
            error = BackendError(
                f"model '{self._outlet.name}' dropped the request without a final response: every request needs "
                "send(flags=TRITONSERVER_RESPONSE_COMPLETE_FINAL), or a response returned by execute"
            )
            triton_runtime.later(self._emit, self._request, error, True)


def _nobody_listens(request: ServerRequest, result: Result, final: bool) -> None:
    """The client has its last response already."""


_making = threading.Lock()  # a lock for each sender only once it is used


class InferenceRequest:
    """A request as `execute` gets it, or one that model code makes of another model."""

    __slots__ = (
        "_correlation_id",
        "_flags",
        "_inputs",
        "_model_name",
        "_model_version",
        "_parameters",
        "_preferred_memory",
        "_release_flags",
        "_request_id",
        "_requested_output_names",
        "_sender",
        "_timeout",
        "_trace",
    )

    _sender: InferenceResponseSender | None

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Iterable[Tensor] | None = None,
        requested_output_names: Iterable[str] | None = None,
        model_name: str | None = None,
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if inputs is None or requested_output_names is None or model_name is None:
            raise TypeError("InferenceRequest: inputs, requested_output_names and model_name must be given")
        if correlation_id is None:
            raise TypeError("InferenceRequest: correlation_id must be an int or a str, not None")
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        if isinstance(correlation_id, int):
            correlation_id = integer_of(correlation_id, "InferenceRequest: correlation_id", *_UINT64)
        if isinstance(requested_output_names, str | bytes):
            raise TypeError("InferenceRequest: requested_output_names must be a list of names")
        self._request_id = request_id = text_of(request_id, "InferenceRequest: request_id")
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        self._requested_output_names = sorted(
            {text_of(name, "InferenceRequest: a requested output's name") for name in requested_output_names}
        )
        self._model_name = model_name = text_of(model_name, "InferenceRequest: model_name")
        self._model_version = integer_of(model_version, "InferenceRequest: model_version", *_INT64)
        self._flags = integer_of(flags, "InferenceRequest: flags", *_UINT32)
        self._timeout = integer_of(timeout, "InferenceRequest: timeout", *_UINT64)
        self._preferred_memory = preferred_memory
        self._trace = trace
        self._release_flags = RELEASE_ALL
        self._parameters = checked_parameters(parameters)
        self._sender = None
        which = f"for request with id '{request_id}' and model name '{model_name}' should not be empty."
        if not all(isinstance(tensor, Tensor) for tensor in self._inputs):
            raise TritonModelException(f"Input tensor {which}")
        if "" in self._requested_output_names:
            raise TritonModelException(f"Requested output name {which}")

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._request_id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def model_name(self) -> str:
        return self._model_name

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = integer_of(flags, "set_flags: flags", *_UINT32)

    def timeout(self) -> int:
        """In microseconds; 0: none."""
        return self._timeout

    def preferred_memory(self) -> PreferredMemory | None:
        return self._preferred_memory

    def parameters(self) -> str:
        """The request's custom parameters, as JSON."""
        return json.dumps(self._parameters) if self._parameters else "{}"

    def trace(self) -> InferenceTrace:
        if self._trace is None:
            self._trace = InferenceTrace(self._sender._request if self._sender is not None else None)
        return self._trace

    def requested_output_names(self) -> list[str]:
        return self._requested_output_names

    def is_cancelled(self) -> bool:
        return self._sender is not None and self._sender.is_cancelled()

    def get_response_sender(self) -> InferenceResponseSender:
        if self._sender is None:
            raise TritonModelException(
                "Unable to send response. Response sender has no reference to the decoupled state of the model."
            )
        return self._sender

    def set_release_flags(self, flags: int) -> None:
        """TRITONSERVER_REQUEST_RELEASE_RESCHEDULE: to see the request again in a later batch."""
        if flags not in (RELEASE_ALL, RELEASE_RESCHEDULE):
            raise TritonModelException(f"set_release_flags: {flags!r} is no release flag")
        self._release_flags = flags

    @property
    def rescheduled(self) -> bool:
        return self._release_flags == RELEASE_RESCHEDULE

    def exec(self, decoupled: bool = False) -> InferenceResponse | ResponseIterator:
        """Runs this request on its model and waits: its response or, with `decoupled`, an iterator of responses."""
        from doorstep.backends.python import triton_calls

        return triton_calls.run(self, decoupled=decoupled)

    def async_exec(self, decoupled: bool = False) -> Any:
        """As `exec`, to be awaited; in `async def execute` only."""
        from doorstep.backends.python import triton_calls

        return triton_calls.run_async(self, decoupled=decoupled)


def made_for(
    request: ServerRequest, outlet: Outlet, emit: Callable[..., None], all_outputs: list[str]
) -> InferenceRequest:
    """What `execute` gets for a request of the server."""
    made = InferenceRequest.__new__(InferenceRequest)
    inputs = []
    for tensor in request.inputs.values():  # once per tensor and request: written out for speed
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
    made._parameters = request.parameters
    made._release_flags = RELEASE_ALL
    made._sender = InferenceResponseSender(request, outlet, emit)
    return made


def checked_parameters(parameters: Any) -> dict[str, bool | int | float | str] | None:
    """None where there are none. Raises TritonModelException."""
    if parameters is None:
        return None
    if not isinstance(parameters, dict):
        raise TritonModelException(f"Expect a dict of parameters, got {type(parameters)}")
    for key, value in parameters.items():
        if not isinstance(key, str):
            raise TritonModelException(f"Expect parameters keys to have type str, found type {type(key)}")
        if not isinstance(value, bool | int | str):
            raise TritonModelException(f"Expect parameters values to have type bool/int/str, found type {type(value)}")
    return dict(parameters) or None
