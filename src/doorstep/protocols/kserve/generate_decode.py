"""The body of a generate call → InferenceRequest: flat JSON whose keys are inputs or parameters. Pure.

What a key means is the model's config to say. A value has no shape, so the input's is filled with what there is:
fixed dimensions are divided out, the innermost variable one takes the rest (server, http_server.cc: HandleGenerate).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from doorstep.config.model import ModelConfig, TensorSpec
from doorstep.errors import DoorstepError, Internal, InvalidArgument
from doorstep.protocols.kserve.bytes_tensors import tensor_of_elements
from doorstep.protocols.kserve.json_data import flatten, json_tensor
from doorstep.protocols.kserve.json_parameters import as_string, custom_parameter
from doorstep.protocols.kserve.json_text import loads
from doorstep.request import InferenceRequest, Parameter
from doorstep.types import BYTES, Tensor
from doorstep.validation import request_prefix
from doorstep.wire.exchange import Buffer

NESTED = "parameters"  # the one key whose value is an object of more keys


def decode_generate(request: InferenceRequest, body: Buffer, config: ModelConfig, max_input_size: int) -> None:
    """Fills `request` with what `body` says. Raises DoorstepError; `request.id` is set as soon as it is known."""
    text = bytes(body)
    document = loads(text)
    if type(document) is not dict:
        raise Internal("attempt to get members for non-object")
    if "id" in document:
        request.id = as_string(document["id"], "Unable to parse 'id'")
    twice = _twice(text, config)
    if twice is not None:
        raise InvalidArgument(f"{request_prefix(request.id)}input '{twice}' already exists in request")
    parameters: dict[str, Parameter] = {}
    _Reader(request, config, max_input_size, parameters).read(document, nested=False)
    if parameters:
        request.parameters = parameters


def _twice(text: bytes, config: ModelConfig) -> str | None:
    """The first input that the document has twice. A dict keeps the last of equal keys, and which of two prompts a
    client meant is not ours to guess."""
    if all(text.count(b'"%b"' % name.encode()) < 2 for name in config.inputs):
        return None
    outermost: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = [key for key, _ in pairs]  # the outermost object is complete last

    try:
        json.loads(text, object_pairs_hook=note)
    except (ValueError, RecursionError):  # `loads` has read it, and knows better
        return None
    seen: set[str] = set()
    for key in outermost:
        if key in seen and key in config.inputs:
            return key
        seen.add(key)
    return None


class _Reader:
    """One reading of one document."""

    __slots__ = ("_config", "_limit", "_parameters", "_request")

    def __init__(
        self, request: InferenceRequest, config: ModelConfig, limit: int, parameters: dict[str, Parameter]
    ) -> None:
        self._request = request
        self._config = config
        self._limit = limit
        self._parameters = parameters

    def read(self, document: dict[str, Any], *, nested: bool) -> None:
        size = 0  # of the inputs so far; an object inside counts anew
        for key, value in document.items():
            if key == NESTED and not nested:
                self._read_nested(value)
                continue
            spec = self._config.inputs.get(key)
            if spec is None:
                self._parameters[key] = custom_parameter(key, value)
            else:
                size += self._read_input(spec, value, size)

    def _read_nested(self, value: Any) -> None:
        if NESTED in self._config.inputs:
            raise InvalidArgument(f"Keyword '{NESTED}' for nested schema also given as input tensor name")
        if type(value) is not dict:
            raise Internal(f"Expected JSON object for keyword: '{NESTED}': attempt to access JSON non-object as object")
        try:
            self.read(value, nested=True)
        except DoorstepError as error:
            raise DoorstepError(f"Converting keyword: '{NESTED}': {error.message}", code=error.code) from None

    def _read_input(self, spec: TensorSpec, value: Any, before: int) -> int:
        """Adds an input; returns its size in bytes."""
        request, name = self._request, spec.name
        count = len(value) if type(value) is list else 1
        elements = [value] if type(value) is not list else value
        if spec.datatype is BYTES:
            elements = flatten(elements, "")
            if not all(type(e) is str for e in elements):
                raise Internal("Unable to parse JSON bytes array: attempt to access JSON non-string as string")
            elements = [e.encode() for e in elements]
            size = sum(map(len, elements)) + 4 * len(elements)
        else:
            size = count * spec.datatype.itemsize
        if before + size > self._limit:
            raise InvalidArgument(
                f"request size of {before} bytes with input '{name}' of size {size} bytes exceeds the maximum "
                f"allowed input size of {self._limit}. Use --http-max-input-size to increase the limit."
            )
        shape = _shape(spec, count)
        tensor: Tensor
        if spec.datatype is BYTES:
            tensor = tensor_of_elements(name, shape, elements)
        elif count == 0:
            tensor = Tensor(name, spec.datatype, np.empty(shape, spec.datatype.numpy))
        else:
            tensor = json_tensor(name, spec.datatype, shape, elements)
        if name in request.inputs:
            raise InvalidArgument(f"{request_prefix(request.id)}input '{name}' already exists in request")
        request.inputs[name] = tensor
        return size


def _shape(spec: TensorSpec, count: int) -> list[int]:
    """The input's shape for `count` elements."""
    shape = list(spec.shape)
    for dim in shape:
        if dim != -1:
            if dim == 0 or count % dim:
                raise _no_shape(spec)
            count //= dim
    for i in reversed(range(len(shape))):
        if shape[i] == -1:
            shape[i], count = count, 1
    if count != 1:
        raise _no_shape(spec)
    return shape


def _no_shape(spec: TensorSpec) -> InvalidArgument:
    return InvalidArgument(f"The schema can not convert input '{spec.name}' to tensor with proper shape")
