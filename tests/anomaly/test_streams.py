"""Clients of streams that leave, do not read, or send nonsense: nothing else is harmed, and everything comes back."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from harm import MIB, Victim, attacked, check_text, save_python

from doorstep import proto
from doorstep.testing.http2_client import Http2Client, request, rst_stream
from doorstep.testing.onnx_models import save_adder

CONFIG = """
backend: "python"
input [ { name: "COUNT" data_type: TYPE_INT32 dims: [ 1 ] }, { name: "SIZE" data_type: TYPE_INT32 dims: [ 1 ] } ]
output [ { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] } ]
model_transaction_policy { decoupled: true }
"""
TALKS = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            count, size = (
                int(pb_utils.get_input_tensor_by_name(request, name).as_numpy()[0]) for name in ("COUNT", "SIZE")
            )
            text = pb_utils.Tensor("TEXT", np.array([b"x" * size], object))
            for n in range(count):
                if sender.is_cancelled():
                    break
                sender.send(pb_utils.InferenceResponse([text]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
LONG = 1_000_000  # responses: more than anybody waits for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    models = tmp_path_factory.mktemp("streams") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_python(models, "talks", TALKS, CONFIG)
    with Victim(models, "--max-stream-bytes=8388608", "--write-timeout-secs=5") as victim:
        yield victim
        victim.assert_sound()


def message(count: int, size: int) -> Any:
    found = proto.ModelInferRequest(model_name="talks")
    for name, value in (("COUNT", count), ("SIZE", size)):
        found.inputs.add(name=name, datatype="INT32", shape=[1]).contents.int_contents.append(value)
    return found


def stream_stub(channel: grpc.Channel) -> Any:
    return channel.stream_stream(
        STREAM, proto.ModelInferRequest.SerializeToString, proto.ModelStreamInferResponse.FromString
    )


def answered(server: Victim) -> None:
    """The model still answers."""
    with server.channel() as channel:
        assert len(list(stream_stub(channel)(iter([message(3, 1)])))) == 3


@contextmanager
def events(server: Victim, count: int, size: int) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    try:
        connection.request("POST", "/v2/models/talks/generate_stream", json.dumps({"COUNT": count, "SIZE": size}))
        with connection.getresponse() as answer:
            yield answer
    finally:
        connection.close()


@pytest.mark.parametrize("over", ["events", "gRPC"])
def test_a_client_that_leaves_in_the_middle_stops_the_model(server: Victim, over: str) -> None:
    with attacked(server):
        for _ in range(5):
            if over == "events":
                with events(server, LONG, 10) as answer:
                    assert answer.readline().startswith(b"data: ")
            else:
                with server.channel() as channel:
                    call = stream_stub(channel)(iter([message(LONG, 10)]))
                    assert not next(call).error_message
                    call.cancel()
        answered(server)


@pytest.mark.parametrize("over", ["events", "gRPC"])
def test_a_client_that_does_not_read_keeps_no_memory(server: Victim, over: str) -> None:
    with attacked(server, grown=96 * MIB):
        if over == "events":
            body = json.dumps({"COUNT": LONG, "SIZE": 10_000}).encode()
            client = socket.create_connection(("127.0.0.1", server.http_port))
            head = b"POST /v2/models/talks/generate_stream HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n"
            client.sendall(head % len(body) + body)
            before = server.metric("nv_inference_request_failure")
            server.wait_for(
                lambda: server.metric("nv_inference_request_failure") > before, "the request to be given up"
            )
            client.close()
        else:
            with server.channel() as channel:
                asked: queue.Queue[Any] = queue.Queue()
                call = stream_stub(channel)(iter(asked.get, None))
                asked.put(message(LONG, 10_000))
                before = server.metric("nv_inference_request_failure")
                server.wait_for(
                    lambda: server.metric("nv_inference_request_failure") > before, "the request to be given up"
                )
                asked.put(None)
                call.cancel()
        answered(server)


def test_two_hundred_streams_at_once(server: Victim) -> None:
    with attacked(server):
        failures: list[str] = []

        def read(number: int) -> None:
            try:
                if number % 2:
                    with events(server, 20, 100) as answer:
                        lines = answer.read().count(b"data: ")
                else:
                    lines = len(list(stub(iter([message(20, 100)]))))
                if lines != 20:
                    failures.append(f"{number}: {lines} responses")
            except Exception as error:
                failures.append(f"{number}: {error!r}")

        with server.channel() as channel:
            stub = stream_stub(channel)
            threads = [threading.Thread(target=read, args=(n,)) for n in range(200)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failures, failures[:5]


def test_a_flood_of_resets_while_streaming_ends_one_connection(server: Victim) -> None:
    data = message(LONG, 10).SerializeToString()
    body = b"\0" + len(data).to_bytes(4, "big") + data
    fields = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
    with attacked(server), server.raw(server.grpc_port) as raw:
        client = Http2Client(raw)
        for stream_id in range(1, 4000, 2):
            frames = request(stream_id, STREAM.encode(), body, extra=fields)
            raw.send_until_refused(frames + rst_stream(stream_id))
        client.until_closed()
    answered(server)


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"[" * 100_000,
        b'{"COUNT":' + b"[" * 100_000,
        b'{"COUNT":' + b"[" * 900 + b"1" + b"]" * 900 + b',"SIZE":1}',
        b'{"COUNT":[' + b"1," * 500_000 + b'1],"SIZE":1}',
        b'{"COUNT":1e999,"SIZE":1}',
        b'{"COUNT":99999999999,"SIZE":1}',
        b'{"COUNT":1,"SIZE":1,"p":{"q":{}}}',
        b'{"COUNT":1,"SIZE":1,"parameters":[]}',
        b'{"COUNT":1,"COUNT":1,"SIZE":1}',
        b'{"COUNT":null,"SIZE":1}',
        b'{"COUNT":"\xff","SIZE":1}',
        b'{"parameters":' * 2000 + b"1" + b"}" * 2000,
        b'{"' + b"k" * 1_000_000 + b'":1}',
        json.dumps({f"k{n}": n for n in range(50_000)}).encode(),
    ],
)
def test_a_body_that_is_nonsense_is_refused(server: Victim, verb: str, body: bytes) -> None:
    status, text = server.call("POST", f"/v2/models/talks/{verb}", body)
    assert status in (400, 500), (status, text[:200])
    check_text(text, body.decode("latin-1")[:50])
    assert list(json.loads(text)) == ["error"]
    assert server.metric("doorstep_inflight_requests") == 0
