"""What `import triton_python_backend_utils as pb_utils` gives to model code: names, and helpers on plain values.

Names, signatures and the texts of errors follow Triton's Python backend. What is behind them is in the files beside
this one: triton_requests, triton_tensor, triton_calls, triton_metrics, triton_config, triton_errors, triton_log.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from doorstep.backends.python import triton_runtime
from doorstep.backends.python.triton_calls import ResponseIterator, is_model_ready, load_model, unload_model
from doorstep.backends.python.triton_config import ModelConfig
from doorstep.backends.python.triton_errors import TritonError, TritonModelException
from doorstep.backends.python.triton_log import Logger, LogLevel
from doorstep.backends.python.triton_metrics import Metric, MetricFamily, MetricKind
from doorstep.backends.python.triton_requests import (
    COMPLETE_FINAL,
    RELEASE_ALL,
    RELEASE_RESCHEDULE,
    SEQUENCE_END,
    SEQUENCE_START,
    InferenceRequest,
    InferenceResponse,
    InferenceResponseSender,
    InferenceTrace,
    PreferredMemory,
)
from doorstep.backends.python.triton_tensor import Tensor
from doorstep.types import BF16, BY_CONFIG_NAME, BY_CONFIG_NUMBER, BYTES, Array

__all__ = [
    "InferenceRequest",
    "InferenceResponse",
    "InferenceResponseSender",
    "InferenceTrace",
    "LogLevel",
    "Logger",
    "Metric",
    "MetricFamily",
    "MetricKind",
    "ModelConfig",
    "PreferredMemory",
    "ResponseIterator",
    "Tensor",
    "TritonError",
    "TritonModelException",
    "is_model_ready",
    "load_model",
    "unload_model",
]

for _class in (InferenceRequest, InferenceResponse, InferenceResponseSender, InferenceTrace, PreferredMemory, Tensor):
    _class.__module__ = "c_python_backend_utils"  # as it is in Triton; texts of errors name these types
for _other in (ResponseIterator, TritonError, TritonModelException, Metric, MetricFamily):
    _other.__module__ = "c_python_backend_utils"

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = SEQUENCE_START
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = SEQUENCE_END
TRITONSERVER_RESPONSE_COMPLETE_FINAL = COMPLETE_FINAL
TRITONSERVER_REQUEST_RELEASE_ALL = RELEASE_ALL
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = RELEASE_RESCHEDULE
TRITONSERVER_MEMORY_GPU = 0
TRITONSERVER_MEMORY_CPU = 1

# BF16 is not in it: numpy has no such type of its own, and Triton's table has none either.
TRITON_STRING_TO_NUMPY: dict[str, Any] = {
    name: (bool if name == "TYPE_BOOL" else d.numpy.type) for name, d in BY_CONFIG_NAME.items() if d is not BF16
}


def get_model_dir() -> str:
    """The folder that holds model.py; for a python-based backend, the model's version folder."""
    return triton_runtime.model_directory


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
    return found.numpy.type if found is not None and found is not BF16 else None


def numpy_to_triton_type(data_type: Any) -> int | None:
    dtype = np.dtype(data_type)
    if dtype.kind in "SO":
        return BYTES.config_number
    return next((d.config_number for d in BY_CONFIG_NUMBER.values() if d.numpy == dtype and d is not BF16), None)


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
