"""How the cases spell a V2 inference request over HTTP: inputs, JSON bodies, binary bodies. Knows no server."""

from __future__ import annotations

import json
import struct
from typing import Any

from .wire import HttpCase

Json = dict[str, Any]


def tensor(name: str, shape: Any, datatype: Any, data: Any = None, **parameters: Any) -> Json:
    """An input as JSON; leaves out what is None."""
    found: Json = {"name": name, "shape": shape, "datatype": datatype, "parameters": parameters or None, "data": data}
    return {key: value for key, value in found.items() if value is not None}


def body(*inputs: Any, outputs: Any = None, **top: Any) -> Json:
    return {**top, "inputs": list(inputs), **({} if outputs is None else {"outputs": outputs})}


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def strings(*values: bytes) -> bytes:
    """A BYTES tensor as the binary extension sends it."""
    return b"".join(struct.pack("<I", len(v)) + v for v in values)


class InferCases:
    """Grows a table of POST …/infer."""

    def __init__(self) -> None:
        self.cases: list[HttpCase] = []

    def add(
        self, name: str, model: str, request: Any, *headers: tuple[str, str], version: str = "", **extra: Any
    ) -> None:
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "") + "/infer"
        payload = request if isinstance(request, bytes) else json.dumps(request).encode()
        self.cases.append(HttpCase(f"infer: {name}", "POST", path, headers, payload, **extra))

    def add_binary(self, name: str, model: str, request: Json, *blobs: bytes) -> None:
        head = json.dumps(request).encode()
        length = ("Inference-Header-Content-Length", str(len(head)))
        self.add(name, model, head + b"".join(blobs), length)


A = tensor("INPUT0", [1, 4], "INT32", [1, 2, 3, 4])
B = tensor("INPUT1", [1, 4], "INT32", [10, 20, 30, 40])
SUM: Json = {"name": "OUTPUT0"}
DIFFERENCE: Json = {"name": "OUTPUT1"}
X = tensor("IN", [3], "FP32", [0.5, -1.5, 2.0])
ONE = tensor("IN", [1], "INT32", [7])
PLAIN = json.dumps(body(A, B)).encode()  # a request that is answered

# What each datatype holds at its ends, as JSON says it.
JSON_DATA: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "INT8": [-128, 127],
    "INT16": [-(2**15), 2**15 - 1],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "FP32": [0.1, -3.4e38],
    "FP64": [0.1, 1.7e308],
}
