"""What `import triton_python_backend_utils as pb_utils` gives to model code. Knows no process and no scheduler.

Names, signatures and the texts of errors follow Triton's Python backend. What Doorstep cannot do yet raises
TritonModelException where it is used, so that no model believes it has done what it has not.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from doorstep.backends.python.triton_config import ModelConfig
from doorstep.errors import ErrorCode
from doorstep.types import BY_CONFIG_NAME, BY_CONFIG_NUMBER, BYTES, Array, datatype_of

__all__ = ["ModelConfig"]

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2
TRITONSERVER_MEMORY_GPU = 0
TRITONSERVER_MEMORY_CPU = 1

TRITON_STRING_TO_NUMPY: dict[str, Any] = {
    name: (bool if name == "TYPE_BOOL" else d.numpy.type) for name, d in BY_CONFIG_NAME.items()
}

_model_directory = ""
_log: Callable[[str, str], None] | None = None


def _set_up(model_directory: str, log: Callable[[str, str], None] | None) -> None:
    """Called by the instance before model code is."""
    global _model_directory, _log  # noqa: PLW0603 (one model per process)
    _model_directory = model_directory
    _log = log


def get_model_dir() -> str:
    """The folder that holds model.py."""
    return _model_directory


class TritonModelException(Exception):
    pass


def _not_yet(what: str) -> NoReturn:
    raise TritonModelException(f"{what} is not supported by this version of Doorstep")


class TritonError:
    """An error for a response: a text and a code."""

    UNKNOWN = 0
    INTERNAL = 1
    NOT_FOUND = 2
    INVALID_ARG = 3
    UNAVAILABLE = 4
    UNSUPPORTED = 5
    ALREADY_EXISTS = 6
    CANCELLED = 7

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        if not isinstance(message, str):
            raise TypeError(f"TritonError: message must be a str, not {type(message).__name__}")
        if code not in _CODES:
            raise TypeError(f"TritonError: {code!r} is no error code")
        self._message = message
        self._code = code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


_CODES = {
    TritonError.UNKNOWN: ErrorCode.UNKNOWN,
    TritonError.INTERNAL: ErrorCode.INTERNAL,
    TritonError.NOT_FOUND: ErrorCode.NOT_FOUND,
    TritonError.INVALID_ARG: ErrorCode.INVALID_ARG,
    TritonError.UNAVAILABLE: ErrorCode.UNAVAILABLE,
    TritonError.UNSUPPORTED: ErrorCode.UNSUPPORTED,
    TritonError.ALREADY_EXISTS: ErrorCode.ALREADY_EXISTS,
    TritonError.CANCELLED: ErrorCode.CANCELLED,
}


class Tensor:
    """A named numpy array in main memory."""

    __slots__ = ("_array", "_name", "_type")

    def __init__(self, name: str, array: Array) -> None:
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise TypeError("Tensor(name, numpy_array): a str and a numpy array are expected")
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if array.dtype.kind in "SO":
            self._type = BYTES
        else:
            try:
                self._type = datatype_of(array)
            except KeyError:
                raise TritonModelException("NumPy dtype is not supported.") from None
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Array:
        return self._array

    def shape(self) -> list[int]:
        return list(self._array.shape)

    def triton_dtype(self) -> int:
        return self._type.config_number

    def is_cpu(self) -> bool:
        return True

    def to_dlpack(self) -> Any:
        return self.__dlpack__()

    def __dlpack__(self, stream: Any = None) -> Any:
        if self._type is BYTES:
            raise TritonModelException("DLPack does not have support for string tensors.")
        try:
            return self._array.__dlpack__()
        except (BufferError, TypeError, RuntimeError) as error:
            raise TritonModelException(f"tensor '{self._name}' cannot be given as DLPack: {error}") from None

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)  # kDLCPU

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        if not name:
            raise TritonModelException("Tensor name cannot be an empty string.")
        if type(tensor).__name__ == "PyCapsule":
            tensor = _Capsule(tensor)
        if not hasattr(tensor, "__dlpack__") or not hasattr(tensor, "__dlpack_device__"):
            raise TritonModelException(
                "Provided tensor is not supported. Tensor must be a DLPack capsule or have `__dlpack__` and "
                "`__dlpack_device__` attributes"
            )
        if tensor.__dlpack_device__()[0] not in (1, 3):  # CPU, or pinned for CUDA
            raise TritonModelException(
                f"tensor '{name}' is not in main memory; copy it there first (with .cpu() in PyTorch)"
            )
        try:
            return Tensor(name, np.from_dlpack(tensor))
        except (BufferError, TypeError, RuntimeError) as error:
            raise TritonModelException(f"tensor '{name}' cannot be taken as DLPack: {error}") from None

    def __repr__(self) -> str:
        return f"<pb_utils.Tensor {self._name} {self._type} {self.shape()}>"


class _Capsule:
    """A bare capsule as an object that numpy takes."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


class PreferredMemory:
    def __init__(self, preferred_memory_type: int, preferred_device_id: int = 0) -> None:
        self.preferred_memory_type = preferred_memory_type
        self.preferred_device_id = preferred_device_id


class InferenceTrace:
    def get_context(self) -> str | None:
        """The trace context of the request; there is none while tracing is off."""
        return None


class InferenceRequest:
    """A request as `execute` gets it."""

    __slots__ = (
        "_correlation_id",
        "_flags",
        "_inputs",
        "_is_cancelled",
        "_model_name",
        "_model_version",
        "_parameters",
        "_preferred_memory",
        "_request_id",
        "_requested_output_names",
        "_timeout",
        "_trace",
    )

    def __init__(
        self,
        request_id: str = "",
        correlation_id: int | str = 0,
        inputs: Iterable[Tensor] = (),
        requested_output_names: Iterable[str] = (),
        model_name: str = "",
        model_version: int = -1,
        flags: int = 0,
        timeout: int = 0,
        preferred_memory: PreferredMemory | None = None,
        trace: InferenceTrace | None = None,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(correlation_id, int | str):
            raise TritonModelException("Correlation ID must be integer or string")
        self._request_id = request_id
        self._correlation_id = correlation_id
        self._inputs = list(inputs)
        self._requested_output_names = list(requested_output_names)
        self._model_name = model_name
        self._model_version = model_version
        self._flags = flags
        self._timeout = timeout
        self._preferred_memory = preferred_memory
        self._trace = trace
        self._parameters = _parameters_json(parameters)
        self._is_cancelled: Callable[[], bool] | None = None
        if not all(isinstance(tensor, Tensor) for tensor in self._inputs):
            raise TritonModelException(
                f"Input tensor for request with id '{request_id}' and model name '{model_name}' should not be empty."
            )
        if "" in self._requested_output_names:
            raise TritonModelException(
                f"Requested output name for request with id '{request_id}' and model name '{model_name}' should not "
                "be empty."
            )

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._request_id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = flags

    def timeout(self) -> int:
        """In microseconds; 0: none."""
        return self._timeout

    def preferred_memory(self) -> PreferredMemory | None:
        return self._preferred_memory

    def parameters(self) -> str:
        """The request's custom parameters, as JSON."""
        return self._parameters

    def trace(self) -> InferenceTrace:
        return self._trace or InferenceTrace()

    def requested_output_names(self) -> list[str]:
        return self._requested_output_names

    def is_cancelled(self) -> bool:
        return self._is_cancelled is not None and self._is_cancelled()

    def get_response_sender(self) -> NoReturn:
        _not_yet("InferenceRequest.get_response_sender (decoupled models)")

    def set_release_flags(self, flags: int) -> None:
        if flags != TRITONSERVER_REQUEST_RELEASE_ALL:
            _not_yet("TRITONSERVER_REQUEST_RELEASE_RESCHEDULE (request rescheduling)")

    def exec(self, decoupled: bool = False) -> NoReturn:
        _not_yet("InferenceRequest.exec (calling other models)")

    def async_exec(self, decoupled: bool = False) -> NoReturn:
        _not_yet("InferenceRequest.async_exec (calling other models)")


class InferenceResponse:
    """What `execute` returns for one request: output tensors, or an error."""

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
        if parameters:
            _not_yet("InferenceResponse(parameters=…)")
        self._error = error
        self._parameters = _parameters_json(parameters)

    def output_tensors(self) -> list[Tensor]:
        return self._output_tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return self._parameters


def _parameters_json(parameters: Mapping[str, Any] | None) -> str:
    for key, value in (parameters or {}).items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise TritonModelException(f"parameter {key!r} must be a str with a bool, int, float or str as its value")
    return json.dumps(dict(parameters or {}))


class LogLevel:
    INFO = 0
    WARNING = 1
    ERROR = 2
    VERBOSE = 3


_LEVELS = {LogLevel.INFO: "INFO", LogLevel.WARNING: "WARNING", LogLevel.ERROR: "ERROR", LogLevel.VERBOSE: "VERBOSE"}


class Logger:
    """Lines into the server's log."""

    INFO = LogLevel.INFO
    WARNING = LogLevel.WARNING
    ERROR = LogLevel.ERROR
    VERBOSE = LogLevel.VERBOSE

    @staticmethod
    def log(message: str, level: int = LogLevel.INFO) -> None:
        if not isinstance(message, str):
            raise TypeError(f"Logger: message must be a str, not {type(message).__name__}")
        if _log is not None:
            _log(_LEVELS[level], message)

    @staticmethod
    def log_info(message: str) -> None:
        Logger.log(message, LogLevel.INFO)

    @staticmethod
    def log_warn(message: str) -> None:
        Logger.log(message, LogLevel.WARNING)

    @staticmethod
    def log_error(message: str) -> None:
        Logger.log(message, LogLevel.ERROR)

    @staticmethod
    def log_verbose(message: str) -> None:
        Logger.log(message, LogLevel.VERBOSE)


class MetricFamily:
    COUNTER = 0
    GAUGE = 1
    HISTOGRAM = 2

    def __init__(self, name: str, description: str, kind: int) -> None:
        _not_yet("MetricFamily (custom metrics)")


def load_model(model_name: str, config: str = "", files: Mapping[str, bytes] | None = None) -> NoReturn:
    _not_yet("load_model")


def unload_model(model_name: str, unload_dependents: bool = False) -> NoReturn:
    _not_yet("unload_model")


def is_model_ready(model_name: str, model_version: str = "") -> NoReturn:
    _not_yet("is_model_ready")


# Helpers


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((tensor for tensor in model_config.get("input", ()) if tensor["name"] == name), None)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((tensor for tensor in model_config.get("output", ()) if tensor["name"] == name), None)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_to_numpy_type(data_type: int) -> Any:
    """For a datatype by its number in config.pbtxt; None for one numpy has no type for."""
    found = BY_CONFIG_NUMBER.get(data_type)
    return found.numpy.type if found is not None else None


def numpy_to_triton_type(data_type: Any) -> int | None:
    dtype = np.dtype(data_type)
    if dtype.kind in "SO":
        return BYTES.config_number
    return next((d.config_number for d in BY_CONFIG_NUMBER.values() if d.numpy == dtype), None)


def triton_string_to_numpy(triton_type_string: str) -> Any:
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def serialize_byte_tensor(input_tensor: Array) -> Any:
    """The elements in C order, each behind its length in four bytes; None for an array that holds no bytes."""
    if input_tensor.size == 0:
        return ()
    if input_tensor.dtype.kind not in "SO":
        return None
    pieces: list[bytes] = []
    for item in input_tensor.ravel().tolist():
        data = item if isinstance(item, bytes) else str(item).encode()
        pieces += (struct.pack("<I", len(data)), data)
    return b"".join(pieces)


def deserialize_bytes_tensor(encoded_tensor: bytes) -> Array:
    """The opposite: a flat array of `bytes`."""
    items = []
    at = 0
    while at < len(encoded_tensor):
        (length,) = struct.unpack_from("<I", encoded_tensor, at)
        at += 4
        items.append(bytes(encoded_tensor[at : at + length]))
        at += length
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array
