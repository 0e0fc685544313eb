"""Cases and answers, and how one is sent and the other read, byte for byte. Knows no model and judges nothing."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.client
import json
import socket
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import json_format
from google.protobuf.message import Message
from tritonclient.grpc import service_pb2

HEADERS_THAT_MATTER = (
    "content-type",
    "content-encoding",
    "inference-header-content-length",
    "accept-encoding",
)
LENGTH_HEADER = "inference-header-content-length"
SERVICE = "/inference.GRPCInferenceService/"
TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class HttpCase:
    """One HTTP request. `raw` is sent instead of everything else where it is set."""

    name: str
    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    chunks: tuple[bytes, ...] | None = None  # sent chunked where set
    raw: bytes | None = None

    def encode(self) -> bytes:
        if self.raw is not None:
            return self.raw
        names = {name.lower() for name, _ in self.headers}
        lines = [f"{self.method} {self.path} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        body = self.body
        if self.chunks is not None:
            lines.append("Transfer-Encoding: chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in self.chunks) + b"0\r\n\r\n"
        elif "content-length" not in names and (body or self.method in ("POST", "PUT")):
            lines.append(f"Content-Length: {len(body)}")
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


@dataclass(frozen=True, slots=True)
class GrpcCase:
    """One call. ModelStreamInfer takes any number of messages, the others one."""

    name: str
    rpc: str
    messages: tuple[Message | bytes, ...]
    metadata: tuple[tuple[str, str], ...] = ()
    service: str = SERVICE
    compression: grpc.Compression = grpc.Compression.NoCompression

    @property
    def stream(self) -> bool:
        return self.rpc == "ModelStreamInfer"


Answer = dict[str, Any]  # what a server said, in JSON's types: fit for a file, and for ==


def send_http(port: int, case: HttpCase) -> Answer:
    """status, headers that matter, body; or {"closed": true} or {"silent": true} where no answer came."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(case.encode())  # it may answer, and close, before it has read everything
        response = http.client.HTTPResponse(sock, method=case.method or "GET")
        try:
            response.begin()
            body = response.read()
        except http.client.UnknownProtocol as error:
            return {"protocol": str(error)}
        except (http.client.HTTPException, ConnectionResetError):
            return {"closed": True}
        except TimeoutError:
            return {"silent": True}
    headers = {n: response.headers[n] for n in HEADERS_THAT_MATTER if response.headers.get(n) is not None}
    return {"status": response.status, "headers": headers, **_read_body(body, headers)}


def _read_body(body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """{"json": …}, with {"binary": base64} where the header says so; {"text": …} or {"base64": …} if no JSON."""
    match headers.get("content-encoding"):
        case "gzip":
            body = gzip.decompress(body)
        case "deflate":
            body = zlib.decompress(body)
    found: dict[str, Any] = {}
    length = headers.get(LENGTH_HEADER)
    if length is not None:
        headers[LENGTH_HEADER] = "<length of the JSON>"  # lengths of equal JSON may differ by its spelling
        body, rest = body[: int(length)], body[int(length) :]
        found["binary"] = base64.b64encode(rest).decode()
    if not body:
        return found
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return {**found, "base64": base64.b64encode(body).decode()}
    try:
        return {**found, "json": json.loads(text)}
    except ValueError:
        return {**found, "text": text}


def send_grpc(channel: grpc.Channel, case: GrpcCase) -> Answer:
    """code, details, messages as JSON objects."""
    path = case.service + case.rpc
    payloads = [m if isinstance(m, bytes) else m.SerializeToString() for m in case.messages]
    answers: list[bytes] = []
    code, details = "OK", ""
    try:
        if case.stream:
            stream = channel.stream_stream(path)
            answers.extend(stream(iter(payloads), metadata=case.metadata, timeout=TIMEOUT_S))
        else:
            unary = channel.unary_unary(path)
            found = unary(payloads[0], metadata=case.metadata, timeout=TIMEOUT_S, compression=case.compression)
            answers.append(found)
    except grpc.RpcError as error:
        code, details = error.code().name, error.details()
    return {"code": code, "details": details, "messages": _decode(case, answers)}


def _decode(case: GrpcCase, payloads: Sequence[bytes]) -> list[Any]:
    kind = getattr(service_pb2, f"{case.rpc}Response", None) if case.service == SERVICE else None
    if kind is None:
        return [base64.b64encode(p).decode() for p in payloads]
    return [json_format.MessageToDict(kind.FromString(p), preserving_proto_field_name=True) for p in payloads]


def normal(answer: Answer, repository: Path) -> Answer:
    """The answer without what differs between two runs of one server: times, and where the repository lies."""
    text = json.dumps(answer).replace(str(repository), "<repository>")
    return dict(json.loads(text, object_hook=_normal_object))


def _normal_object(found: dict[str, Any]) -> dict[str, Any]:
    for name in ("ns", "last_inference"):
        if name in found:
            found[name] = 0
    if found.get("datatype") == "FP32" and isinstance(found.get("data"), list):
        # FP32 is written as the nearest double by one server, with the fewest digits that read back by the other.
        with np.errstate(over="ignore"):
            found["data"] = [float(np.float32(x)) if isinstance(x, (int, float)) else x for x in found["data"]]
    return found
