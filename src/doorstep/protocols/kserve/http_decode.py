"""The body of an HTTP inference request: JSON, JSON with binary tensors after it, or one raw tensor. Pure.

Binary tensors are views on the body, which must not change while the request lives. Every error is Triton's, in the
order Triton finds them (server, http_server.cc: EVBufferToInput); what needs the model's config is validation.py's.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

import numpy as np

from doorstep.config.model import ModelConfig
from doorstep.errors import Internal, InvalidArgument, NotFound
from doorstep.protocols.kserve.bytes_tensors import object_array
from doorstep.protocols.kserve.json_data import element_count, json_tensor
from doorstep.protocols.kserve.json_parameters import apply_parameters, as_bool, as_string, as_unsigned
from doorstep.protocols.kserve.json_text import loads
from doorstep.protocols.kserve.tensor_bytes import binary_tensor
from doorstep.protocols.kserve.wanted import ALL_BINARY, ALL_JSON, AS_BINARY, AS_JSON, OutputForm, Wanted
from doorstep.request import InferenceRequest
from doorstep.types import BYTES, DTYPES, DataType, Tensor
from doorstep.validation import INT64_MAX, INVALID, UnfitTensor, request_prefix, shape_text
from doorstep.wire.exchange import Buffer

_MISSING: Any = object()  # tells an absent key from null
_HEADER_NAME = "Inference-Header-Content-Length"
_LEADING_INTEGER = re.compile(rb"[ \t]*([+-]?[0-9]+)")


def header_length(value: bytes | None, body_size: int) -> int:
    """How many bytes of the body are JSON, from the Inference-Header-Content-Length header, if there is one."""
    if value is None:
        return body_size
    match = _LEADING_INTEGER.match(value)
    text = value.decode("latin-1")
    if match is None:
        raise InvalidArgument(f"Unable to parse {_HEADER_NAME}, got: {text}")
    length = int(match[1][:20])
    if not -(2**31) <= length < 2**31:
        raise InvalidArgument(
            f"Unable to parse {_HEADER_NAME}, value is out of range [ {-(2**31)}, {2**31 - 1} ], got: {text}"
        )
    if not 0 <= length <= body_size:
        raise InvalidArgument(f"inference header size should be in range (0, {body_size}), got: {text}")
    return length


def decode_infer(
    request: InferenceRequest, body: Buffer, json_size: int, config: ModelConfig, max_input_size: int
) -> Wanted:
    """Fills `request` with what `body` says; its first `json_size` bytes are JSON (none: the body is the one tensor).

    Returns how the outputs are wanted. Raises DoorstepError; `request.id` is set as soon as it is known.
    """
    if json_size == 0:
        _raw(request, body, config, max_input_size)
        return ALL_BINARY
    if json_size > max_input_size:
        raise InvalidArgument(
            f"request JSON size of {json_size} bytes exceeds the maximum allowed input size of {max_input_size} bytes. "
            "Use --http-max-input-size to increase the limit."
        )
    body_size = len(body)
    text = body if json_size == body_size and type(body) is not memoryview else bytes(memoryview(body)[:json_size])
    document = loads(text)  # type: ignore[arg-type]
    if type(document) is not dict:
        raise Internal("Unable to parse 'inputs': attempt to access non-existing object member 'inputs'")
    if "id" in document:
        request.id = as_string(document["id"], "Unable to parse 'id'")
    binary_default = "parameters" in document and apply_parameters(request, document["parameters"])

    literals = b"true" in text or b"false" in text
    inputs = request.inputs
    offset = json_size
    for item in _array(document, "inputs"):
        binary_size = -1
        if type(item) is not dict or "parameters" in item or "data" not in item:
            binary_size = _binary_size(item)
        name, datatype, shape = _metadata(item)
        if name in inputs:
            raise InvalidArgument(f"{request_prefix(request.id)}input '{name}' already exists in request")
        if binary_size >= 0:
            end = offset + binary_size
            if end > body_size:
                raise InvalidArgument(
                    f"unexpected size for input '{name}', expecting {end - body_size} additional bytes "
                    f"for model '{config.name}'"
                )
            inputs[name] = binary_tensor(name, datatype, shape, memoryview(body)[offset:end])
            offset = end
            continue
        count = prod(shape)
        if not 0 < count <= _FEW or not shape or min(shape) < 0 or count * datatype.itemsize > max_input_size:
            unusual = _unusual(name, datatype, shape, item["data"], max_input_size)
            if unusual is not None:
                inputs[name] = unusual
                continue
        inputs[name] = json_tensor(name, datatype, shape, item["data"], literals)
    if offset != body_size:
        raise InvalidArgument(f"unexpected additional input data for model '{config.name}'")

    if "outputs" not in document:
        return ALL_BINARY if binary_default else ALL_JSON
    return _outputs(request, _array(document, "outputs"), AS_BINARY if binary_default else AS_JSON)


_FEW = 2**31  # elements; below it no product of a size can overflow


def _array(document: dict[str, Any], key: str) -> list[Any]:
    found = document.get(key, _MISSING)
    if type(found) is list:
        return found
    if found is _MISSING:
        raise Internal(f"Unable to parse '{key}': attempt to access non-existing object member '{key}'")
    raise Internal(f"Unable to parse '{key}': attempt to access JSON non-array as array")


def _member(item: Any, key: str) -> Any:
    if type(item) is not dict or key not in item:
        raise Internal(f"Unable to parse '{key}': attempt to access non-existing object member '{key}'")
    return item[key]


def _metadata(item: Any) -> tuple[str, DataType, list[int]]:
    try:
        name = item["name"]
        datatype = DTYPES[item["datatype"]]
        shape = item["shape"]
    except (KeyError, TypeError):
        name = as_string(_member(item, "name"), "Unable to parse 'name'")
        datatype = DTYPES.get(as_string(_member(item, "datatype"), "Unable to parse 'datatype'"), INVALID)
        shape = _member(item, "shape")
    if type(name) is not str:
        raise Internal("Unable to parse 'name': attempt to access JSON non-string as string")
    if type(shape) is not list:
        raise Internal("Unable to parse 'shape': attempt to access JSON non-array as array")
    for dim in shape:
        if type(dim) is not int or dim < 0:
            as_unsigned(dim, "Unable to parse 'shape'")
        if dim > INT64_MAX:  # what a signed 64-bit integer makes of it
            return (
                name,
                datatype,
                [d - 2**64 if d > INT64_MAX else as_unsigned(d, "Unable to parse 'shape'") for d in shape],
            )
    return name, datatype, shape


def _binary_size(item: Any) -> int:
    """The size of an input's binary data; -1 where its data are in the JSON. Exactly one source must be set."""
    found = []
    is_object = type(item) is dict
    parameters = item.get("parameters") if is_object else None
    if type(parameters) is not dict:
        parameters = {}
    if is_object and "data" in item:
        found.append("'data'")
    if "binary_data_size" in parameters:
        found.append("'binary_data_size'")
    if "shared_memory_region" in parameters:
        found.append("'shared_memory_region'")
    if len(found) != 1:
        what = f"set {' '.join(found)}" if found else "no field is set"
        raise InvalidArgument(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {what}"
        )
    if "shared_memory_region" in parameters:
        raise no_region(as_string(parameters["shared_memory_region"], "Unable to parse 'shared_memory_region'"))
    if "binary_data_size" in parameters:
        return as_unsigned(parameters["binary_data_size"], "Unable to parse 'binary_data_size'")
    return -1


def no_region(name: str) -> NotFound:
    return NotFound(f"Unable to find shared memory region: '{name}'")


def _unusual(name: str, datatype: DataType, shape: list[int], data: Any, max_input_size: int) -> Tensor | None:
    """Refuses a shape that no JSON data can fill; makes the tensor that has no elements; None for the rest."""
    count = element_count(shape)
    if not shape:  # Triton counts no element in it, and no model has such an input
        return UnfitTensor(name, datatype, shape, 0)
    if count == 0:
        try:
            return Tensor(name, datatype, np.empty(shape, datatype.numpy))
        except ValueError:
            return UnfitTensor(name, datatype, shape, 0)
    if count == -2:
        raise InvalidArgument(
            f"invalid shape for input '{name}': shape {shape_text(shape)} contains one or more invalid dimensions"
        )
    if count == -3:
        raise InvalidArgument(
            f"invalid shape for input '{name}': shape {shape_text(shape)} causes total element count to exceed maximum "
            f"size of {INT64_MAX}"
        )
    if type(data) is not list:
        raise Internal("Unable to parse 'data': attempt to access JSON non-array as array")
    if datatype.itemsize > 1 and count > INT64_MAX // datatype.itemsize:
        raise InvalidArgument(
            f"byte size overflow for input '{name}': element count ({count}) * data type size ({datatype.itemsize}) "
            f"exceeds maximum allowed size ({INT64_MAX})"
        )
    size = count * datatype.itemsize % 2**64
    if size > max_input_size:
        raise InvalidArgument(
            f"JSON input '{name}' has a byte_size ({size} bytes) that exceeds the maximum allowed value of "
            f"{max_input_size} bytes. Use --http-max-input-size to increase the limit."
        )
    return None


def _outputs(request: InferenceRequest, items: list[Any], default: OutputForm) -> Wanted:
    names: list[str] = []
    forms: dict[str, OutputForm] = {}
    for item in items:
        parameters = item.get("parameters") if type(item) is dict else None
        if type(parameters) is not dict:
            parameters = {}
        if "shared_memory_region" in parameters:
            if "classification" in parameters:
                raise InvalidArgument("Output can't set both 'shared_memory_region' and 'classification'")
            if "binary_data" in parameters and as_bool(parameters["binary_data"], "Unable to set 'binary_data'"):
                raise InvalidArgument("Output can't set both 'shared_memory_region' and 'binary_data'")
        name = as_string(_member(item, "name"), "Unable to parse 'name'")
        if name in names:
            raise InvalidArgument(f"{request_prefix(request.id)}output '{name}' already exists in request")
        names.append(name)
        classes = 0
        binary = False
        if "classification" in parameters:
            classes = as_unsigned(parameters["classification"], "Unable to set 'classification'")
        if "shared_memory_region" in parameters:
            raise no_region(as_string(parameters["shared_memory_region"], "Unable to parse 'shared_memory_region'"))
        if "binary_data" in parameters:
            binary = as_bool(parameters["binary_data"], "Unable to parse 'binary_data'")
        if classes:
            forms[name] = OutputForm(binary, classes)
        else:
            forms[name] = AS_BINARY if binary else AS_JSON
    request.requested_outputs = tuple(names)
    return Wanted(default, forms)


def _raw(request: InferenceRequest, body: Buffer, config: ModelConfig, max_input_size: int) -> None:
    """A body that is nothing but the model's one input; its shape is deduced (core, infer_request.cc: Normalize)."""
    size = len(body)
    if size > max_input_size:
        raise InvalidArgument(
            f"Raw input has a byte_size ({size} bytes) that exceeds the maximum allowed value of {max_input_size} "
            "bytes. Use --http-max-input-size to increase the limit."
        )
    prefix = request_prefix(request.id)
    if len(config.inputs) != 1:
        raise InvalidArgument(
            f"{prefix}Raw request must only have 1 input (found 1) to be deduced but got {len(config.inputs)} inputs "
            f"in '{config.name}' model configuration"
        )
    (spec,) = config.inputs.values()
    if spec.dims.count(-1) > 1:
        raise InvalidArgument(
            f"{prefix}The shape of the raw input '{spec.name}' can not be deduced because there are more than one "
            "variable-sized dimension"
        )
    fixed = prod(dim for dim in spec.dims if dim != -1)
    lead = [1] if config.max_batch_size else []
    if spec.datatype is BYTES:
        if -1 in spec.dims or fixed != 1:
            raise InvalidArgument(
                f"{prefix}For BYTE datatype raw input '{spec.name}', the model must have input shape [1]"
            )
        tensor = Tensor(spec.name, BYTES, object_array([bytes(body)], [*lead, *spec.dims]))
    else:
        row = fixed * spec.datatype.itemsize
        dims = (size // row if dim == -1 and row else max(dim, 0) for dim in spec.dims)
        shape = [*lead, *dims]
        tensor = binary_tensor(spec.name, spec.datatype, shape, body)
        if isinstance(tensor, UnfitTensor):
            raise InvalidArgument(
                f"{prefix}input byte size mismatch for input 'raw_input' for model '{config.name}'. "
                f"Expected {prod(shape) * spec.datatype.itemsize}, got {size}"
            )
    request.inputs[spec.name] = tensor
