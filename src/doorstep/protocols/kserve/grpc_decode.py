"""A ModelInferRequest message → InferenceRequest. Pure.

The raw tensors of a large message are views on it, which must not change while the request lives. Errors are Triton's,
in its order (grpc/infer_handler.cc); what needs the model's config is validation.py's.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from doorstep import proto
from doorstep.client_memory import Loan
from doorstep.errors import Internal, InvalidArgument
from doorstep.protocols.kserve.bytes_tensors import tensor_of_elements
from doorstep.protocols.kserve.grpc_parameters import apply_parameters, class_count, lent, shared_memory
from doorstep.protocols.kserve.protobuf_wire import split_field
from doorstep.protocols.kserve.tensor_bytes import binary_tensor
from doorstep.protocols.kserve.wanted import ALL_BINARY, AS_BINARY, OutputForm, Wanted
from doorstep.request import InferenceRequest
from doorstep.types import (
    BOOL,
    BYTES,
    DTYPES,
    FP32,
    FP64,
    INT8,
    INT16,
    INT32,
    INT64,
    UINT8,
    UINT16,
    UINT32,
    UINT64,
    DataType,
    Tensor,
)
from doorstep.validation import INVALID, MOST_DIMENSIONS, UnfitTensor, request_prefix
from doorstep.wire.exchange import Buffer

SPLIT_BYTES = 32_768  # smaller messages are parsed whole: their copy costs less than looking for it
_RAW_INPUT_CONTENTS = 7

_parse = proto.ModelInferRequest.FromString


def parse_request(message: Buffer) -> tuple[Any, Sequence[Buffer]]:
    """The ModelInferRequest in `message` and its raw tensors, which the first no longer holds if the message is large.

    Raises Internal where it does not parse, as gRPC says it.
    """
    try:
        if len(message) >= SPLIT_BYTES:
            parts = split_field(message, _RAW_INPUT_CONTENTS)
            if parts is not None:
                return _parse(parts[0]), parts[1]
        parsed = _parse(message)
    except DecodeError:
        raise Internal("Unable to parse request") from None
    return parsed, parsed.raw_input_contents


def decode_infer(
    request: InferenceRequest, message: Any, raw: Sequence[Buffer], loan: Loan | None = None
) -> tuple[Wanted, bool]:
    """Fills `request` with what `parse_request` gave; returns how the outputs are wanted, and whether the client of a
    stream wants an empty final response. Raises DoorstepError; `request.id` is set first. Regions of shared memory
    that it names are noted in `loan`, which raises LongRead where one holds much."""
    request.id = request_id = message.id
    parameters = message.parameters
    wants_empty_final = bool(parameters) and apply_parameters(request, parameters)

    messages = message.inputs
    _check_names(request, messages)
    requested = message.outputs
    if requested:
        names = tuple([output.name for output in requested])
        if len(set(names)) != len(names):
            seen: set[str] = set()
            name = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise InvalidArgument(f"{request_prefix(request_id)}output '{name}' already exists in request")
        request.requested_outputs = names

    has_raw = bool(raw)
    inputs = request.inputs
    index = 0
    model = message.model_name
    for tensor in messages:
        name = tensor.name
        datatype = DTYPES.get(tensor.datatype, INVALID)
        shape = tuple(tensor.shape)
        region = shared_memory(name, tensor.parameters) if tensor.parameters else None
        if region is not None:
            if tensor.HasField("contents"):
                raise InvalidArgument(
                    f"unexpected 'content' provided when using shared memory for input tensor '{name}' "
                    f"for model '{model}'"
                )
            inputs[name] = binary_tensor(name, datatype, shape, lent(loan, region[0]).read(*region))
        elif tensor.HasField("contents"):
            if has_raw:
                raise InvalidArgument(
                    f"contents field must not be specified when using raw_input_contents for '{name}' "
                    f"for model '{model}'"
                )
            inputs[name] = _typed(name, datatype, shape, tensor.contents, model)
        elif has_raw and index < len(raw):
            inputs[name] = binary_tensor(name, datatype, shape, raw[index])
            index += 1
        else:
            raise InvalidArgument(f"unable to find data for input tensor '{name}' for model '{model}' in request.")

    return (_wanted(requested, loan) if requested else ALL_BINARY), wants_empty_final


def _check_names(request: InferenceRequest, messages: Sequence[Any]) -> None:
    if len(messages) < 2:
        return
    seen: set[str] = set()
    for message in messages:
        if message.name in seen:
            raise InvalidArgument(f"{request_prefix(request.id)}input '{message.name}' already exists in request")
        seen.add(message.name)


def _wanted(outputs: Sequence[Any], loan: Loan | None) -> Wanted:
    forms: dict[str, OutputForm] = {}
    for output in outputs:
        parameters = output.parameters
        if not parameters:
            continue
        classes = class_count(parameters)
        if classes and "shared_memory_region" in parameters:
            raise InvalidArgument("output can't set both 'shared_memory_region' and 'classification'")
        region = shared_memory(output.name, parameters)
        if region is not None:
            forms[output.name] = OutputForm(place=lent(loan, region[0]).place(*region))
        elif classes:
            forms[output.name] = OutputForm(binary=True, classes=classes)
    return Wanted(AS_BINARY, forms) if forms else ALL_BINARY


# field of InferTensorContents → the datatypes it may carry, and the array typecode of its elements
_CONTENTS: dict[str, tuple[tuple[DataType, ...], str]] = {
    "bool_contents": ((BOOL,), "B"),
    "int_contents": ((INT32, INT8, INT16), "i"),
    "int64_contents": ((INT64,), "q"),
    "uint_contents": ((UINT32, UINT8, UINT16), "I"),
    "uint64_contents": ((UINT64,), "Q"),
    "fp32_contents": ((FP32,), "f"),
    "fp64_contents": ((FP64,), "d"),
    "bytes_contents": ((BYTES,), ""),
}


def _typed(name: str, datatype: DataType, shape: tuple[int, ...], contents: Any, model: str) -> Tensor:
    """The tensor of an input whose elements are spelt out, one protobuf value each."""
    what = f"unexpected explicit tensor data for input tensor '{name}' for model '{model}'"
    values: Any = ()
    code = ""
    for field, (datatypes, typecode) in _CONTENTS.items():
        found = getattr(contents, field)
        if not found:
            continue
        if values:
            raise InvalidArgument(f"{what}, binary data was already supplied.")
        if datatype not in datatypes:
            raise InvalidArgument(f"{what} of type '{datatypes[0]}', expected datatype '{datatype}'")
        values, code = found, typecode
    if datatype is BYTES:
        return tensor_of_elements(name, shape, list(values))
    count = len(values)
    if len(shape) > MOST_DIMENSIONS or count != prod(shape) or datatype is INVALID or min(shape, default=0) < 0:
        return UnfitTensor(name, datatype, shape, count * datatype.itemsize)
    if not code:
        return binary_tensor(name, datatype, shape, b"")
    elements = np.frombuffer(array(code, values), datatype.numpy if datatype is BOOL else code)
    fitting = elements.astype(datatype.numpy, copy=False)
    if fitting.itemsize < elements.itemsize and not np.array_equal(fitting, elements):
        first = elements[fitting != elements][0]
        raise InvalidArgument(f"{first} in input tensor '{name}' for model '{model}' is out of the range of {datatype}")
    return binary_tensor(name, datatype, shape, fitting.data.cast("B"))
