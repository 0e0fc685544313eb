"""InferenceResponse → an HTTP answer's body: JSON, or JSON and the outputs' bytes after it. Pure.

Tensor bytes are not copied, but for small ones. FP32 values are written as the shortest text that reads back as the
same FP32 value (Triton widens them to doubles first; the value is the same, the text shorter). NaN and the infinities
are written NaN, Infinity and -Infinity, as Triton does, though JSON proper has no words for them.
"""

from __future__ import annotations

from functools import lru_cache
from math import isnan
from typing import Any

import numpy as np
import orjson

from doorstep.config.model import ModelConfig
from doorstep.errors import InvalidArgument
from doorstep.protocols.kserve.bytes_tensors import flat_elements
from doorstep.protocols.kserve.classification import classify
from doorstep.protocols.kserve.tensor_bytes import tensor_bytes
from doorstep.protocols.kserve.wanted import ALL_BINARY, Wanted
from doorstep.request import InferenceResponse
from doorstep.types import BF16, BYTES, FP16, Array, DataType, Tensor
from doorstep.wire.exchange import Buffer

_dumps = orjson.dumps
_NUMPY = orjson.OPT_SERIALIZE_NUMPY
_KEPT = 1024

# What responses of one model, and outputs of one shape, have in common. Touched only from the event loop.
_openings: dict[tuple[str, str], bytes] = {}  # `"model_name":…,"model_version":…`
_output_heads: dict[tuple[str, DataType, tuple[int, ...]], bytes] = {}  # `{"name":…,"datatype":…,"shape":[…],`


def encode_infer(response: InferenceResponse, wanted: Wanted, config: ModelConfig) -> tuple[bytes, tuple[Buffer, ...]]:
    """The JSON, and the binary outputs that follow it. Raises DoorstepError for what cannot be said in JSON."""
    if wanted is ALL_BINARY and len(response.outputs) == 1 and not response.id and not response.parameters:
        tensor = response.outputs[0]
        if tensor.datatype.itemsize and tensor.array.size:
            return _binary_text(
                response.model_name, response.model_version, tensor.name, tensor.datatype, tensor.array.shape
            ), (tensor_bytes(tensor),)
    try:
        opening = _openings[response.model_name, response.model_version]
    except KeyError:
        opening = _opening(response.model_name, response.model_version)
    parts = [b'{"id":', _dumps(response.id), b",", opening] if response.id else [b"{", opening]
    if response.parameters:
        parts += (b',"parameters":', _dumps(response.parameters))
    parts.append(b',"outputs":[')
    buffers: tuple[Buffer, ...] = ()
    forms, form = wanted.forms, wanted.default
    comma = False
    for tensor in response.outputs:
        if forms:
            form = forms.get(tensor.name, wanted.default)
        if form.classes:
            spec = config.outputs[tensor.name]
            tensor = classify(tensor, form.classes, spec.labels, batched=config.max_batch_size > 0)
        array = tensor.array
        if comma:
            parts.append(b",")
        comma = True
        try:
            head = _output_heads[tensor.name, tensor.datatype, array.shape]
        except KeyError:
            head = _output_head(tensor)
        if form.place is not None:
            form.place.put(tensor.name, tensor_bytes(tensor))
            parts += (head[:-1], b"}")  # without the comma
            continue
        parts.append(head)
        if form.binary:
            data = tensor_bytes(tensor)
            size = data.nbytes if type(data) is memoryview else len(data)
            parts.append(b'"parameters":{"binary_data_size":%d}}' % size)
            if size:
                buffers += (data,)
        else:
            parts += (b'"data":', json_data(tensor), b"}")
    parts.append(b"]}")
    return b"".join(parts), buffers


@lru_cache(maxsize=_KEPT)
def _binary_text(model: str, version: str, name: str, datatype: DataType, shape: tuple[int, ...]) -> bytes:
    """All the JSON of a response with one binary output and nothing else to say: its values are not in it."""
    array: Array = np.empty(shape, datatype.numpy)
    head = _output_head(Tensor(name, datatype, array))
    return b'{%b,"outputs":[%b"parameters":{"binary_data_size":%d}}]}' % (_opening(model, version), head, array.nbytes)


def _opening(name: str, version: str) -> bytes:
    made = b'"model_name":%b,"model_version":%b' % (_dumps(name), _dumps(version))
    if len(_openings) >= _KEPT:
        _openings.clear()
    _openings[name, version] = made
    return made


def _output_head(tensor: Tensor) -> bytes:
    shape = tensor.array.shape
    made = b'{"name":%b,"datatype":"%b","shape":%b,' % (
        _dumps(tensor.name),
        tensor.datatype.name.encode(),
        _dumps(shape),
    )
    if len(_output_heads) >= _KEPT:
        _output_heads.clear()
    _output_heads[tensor.name, tensor.datatype, shape] = made
    return made


def json_data(tensor: Tensor) -> bytes:
    """The elements as one flat JSON array."""
    datatype = tensor.datatype
    if datatype is FP16 or datatype is BF16:
        raise InvalidArgument(
            f"sending {datatype} data via JSON is not supported. Please use the binary data format for output"
        )
    if datatype is BYTES:
        return _json_strings(tensor)
    text = _dumps(tensor.array.ravel(), option=_NUMPY)
    if b"n" in text:  # null: orjson's word for NaN and the infinities
        return _with_special_floats(text, tensor.array)
    return text


def _json_strings(tensor: Tensor) -> bytes:
    try:
        return _dumps([element.decode() for element in flat_elements(tensor.array)])
    except UnicodeDecodeError:
        raise InvalidArgument(
            f"output '{tensor.name}' holds bytes that are not UTF-8 text, which JSON cannot carry. Please use the "
            "binary data format for output"
        ) from None


def _with_special_floats(text: bytes, array: Array) -> bytes:
    values: Any = array.ravel()
    special = values[~np.isfinite(values)].tolist()
    pieces = text.split(b"null")
    words = [b"NaN" if isnan(v) else b"Infinity" if v > 0 else b"-Infinity" for v in special]
    assert len(pieces) == len(words) + 1
    return b"".join(piece + word for piece, word in zip(pieces, [*words, b""], strict=True))
