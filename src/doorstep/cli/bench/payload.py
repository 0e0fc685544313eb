"""The one request that a benchmark sends: inputs made up from the model's metadata, or given, and encoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from doorstep.client.binary import to_bytes
from doorstep.client.connect import Target, request_bytes
from doorstep.client.messages import Call, infer_call, model_path
from doorstep.client.tensors import Metadata, describe_inputs, to_tensor
from doorstep.errors import InvalidArgument
from doorstep.types import BF16, BOOL, BYTES, DTYPES, FP16, Array, DataType, Tensor

_TEXT = b"The quick brown fox jumps over the lazy dog."


def parse_shapes(items: Sequence[str], metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """`--shape name=1,16` → {"name": (1, 16)}."""
    shapes = {}
    names = [spec["name"] for spec in metadata["inputs"]]
    for item in items:
        name, equals, text = item.rpartition("=") if "=" in item else item.rpartition(":")
        try:
            shapes[name] = tuple(int(size) for size in text.strip("[]").replace("x", ",").split(",") if size.strip())
        except ValueError:
            equals = ""
        if not equals or any(size < 0 for size in shapes.get(name, ())):
            raise InvalidArgument(f"--shape {item}: write NAME=1,16")
        if name not in names:
            raise InvalidArgument(f"--shape {item}: {describe_inputs(metadata)}")
    return shapes


def make_tensors(
    metadata: Metadata, given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], batch: int, *, batches: bool
) -> list[Tensor]:
    """What `given` says; the rest made up, the same in every run. Any size is 1 unless `shapes` says another."""
    draw = np.random.default_rng(0)
    tensors = []
    for spec in metadata["inputs"]:
        name, datatype = spec["name"], DTYPES[spec["datatype"]]
        wanted = [int(size) for size in spec["shape"]]
        if name in given:
            tensors.append(to_tensor(name, datatype, wanted, given[name]))
            continue
        shape = shapes.get(name)
        if shape is None:
            lead = [batch] if batches else []
            shape = (*lead, *(1 if size < 0 else size for size in wanted[len(lead) :]))
        tensors.append(Tensor(name, datatype, made_up(datatype, shape, draw)))
    return tensors


def made_up(datatype: DataType, shape: tuple[int, ...], draw: np.random.Generator) -> Array:
    """Fractions for floats, a sentence for BYTES; 0 and 1 for integers, which are valid token ids, masks and types."""
    if datatype is BYTES:
        return np.full(shape, _TEXT, np.object_)
    if datatype is BOOL or datatype.numpy.kind in "iu":
        return draw.integers(0, 2, shape).astype(datatype.numpy)
    return draw.random(shape).astype(datatype.numpy)


def http_request(target: Target, model: str, version: str, tensors: Sequence[Tensor], *, binary: bool) -> bytes:
    call = infer_call(model, version, tensors) if binary else _json_call(model, version, tensors)
    return b"".join(request_bytes(target, call))


def _json_call(model: str, version: str, tensors: Sequence[Tensor]) -> Call:
    inputs = [
        {"name": t.name, "shape": list(t.shape), "datatype": t.datatype.name, "data": _json_data(t)} for t in tensors
    ]
    body = orjson.dumps({"inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY)
    path = f"{model_path(model, version)}/infer"
    return Call("POST", path, (("Content-Type", "application/json"),), (body,))


def _json_data(tensor: Tensor) -> Any:
    if tensor.datatype in (FP16, BF16):
        raise InvalidArgument(f"JSON cannot carry {tensor.datatype}, as input '{tensor.name}' is: use --format binary")
    flat = tensor.array.ravel()
    if tensor.datatype is not BYTES:
        return flat
    try:
        return [item.decode() for item in flat.tolist()]
    except UnicodeDecodeError:
        raise InvalidArgument(
            f"JSON cannot carry input '{tensor.name}', which is no text: use --format binary"
        ) from None


def grpc_message(model: str, version: str, tensors: Sequence[Tensor]) -> bytes:
    from doorstep import proto

    message = proto.ModelInferRequest(model_name=model, model_version=version)
    for tensor in tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype.name, shape=tensor.shape)
        message.raw_input_contents.append(bytes(to_bytes(tensor)))
    return bytes(message.SerializeToString())
