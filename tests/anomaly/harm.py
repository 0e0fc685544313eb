"""A real server under attack: its resources before and after, a well-behaved client beside it, and its error texts.

What every test of tests/anomaly that attacks `doorstep serve` has in common.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import psutil

from doorstep import proto
from doorstep.testing.onnx_models import save_identity
from doorstep.testing.server import ServerProcess
from doorstep.testing.wire import RawClient

PATIENCE_S = 30.0
MIB = 1 << 20

# What an error's text must never hold: paths of the server, its processes and memory, its code's insides.
_SECRETS = re.compile(
    r"(?<![\w.])/(?:tmp|home|root|work|usr|proc|dev|var|opt)/"
    r"|Traceback|File \"|line \d+, in |\.py\b(?<!model\.py)"
    r"|<[\w.]+ object|object at 0x|0x[0-9a-f]{6,}"
    r"|memfd|doorstep-flags|/dev/shm|\bpid\b|\bfd \d"
    r"|doorstep\.\w+\.|site-packages"
)
# Log lines of the server's own code breaking. (A traceback of model code is prefixed with the instance's name.)
_BROKEN = re.compile(r"^(?!.* \| ).*(Traceback|Exception in callback|Task exception was never|never retrieved)", re.M)


def check_text(text: str | bytes, *sent: str) -> None:
    """Fails where an error's text says what a client must not know; `sent` is what the client itself had said."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    for own in sent:
        text = text.replace(own, "")
    found = _SECRETS.search(text)
    assert found is None, f"{found.group()!r} in {text[:2000]!r}"


@dataclass
class Snapshot:
    fds: int
    threads: int
    workers: int
    rss: int


class Victim(ServerProcess):
    """A server whose harm can be measured."""

    def get(self, path: str) -> tuple[int, bytes]:
        return self.call("GET", path)

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One request on a connection of its own. Checks every error's text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=PATIENCE_S)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, headers or {})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status >= 400:
            check_text(text)
        return answer.status, text

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """The JSON of the answer, None where there is none."""
        status, text = self.call("POST", path, b"" if body is None else body, headers)
        return status, json.loads(text) if text[:1] in (b"{", b"[") else text or None

    def infer(self, model: str, *inputs: dict[str, Any], **rest: Any) -> tuple[int, Any]:
        return self.post(f"/v2/models/{model}/infer", {"inputs": list(inputs), **rest})

    def error(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str]:
        status, answer = self.post(path, body, headers)
        return status, answer["error"] if isinstance(answer, dict) and "error" in answer else str(answer)

    def raw(self, port: int | None = None) -> RawClient:
        return RawClient(socket.create_connection(("127.0.0.1", port or self.http_port)))

    @contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        with grpc.insecure_channel(self.grpc, options) as channel:
            yield channel

    @property
    def tree(self) -> list[psutil.Process]:
        process = psutil.Process(self.pid)
        return [process, *process.children(recursive=True)]

    @property
    def workers(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.pid).children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]

    def snapshot(self) -> Snapshot:
        process = psutil.Process(self.pid)
        with process.oneshot():
            return Snapshot(process.num_fds(), process.num_threads(), len(self.workers), process.memory_info().rss)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=PATIENCE_S) as answer:
            lines = answer.read().decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if re.match(rf"{name}[{{ ]", line) and all(want in line for want in wanted)
        )

    def wait_for(self, condition: Callable[[], Any], what: str = "") -> None:
        """Looks again and again until `condition()`."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.running, self.logs()
            assert time.monotonic() < deadline, (
                f"{what or condition} never came; {self.snapshot()}\n{self.logs()[-4000:]}"
            )
            threading.Event().wait(0.02)

    def assert_unharmed(self, before: Snapshot, *, grown: int = 64 * MIB, threads: int = 12, workers: int = 0) -> None:
        """All is back: nothing in flight, no connection, process or descriptor more than before; memory in bounds."""
        self.wait_for(lambda: self.metric("doorstep_inflight_requests") == 0, "nothing in flight")
        self.wait_for(lambda: self.metric("doorstep_queue_depth") == 0, "empty queues")
        self.wait_for(lambda: self.metric("doorstep_held_body_bytes") == 0, "no body held")
        for name in ("http", "grpc"):
            self.wait_for(
                lambda name=name: self.metric("doorstep_connections", listener=name) == 0, f"no {name} clients"
            )
        self.wait_for(lambda: self.snapshot().workers == before.workers + workers, "as many workers as before")
        # Executors start their threads, and the loop its descriptors, when first needed: a few, once.
        self.wait_for(
            lambda: self.snapshot().fds <= before.fds + 6 + 8 * max(workers, 0), "as many descriptors as before"
        )
        self.wait_for(lambda: self.snapshot().threads <= before.threads + threads, "as many threads as before")
        self.wait_for(lambda: self.snapshot().rss <= before.rss + grown, "memory given back")
        self.assert_sound()

    def assert_sound(self) -> None:
        """Nothing of the server's own code broke."""
        logs = self.logs()
        found = _BROKEN.search(logs)
        assert found is None, logs[max(found.start() - 1500, 0) : found.end() + 3000]


class Neighbour:
    """A well-behaved client of model `add` in a thread, over HTTP and gRPC in turn: every answer must be right.

    A context manager; on leaving it has been answered at least once after the last attack, and rightly every time.
    """

    def __init__(self, server: Victim, constant: float = 1.0, model: str = "add") -> None:
        self._server = server
        self._constant = constant
        self._model = model
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers = 0
        self.failure: str | None = None

    def _run(self) -> None:
        random_ = random.Random(7)
        connection = http.client.HTTPConnection("127.0.0.1", self._server.http_port, timeout=PATIENCE_S)
        try:
            with self._server.channel() as channel:
                call = infer_stub(channel)
                while not self._stop.is_set():
                    x = float(random_.randrange(1000))
                    y = self._over_grpc(call, x) if self.answers % 2 else self._over_http(connection, x)
                    if y != x + self._constant:
                        self.failure = f"{x} + {self._constant} is {y}"
                        return
                    self.answers += 1
                    self._stop.wait(0.002)
        except Exception as error:
            self.failure = f"after {self.answers} answers: {error!r}"
        finally:
            connection.close()

    def _over_http(self, connection: http.client.HTTPConnection, x: float) -> Any:
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [x]}]}
        connection.request("POST", f"/v2/models/{self._model}/infer", json.dumps(body))
        answer = connection.getresponse()
        text = answer.read()
        return json.loads(text)["outputs"][0]["data"][0] if answer.status == 200 else text

    def _over_grpc(self, call: Any, x: float) -> Any:
        import struct

        answer = call(add_message(x, self._model), timeout=PATIENCE_S)
        return struct.unpack("<f", answer.raw_output_contents[0])[0]

    def assert_served(self) -> None:
        """It gets another right answer over each protocol."""
        wanted = self.answers + 2
        deadline = time.monotonic() + PATIENCE_S
        while self.answers < wanted:
            assert self.failure is None, f"{self.failure}\n{self._server.logs()[-3000:]}"
            assert time.monotonic() < deadline, f"the neighbour is not answered any more\n{self._server.logs()[-3000:]}"
            threading.Event().wait(0.005)

    def __enter__(self) -> Self:
        self._thread.start()
        self.assert_served()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.assert_served()
        finally:
            self._stop.set()
            self._thread.join(PATIENCE_S)


@contextmanager
def attacked(server: Victim, **bounds: Any) -> Iterator[Neighbour]:
    """The body attacks; meanwhile the neighbour is served, and afterwards the server is as it was."""
    before = server.snapshot()
    with Neighbour(server) as neighbour:
        yield neighbour
    server.assert_unharmed(before, **bounds)


def infer_stub(channel: grpc.Channel) -> Any:
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        proto.ModelInferRequest.SerializeToString,
        proto.ModelInferResponse.FromString,
    )


def raw_stub(channel: grpc.Channel, method: str = "ModelInfer") -> Any:
    """Sends bytes as they are, and gives them back."""
    return channel.unary_unary(f"/inference.GRPCInferenceService/{method}", bytes, bytes)


def add_message(x: float, model: str = "add") -> Any:
    import struct

    message = proto.ModelInferRequest(model_name=model, raw_input_contents=[struct.pack("<f", x)])
    message.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    return message


def grpc_error(call: Callable[[], Any]) -> tuple[str, str]:
    """Status name and text of a call that must fail; ("OK", "") where it does not. Checks the text."""
    try:
        call()
    except grpc.RpcError as error:
        check_text(error.details() or "")
        return error.code().name, error.details() or ""
    return "OK", ""


def save_python(models: Path, name: str, source: str, config: str = "") -> Path:
    """`<models>/<name>/1/model.py`; returns its folder."""
    folder = models / name / "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.py").write_text(source)
    if config:
        (models / name / "config.pbtxt").write_text(config)
    return folder


def save_texts(models: Path, name: str = "texts") -> Path:
    """BYTES in, BYTES out, any number per row."""
    from onnx import TensorProto

    return save_identity(models / name / "1" / "model.onnx", TensorProto.STRING, ["N", "M"])


def tensor(name: str, shape: list[int], datatype: str, data: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data}


def row(value: float = 1.0) -> dict[str, Any]:
    """The input of model `add`."""
    return tensor("x", [1, 1], "FP32", [value])
