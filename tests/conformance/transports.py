"""Every way a client can send the same inference, behind one function: `Transport.infer`. Knows no model.

Real clients throughout: tritonclient (blocking and asyncio), plain grpcio, urllib, curl for HTTP/2.
"""

from __future__ import annotations

import asyncio
import json
import queue
import struct
import subprocess
import tempfile
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcclient_aio
import tritonclient.http as httpclient
import tritonclient.http.aio as httpclient_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Array = np.ndarray[Any, np.dtype[Any]]
SECONDS = 30
HALVES = ("FP16", "BF16")  # neither JSON nor typed contents can say them

NUMPY = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16, "FP32": np.float32, "FP64": np.float64, "BYTES": np.object_,
}  # fmt: skip
CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def datatype(array: Array) -> str:
    found: str = np_to_triton_dtype(array.dtype)
    return found


@dataclass
class Answer:
    outputs: dict[str, Array]  # in the order of the answer
    id: str = ""
    model_name: str = ""
    model_version: str = ""
    datatypes: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """The server's error. `code` is an HTTP status or a gRPC code's name; a stream has none."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"[{code}] {text}")
        self.code = code
        self.text = text


class Transport(ABC):
    name = ""
    text_only = False  # BYTES must be UTF-8
    halves = True  # carries FP16 and BF16
    single = False  # one input per request, batch of one, nothing else said

    @abstractmethod
    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        outputs: Sequence[str] = (),
        id: str = "",
        parameters: Mapping[str, Any] | None = None,
    ) -> Answer: ...

    def close(self) -> None:  # noqa: B027 (not every client holds something)
        pass


# HTTP


class TritonHttp(Transport):
    """tritonclient.http. `binary`: tensors beside the JSON; else in it, both ways."""

    def __init__(self, address: str, *, binary: bool) -> None:
        self.name = "http-binary" if binary else "http-json"
        self.halves, self.text_only = binary, not binary
        self._binary = binary
        self._client = self._connect(address)

    def _connect(self, address: str) -> Any:
        return httpclient.InferenceServerClient(address, network_timeout=SECONDS)

    def infer(self, model, inputs, *, outputs=(), id="", parameters=None):  # type: ignore[no-untyped-def]
        sent = [
            httpclient.InferInput(name, list(a.shape), datatype(a)).set_data_from_numpy(a, binary_data=self._binary)
            for name, a in inputs.items()
        ]
        try:
            if not self._binary and not outputs:  # the client asks for binary unless told otherwise, one by one
                outputs = [output["name"] for output in self._client.get_model_metadata(model)["outputs"]]
            asked = [httpclient.InferRequestedOutput(name, binary_data=self._binary) for name in outputs] or None
            result = self._call(model, sent, asked, id, dict(parameters or {}))
        except InferenceServerException as error:
            raise Refused(error.status(), error.message()) from None
        said = result.get_response()
        return Answer(
            {o["name"]: _bytes(result.as_numpy(o["name"])) for o in said["outputs"]},
            said.get("id", ""),
            said["model_name"],
            said["model_version"],
            {o["name"]: o["datatype"] for o in said["outputs"]},
        )

    def _call(self, model: str, sent: Any, asked: Any, id: str, parameters: dict[str, Any]) -> Any:
        return self._client.infer(model, sent, outputs=asked, request_id=id, parameters=parameters)

    def close(self) -> None:
        self._client.close()


class TritonHttpAio(TritonHttp):
    """tritonclient.http.aio, binary."""

    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        super().__init__(address, binary=True)
        self.name = "http-aio"

    def _connect(self, address: str) -> Any:
        async def connect() -> Any:
            return httpclient_aio.InferenceServerClient(address, conn_timeout=SECONDS)

        return self._loop.run_until_complete(connect())

    def _call(self, model: str, sent: Any, asked: Any, id: str, parameters: dict[str, Any]) -> Any:
        return self._loop.run_until_complete(
            self._client.infer(model, sent, outputs=asked, request_id=id, parameters=parameters)
        )

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class PlainHttp(Transport):
    """The bytes made by hand, so that the protocol is what is tested and not a client's idea of it."""

    def __init__(self, base: str, name: str, *, binary: bool, curl: bool = False) -> None:
        self.name = name
        self.halves, self.text_only = binary, not binary
        self._base, self._binary, self._curl = base, binary, curl

    def infer(self, model, inputs, *, outputs=(), id="", parameters=None):  # type: ignore[no-untyped-def]
        document: dict[str, Any] = {"inputs": []}
        tail = b""
        for name, array in inputs.items():
            entry = {"name": name, "shape": list(array.shape), "datatype": datatype(array)}
            if self._binary:
                data = wire_bytes(array)
                entry["parameters"] = {"binary_data_size": len(data)}
                tail += data
            else:
                entry["data"] = _listed(array)
            document["inputs"].append(entry)
        if id:
            document["id"] = id
        if outputs:
            document["outputs"] = [{"name": n, "parameters": {"binary_data": self._binary}} for n in outputs]
        if parameters or self._binary:
            document["parameters"] = {**(parameters or {}), **({"binary_data_output": True} if self._binary else {})}
        text = json.dumps(document).encode()
        headers = {"content-type": "application/json"}
        if self._binary:
            headers["inference-header-content-length"] = str(len(text))
        return self._answer(model, headers, text + tail)

    def _answer(self, model: str, headers: dict[str, str], body: bytes) -> Answer:
        send = _curl if self._curl else _urllib
        status, found, answer = send(f"{self._base}/v2/models/{model}/infer", headers, body)
        if status != 200:
            raise Refused(str(status), json.loads(answer)["error"])
        return read_http_answer(found, answer)


class RawHttp(PlainHttp):
    """One tensor as the whole body: `Inference-Header-Content-Length: 0`."""

    single = True

    def __init__(self, base: str) -> None:
        super().__init__(base, "http-raw", binary=True)

    def infer(self, model, inputs, *, outputs=(), id="", parameters=None):  # type: ignore[no-untyped-def]
        assert (tuple(outputs), id, parameters) == ((), "", None), "a raw request has no room for them"
        (array,) = inputs.values()
        headers = {"content-type": "application/octet-stream", "inference-header-content-length": "0"}
        body = array.ravel()[0] if array.dtype == np.object_ else array.tobytes()  # a string is its bytes, no more
        return self._answer(model, headers, body)


def _urllib(url: str, headers: dict[str, str], body: bytes) -> tuple[int, Mapping[str, str], bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=SECONDS) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


def _curl(url: str, headers: dict[str, str], body: bytes) -> tuple[int, Mapping[str, str], bytes]:
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "headers")
        fields = [f"-H{name}: {value}" for name, value in headers.items()]
        done = subprocess.run(
            ["curl", "-sS", "--noproxy", "*", "--http2-prior-knowledge", *fields, "--data-binary", "@-",
             "-D", str(kept), "-m", str(SECONDS), url],
            input=body, capture_output=True, check=True,
        )  # fmt: skip
        lines = kept.read_text().splitlines()
    assert lines[0].startswith("HTTP/2 "), lines[0]
    found = dict(line.split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), found, done.stdout


def wire_bytes(array: Array) -> bytes:
    """A tensor as the binary extension, gRPC's raw contents and raw requests carry it."""
    if array.dtype == np.object_:
        return b"".join(struct.pack("<I", len(element)) + element for element in array.ravel())
    return array.tobytes()


def from_wire(data: bytes, name: str, shape: Sequence[int]) -> Array:
    if name != "BYTES":
        return np.frombuffer(data, NUMPY[name]).reshape(shape)
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        found.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    return _objects(found, shape)


def read_http_answer(headers: Mapping[str, str], body: bytes) -> Answer:
    size = int(headers.get("inference-header-content-length", len(body)))
    document, tail = json.loads(body[:size]), body[size:]
    answer = Answer({}, document.get("id", ""), document["model_name"], document["model_version"])
    for output in document["outputs"]:
        name, kind, shape = output["name"], output["datatype"], output["shape"]
        answer.datatypes[name] = kind
        length = output.get("parameters", {}).get("binary_data_size")
        if length is not None:
            answer.outputs[name], tail = from_wire(tail[:length], kind, shape), tail[length:]
        elif kind == "BYTES":
            answer.outputs[name] = _objects([text.encode() for text in output["data"]], shape)
        else:
            answer.outputs[name] = np.array(output["data"], NUMPY[kind]).reshape(shape)
    assert tail == b"", "bytes behind the last output"
    assert (headers["content-type"] == "application/octet-stream") == ("inference-header-content-length" in headers)
    return answer


def _listed(array: Array) -> list[Any]:
    if array.dtype == np.object_:
        return [element.decode() for element in array.ravel()]
    found: list[Any] = array.ravel().tolist()
    return found


def _objects(values: Sequence[bytes], shape: Sequence[int]) -> Array:
    array = np.empty(len(values), np.object_)
    array[:] = values
    return array.reshape(shape)


def _bytes(array: Array) -> Array:
    """tritonclient gives `str` for JSON's BYTES."""
    if array.dtype != np.object_:
        return array
    return _objects([e.encode() if isinstance(e, str) else e for e in array.ravel()], array.shape)


# gRPC


class TritonGrpc(Transport):
    """tritonclient.grpc, unary."""

    def __init__(self, address: str, name: str = "grpc") -> None:
        self.name = name
        self._client = self._connect(address)

    def _connect(self, address: str) -> Any:
        return grpcclient.InferenceServerClient(address)

    def infer(self, model, inputs, *, outputs=(), id="", parameters=None):  # type: ignore[no-untyped-def]
        sent = [
            grpcclient.InferInput(name, list(a.shape), datatype(a)).set_data_from_numpy(a) for name, a in inputs.items()
        ]
        asked = [grpcclient.InferRequestedOutput(name) for name in outputs] or None
        try:
            result = self._call(model, sent, asked, id, dict(parameters or {}))
        except InferenceServerException as error:
            code = (error.status() or "").removeprefix("StatusCode.")
            raise Refused(code, error.message()) from None
        return _grpc_answer(result.get_response())

    def _call(self, model: str, sent: Any, asked: Any, id: str, parameters: dict[str, Any]) -> Any:
        return self._client.infer(
            model, sent, outputs=asked, request_id=id, parameters=parameters, client_timeout=SECONDS
        )

    def close(self) -> None:
        self._client.close()


class TritonGrpcAio(TritonGrpc):
    def __init__(self, address: str) -> None:
        self._loop = asyncio.new_event_loop()
        super().__init__(address, "grpc-aio")

    def _connect(self, address: str) -> Any:
        async def connect() -> Any:
            return grpcclient_aio.InferenceServerClient(address)

        return self._loop.run_until_complete(connect())

    def _call(self, model: str, sent: Any, asked: Any, id: str, parameters: dict[str, Any]) -> Any:
        return self._loop.run_until_complete(
            self._client.infer(model, sent, outputs=asked, request_id=id, parameters=parameters, client_timeout=SECONDS)
        )

    def close(self) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()


class TritonStream(TritonGrpc):
    """tritonclient.grpc, one stream for all requests."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "grpc-stream")
        self._answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: self._answers.put((result, error)))

    def _call(self, model: str, sent: Any, asked: Any, id: str, parameters: dict[str, Any]) -> Any:
        self._client.async_stream_infer(model, sent, outputs=asked, request_id=id, parameters=parameters)
        result, error = self._answers.get(timeout=SECONDS)
        if error is not None:
            raise error
        final = result.get_response().parameters["triton_final_response"].bool_param
        assert final, "one response, and it is the last"
        return result

    def close(self) -> None:
        self._client.stop_stream()
        self._client.close()


class TypedGrpc(Transport):
    """Plain grpcio, every element spelt out in `contents`."""

    name = "grpc-contents"
    halves = False

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def infer(self, model, inputs, *, outputs=(), id="", parameters=None):  # type: ignore[no-untyped-def]
        message = service_pb2.ModelInferRequest(model_name=model, id=id)
        for name, array in inputs.items():
            kind = datatype(array)
            entry = message.inputs.add(name=name, datatype=kind, shape=array.shape)
            entry.contents.SetInParent()
            getattr(entry.contents, CONTENTS[kind]).extend(array.ravel().tolist())
        for name in outputs:
            message.outputs.add(name=name)
        for key, value in (parameters or {}).items():
            kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
            setattr(message.parameters[key], kind, value)
        try:
            return _grpc_answer(self._stub.ModelInfer(message, timeout=SECONDS))
        except grpc.RpcError as error:
            raise Refused(error.code().name, error.details()) from None

    def close(self) -> None:
        self._channel.close()


def _grpc_answer(message: Any) -> Answer:
    assert len(message.raw_output_contents) == len(message.outputs), "one raw entry for each output"
    pairs = list(zip(message.outputs, message.raw_output_contents, strict=True))
    return Answer(
        {o.name: from_wire(raw, o.datatype, list(o.shape)) for o, raw in pairs},
        message.id,
        message.model_name,
        message.model_version,
        {o.name: o.datatype for o, _ in pairs},
    )


NAMES = (
    "http-json", "http-binary", "http-aio", "http-raw", "http1-by-hand", "http2-json", "http2-binary",
    "grpc", "grpc-aio", "grpc-contents", "grpc-stream", "grpc-on-the-http-port", "http-on-the-grpc-port",
)  # fmt: skip


def connect(name: str, server: Any) -> Transport:
    """One of NAMES, to a ServerProcess."""
    match name:
        case "http-json":
            return TritonHttp(server.http, binary=False)
        case "http-binary":
            return TritonHttp(server.http, binary=True)
        case "http-aio":
            return TritonHttpAio(server.http)
        case "http-raw":
            return RawHttp(server.url(""))
        case "http1-by-hand":
            return PlainHttp(server.url(""), name, binary=False)
        case "http2-json":
            return PlainHttp(server.url(""), name, binary=False, curl=True)
        case "http2-binary":
            return PlainHttp(server.url(""), name, binary=True, curl=True)
        case "grpc":
            return TritonGrpc(server.grpc)
        case "grpc-aio":
            return TritonGrpcAio(server.grpc)
        case "grpc-contents":
            return TypedGrpc(server.grpc)
        case "grpc-stream":
            return TritonStream(server.grpc)
        case "grpc-on-the-http-port":
            return TritonGrpc(server.http, name)
        case "http-on-the-grpc-port":
            return PlainHttp(f"http://{server.grpc}", name, binary=True)
    raise ValueError(name)
