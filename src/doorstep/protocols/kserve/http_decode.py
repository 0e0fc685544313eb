"""The body of an HTTP inference request: JSON, JSON with binary tensors after it, or one raw tensor. Pure.

Binary tensors are views on the body, which must not change while the request lives. Every error is Triton's, in the
order Triton finds them (server, http_server.cc: EVBufferToInput); what needs the model's config is validation.py's.
"""

from __future__ import annotations

import re
from math import prod
from typing import Any

from doorstep.client_memory import Loan
from doorstep.config.model import ModelConfig
from doorstep.errors import Internal, InvalidArgument, NotFound
from doorstep.protocols.kserve.json_data import empty_or_refused, json_tensor, quick_json_tensor
from doorstep.protocols.kserve.json_parameters import apply_parameters, as_bool, as_string, as_unsigned
from doorstep.protocols.kserve.json_text import loads
from doorstep.protocols.kserve.tensor_bytes import binary_tensor, quick_binary_tensor
from doorstep.protocols.kserve.wanted import ALL_BINARY, ALL_JSON, AS_BINARY, AS_JSON, OutputForm, Wanted
from doorstep.request import InferenceRequest
from doorstep.types import BYTES, DTYPES, DataType, Tensor, object_array
from doorstep.validation import INT64_MAX, INVALID, UnfitTensor, request_prefix
from doorstep.wire.exchange import Buffer

_IN_JSON, _IN_REGION = -1, -2  # where the data of an input are, if they do not follow the JSON
_MISSING: Any = object()  # tells an absent key from null
_HEADER_NAME = "Inference-Header-Content-Length"
_LEADING_INTEGER = re.compile(rb"[ \t]*([+-]?[0-9]+)")


def header_length(value: bytes | None, body_size: int) -> int:
    """How many bytes of the body are JSON, from the Inference-Header-Content-Length header, if there is one."""
    if value is None:
        return body_size
    if value.isdigit() and len(value) < 10 and (plain := int(value)) <= body_size:
        return plain
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
    request: InferenceRequest,
    body: Buffer,
    json_size: int,
    config: ModelConfig,
    max_input_size: int,
    loan: Loan | None = None,
) -> Wanted:
    """Fills `request` with what `body` says; its first `json_size` bytes are JSON (none: the body is the one tensor).

    Returns how the outputs are wanted. Raises DoorstepError; `request.id` is set as soon as it is known. Regions of
    shared memory that it names are noted in `loan`, which raises LongRead where one holds much.
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

    inputs = request.inputs
    offset = json_size
    literals = b"true" in text or b"false" in text
    short = not literals and json_size <= max_input_size >> 2  # no element takes more than four times its text
    for item in _array(document, "inputs"):
        if offset < body_size:
            tensor = quick_binary_tensor(item, body, offset)
            size = tensor.array.nbytes if tensor is not None else 0
        else:
            tensor = quick_json_tensor(item) if short else None
            size = 0
        if tensor is None:
            tensor, size = _input(request, item, memoryview(body)[offset:], config, max_input_size, loan)
        elif tensor.name in inputs:
            raise _twice(request, "input", tensor.name)
        inputs[tensor.name] = tensor
        offset += size
    if offset != body_size:
        raise InvalidArgument(f"unexpected additional input data for model '{config.name}'")

    if "outputs" not in document:
        return ALL_BINARY if binary_default else ALL_JSON
    return _outputs(request, _array(document, "outputs"), AS_BINARY if binary_default else AS_JSON, loan)


def _input(
    request: InferenceRequest,
    item: Any,
    rest: memoryview,
    config: ModelConfig,
    max_input_size: int,
    loan: Loan | None,
) -> tuple[Tensor, int]:
    """One input, whatever it looks like, and how much of `rest`, the binary data not yet read, is its."""
    size = _binary_size(item)
    name, datatype, shape = _metadata(item)
    if name in request.inputs:
        raise _twice(request, "input", name)
    if size == _IN_REGION:
        region, at, size = _region(item["parameters"])
        return binary_tensor(name, datatype, shape, _lent(loan, region).read(region, at, size)), 0
    if size < 0:
        tensor = empty_or_refused(name, datatype, shape, item["data"], max_input_size)
        return tensor or json_tensor(name, datatype, shape, item["data"]), 0
    if size > len(rest):
        raise InvalidArgument(
            f"unexpected size for input '{name}', expecting {size - len(rest)} additional bytes "
            f"for model '{config.name}'"
        )
    return binary_tensor(name, datatype, shape, rest[:size]), size


def _twice(request: InferenceRequest, what: str, name: str) -> InvalidArgument:
    return InvalidArgument(f"{request_prefix(request.id)}{what} '{name}' already exists in request")


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
    """The size of an input's binary data; _IN_JSON or _IN_REGION. Exactly one source must be set."""
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
        return _IN_REGION
    if "binary_data_size" in parameters:
        return as_unsigned(parameters["binary_data_size"], "Unable to parse 'binary_data_size'")
    return _IN_JSON


def _region(parameters: dict[str, Any]) -> tuple[str, int, int]:
    """The name of a region, an offset in it, and a size."""
    name = as_string(parameters["shared_memory_region"], "Unable to parse 'shared_memory_region'")
    offset = as_unsigned(parameters.get("shared_memory_offset", 0), "Unable to parse 'shared_memory_offset'")
    size = as_unsigned(parameters.get("shared_memory_byte_size", 0), "Unable to parse 'shared_memory_byte_size'")
    return name, offset, size


def _lent(loan: Loan | None, name: str) -> Loan:
    if loan is None:  # clients' shared memory is switched off, so there are no regions
        raise NotFound(f"Unable to find shared memory region: '{name}'")
    return loan


def _outputs(request: InferenceRequest, items: list[Any], default: OutputForm, loan: Loan | None) -> Wanted:
    forms: dict[str, OutputForm] = {}
    for item in items:
        form = _quick_form(item) or _form(item, loan)
        name = item["name"]
        if name in forms:
            raise _twice(request, "output", name)
        forms[name] = form
    request.requested_outputs = tuple(forms)
    first = next(iter(forms.values()), None)
    if first is AS_BINARY or first is AS_JSON:
        for form in forms.values():
            if form is not first:
                break
        else:
            return ALL_BINARY if first is AS_BINARY else ALL_JSON
    return Wanted(default, forms)


def _quick_form(item: Any) -> OutputForm | None:
    """For an output that has a name and at most `binary_data`; None for all others."""
    try:
        if type(item["name"]) is not str:
            return None
        if len(item) == 1:
            return AS_JSON
        parameters = item["parameters"]
        if len(item) == 2 and len(parameters) == 1:
            binary = parameters["binary_data"]
            if type(binary) is bool:
                return AS_BINARY if binary else AS_JSON
    except (KeyError, TypeError):
        pass
    return None


def _form(item: Any, loan: Loan | None) -> OutputForm:
    parameters = item.get("parameters") if type(item) is dict else None
    if type(parameters) is not dict:
        parameters = {}
    if "shared_memory_region" in parameters:
        if "classification" in parameters:
            raise InvalidArgument("Output can't set both 'shared_memory_region' and 'classification'")
        if "binary_data" in parameters and as_bool(parameters["binary_data"], "Unable to set 'binary_data'"):
            raise InvalidArgument("Output can't set both 'shared_memory_region' and 'binary_data'")
    as_string(_member(item, "name"), "Unable to parse 'name'")
    classes = 0
    binary = False
    if "classification" in parameters:
        classes = as_unsigned(parameters["classification"], "Unable to set 'classification'")
    if "shared_memory_region" in parameters:
        region, at, size = _region(parameters)
        return OutputForm(place=_lent(loan, region).place(region, at, size))
    if "binary_data" in parameters:
        binary = as_bool(parameters["binary_data"], "Unable to parse 'binary_data'")
    if classes:
        return OutputForm(binary, classes)
    return AS_BINARY if binary else AS_JSON


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
