"""V2 requests and answers as HTTP messages: what to send, and how to read what comes back. Does no input or output."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import orjson

from doorstep.client.binary import Buffer, from_bytes, to_bytes
from doorstep.errors import (
    AlreadyExists,
    DoorstepError,
    Internal,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from doorstep.types import DTYPES, Array, Tensor

ERRORS: dict[int, type[DoorstepError]] = {
    400: InvalidArgument,
    404: NotFound,
    409: AlreadyExists,
    500: Internal,
    501: Unsupported,
    503: Unavailable,
}


@dataclass(frozen=True, slots=True)
class Call:
    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: tuple[Buffer, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]  # names in lower case
    body: bytes


def model_path(model: str, version: str = "") -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(str(version), safe='')}" if version else path


def json_call(path: str, document: Any = None) -> Call:
    """GET without a document, POST with one."""
    if document is None:
        return Call("GET", path)
    return Call("POST", path, (("Content-Type", "application/json"),), (orjson.dumps(document),))


def load_call(model: str, config: str | Mapping[str, Any] | None, files: Mapping[str, bytes]) -> Call:
    parameters: dict[str, str] = {}
    if config is not None:
        parameters["config"] = config if isinstance(config, str) else orjson.dumps(config).decode()
    for path, content in files.items():
        parameters[f"file:{path}"] = b64encode(content).decode()
    path = f"/v2/repository/models/{quote(model, safe='')}/load"
    return json_call(path, {"parameters": parameters} if parameters else {})


def unload_call(model: str, unload_dependents: bool) -> Call:
    path = f"/v2/repository/models/{quote(model, safe='')}/unload"
    return json_call(path, {"parameters": {"unload_dependents": unload_dependents}})


def infer_call(
    model: str,
    version: str,
    tensors: Iterable[Tensor],
    *,
    outputs: Sequence[str] = (),
    id: str = "",
    parameters: Mapping[str, bool | int | float | str] | None = None,
) -> Call:
    """All tensors as bytes after the JSON, and the answer's too (extension_binary_data.md)."""
    inputs: list[dict[str, Any]] = []
    data: list[Buffer] = []
    for tensor in tensors:
        raw = to_bytes(tensor)
        inputs.append(
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "datatype": tensor.datatype.name,
                "parameters": {"binary_data_size": memoryview(raw).nbytes},
            }
        )
        data.append(raw)
    document: dict[str, Any] = {"inputs": inputs, "parameters": {**(parameters or {}), "binary_data_output": True}}
    if id:
        document["id"] = id
    if outputs:
        document["outputs"] = [{"name": name} for name in outputs]
    head = orjson.dumps(document)
    headers = (("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(head))))
    return Call("POST", f"{model_path(model, version)}/infer", headers, (head, *data))


def read_json(answer: Answer) -> Any:
    check(answer)
    return orjson.loads(answer.body) if answer.body else None


def read_infer(answer: Answer) -> dict[str, Array]:
    """Output name → array, read-only because a view on the answer; BYTES outputs are object arrays of `bytes`."""
    check(answer)
    length = answer.headers.get("inference-header-content-length")
    size = int(length) if length is not None else len(answer.body)
    data = memoryview(answer.body)
    found: dict[str, Array] = {}
    offset = size
    for output in orjson.loads(data[:size])["outputs"]:
        datatype, shape = DTYPES[output["datatype"]], [int(dim) for dim in output["shape"]]
        if "data" in output:
            found[output["name"]] = _from_json(output["data"], datatype.numpy, shape)
            continue
        end = offset + output["parameters"]["binary_data_size"]
        found[output["name"]] = from_bytes(output["name"], datatype, shape, data[offset:end])
        offset = end
    return found


def _from_json(data: list[Any], dtype: Any, shape: list[int]) -> Array:
    """A server that does not know the binary extension answers in JSON."""
    if dtype.hasobject:
        array = np.empty(len(data), np.object_)
        array[:] = [item.encode() if isinstance(item, str) else item for item in data]
        return array.reshape(shape)
    return np.array(data, dtype).reshape(shape)


def check(answer: Answer) -> None:
    """Raises the error that the answer is, with the server's text."""
    if answer.status < 400:
        return
    try:
        text = str(orjson.loads(answer.body)["error"])
    except (ValueError, KeyError, TypeError):
        text = answer.body[:300].decode(errors="replace") or f"the server answered {answer.status} without a reason"
    raise ERRORS.get(answer.status, Unavailable if answer.status in (429, 502, 504) else Internal)(text)


def one_or_all(outputs: dict[str, Array]) -> Any:
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def named_inputs(metadata: Mapping[str, Any], inputs: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` is a dict by name, or the value of a model's only input."""
    if inputs is None:
        return dict(named)
    if isinstance(inputs, Mapping):
        return {**inputs, **named}
    names = [spec["name"] for spec in metadata["inputs"]]
    if len(names) != 1:
        raise InvalidArgument(f"model '{metadata['name']}' has inputs {', '.join(names)}; give each by name")
    return {names[0]: inputs, **named}
