"""Floods of sequences: begun and never ended, ended twice, of ids nobody should choose, in models that come and go."""

from __future__ import annotations

import json
import random
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from harm import PATIENCE_S, Victim, attacked, grpc_error, infer_stub, save_python

from doorstep import proto
from doorstep.testing.onnx_models import save_adder

ECHO = """
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())])
                for r in requests]
"""
# Its state is as long as the client says, and of the shape of that very request.
STATE = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "x").as_numpy()
            old = pb_utils.get_input_tensor_by_name(request, "in").as_numpy()
            new = np.zeros((1, max(int(x.ravel()[0]), 0)), np.float32)
            y = np.array([[old.size]], np.float32)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("y", y), pb_utils.Tensor("out", new)]))
        return answers
"""
BODY = """
backend: "python"
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }
"""
DIRECT = BODY + "sequence_batching { direct { } max_sequence_idle_microseconds: 300000 }"
OLDEST = BODY + "sequence_batching { oldest { max_candidate_sequences: 16 } max_sequence_idle_microseconds: 300000 %s }"
STATES = """
state { input_name: "in" output_name: "out" data_type: TYPE_FP32 dims: [ -1 ]
        initial_state { name: "s" data_type: TYPE_FP32 dims: [ 1 ] zero_data: true } }
"""
NAMES = ["direct", "oldest"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    models = tmp_path_factory.mktemp("sequences") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_python(models, "direct", ECHO, DIRECT)
    save_python(models, "oldest", ECHO, OLDEST % "")
    save_python(models, "states", STATE, OLDEST % STATES)
    with Victim(models, "--model-control-mode=explicit", "--load-model=*") as victim:
        yield victim
        victim.assert_sound()


def message(model: str, sequence: int | str, start: bool = False, end: bool = False, x: float = 1.0) -> Any:
    made = proto.ModelInferRequest(model_name=model, raw_input_contents=[struct.pack("<f", x)])
    made.inputs.add(name="x", datatype="FP32", shape=[1, 1])
    if isinstance(sequence, int):
        made.parameters["sequence_id"].int64_param = sequence
    else:
        made.parameters["sequence_id"].string_param = sequence
    made.parameters["sequence_start"].bool_param = start
    made.parameters["sequence_end"].bool_param = end
    return made


def stream(channel: grpc.Channel, messages: Any) -> Any:
    call = channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        proto.ModelInferRequest.SerializeToString,
        proto.ModelStreamInferResponse.FromString,
    )
    return call(messages)


@pytest.mark.parametrize("name", NAMES)
def test_twenty_thousand_sequences_that_nobody_ends(server: Victim, name: str) -> None:
    """Each in its turn gets a slot when those before it have been idle for too long, or goes with its client. One
    stream has 1024 requests open at a time."""
    streams, each = 20, 1000
    with attacked(server, grown=160 << 20) as neighbour, server.channel() as channel:
        calls = [
            stream(channel, (message(name, each * n + i + 1, start=True) for i in range(each))) for n in range(streams)
        ]
        server.wait_for(lambda: server.metric("doorstep_queue_depth", model=name) > streams * each * 0.9, "they wait")
        neighbour.assert_served()
        for call in calls:
            call.cancel()
        server.wait_for(lambda: server.metric("doorstep_queue_depth", model=name) == 0, "they have gone")
        code, text = grpc_error(lambda: infer_stub(channel)(message(name, 5, start=True, end=True), timeout=PATIENCE_S))
        assert code == "OK", text


@pytest.mark.parametrize("name", NAMES)
def test_starts_and_ends_without_end(server: Victim, name: str) -> None:
    """One id, started again and again; ended again and again; and both in every order, from two clients."""
    dice = random.Random(3)
    with attacked(server), server.channel() as channel:

        def flood() -> None:
            flags = [(dice.random() < 0.5, dice.random() < 0.3) for _ in range(3000)]
            made = (message(name, dice.choice([1, 2, "a"]), start, end) for start, end in flags)
            assert sum(1 for _ in stream(channel, made)) == 3000

        threads = [threading.Thread(target=flood) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        server.wait_for(
            lambda: grpc_error(lambda: infer_stub(channel)(message(name, 9, True, True), timeout=9))[0] == "OK"
        )


@pytest.mark.parametrize("sequence", ["x" * 129, "x" * 3_000_000, "\0", "é" * 65, "a\nb", "\u2028" * 9])
def test_ids_nobody_should_choose(server: Victim, sequence: str) -> None:
    with attacked(server), server.channel() as channel:
        for name in NAMES:
            code, text = grpc_error(lambda n=name: infer_stub(channel)(message(n, sequence, True, True)))
            assert (code == "OK") == (len(sequence.encode()) <= 128), text
            assert len(text) < 1000
            body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}
            body["parameters"] = {"sequence_id": sequence, "sequence_start": True, "sequence_end": True}  # type: ignore
            status, answer = server.post(f"/v2/models/{name}/infer", body)
            assert (status == 200) == (len(sequence.encode()) <= 128), str(answer)[:300]
    for wrong in (-1, 2**64, 1.5, 10**400, [1], {"a": 1}, None, True):
        status, answer = server.infer(
            "direct",
            {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]},
            parameters={"sequence_id": wrong, "sequence_start": True, "sequence_end": True},
        )
        assert 400 <= status < 600, answer


def test_states_that_change_their_shape_every_time(server: Victim) -> None:
    with attacked(server, grown=128 << 20), server.channel() as channel:
        sizes = [0, 1, 1_000_000, 0, 7, 250_000, 1]
        for sequence in (1, 2, 3):
            made = [message("states", sequence, i == 0, i == len(sizes) - 1, x) for i, x in enumerate(sizes)]
            seen = []
            for answer in stream(channel, iter(made)):
                assert not answer.error_message, answer.error_message
                seen.append(struct.unpack("<f", answer.infer_response.raw_output_contents[0])[0])
            assert seen == [1.0, *map(float, sizes[:-1])]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_loaded_anew_under_its_sequences(server: Victim, name: str) -> None:
    with attacked(server), server.channel() as channel:
        infer = infer_stub(channel)
        for i in range(40):
            grpc_error(lambda i=i: infer(message(name, 1000 + i, start=True), timeout=0.2))
        for _ in range(3):
            assert server.post(f"/v2/repository/models/{name}/unload")[0] == 200
            assert server.post(f"/v2/repository/models/{name}/load")[0] == 200
            code, text = grpc_error(lambda: infer(message(name, 1001)))
            assert (code, "must specify the START flag" in text) == ("INVALID_ARGUMENT", True)
            assert grpc_error(lambda: infer(message(name, 1001, True, True), timeout=PATIENCE_S))[0] == "OK"


@pytest.mark.parametrize("name", NAMES)
def test_clients_that_leave_between_their_requests(server: Victim, name: str) -> None:
    def request(sequence: int, start: bool) -> bytes:
        body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [1]}]}
        body["parameters"] = {"sequence_id": sequence, "sequence_start": start}  # type: ignore[assignment]
        text = json.dumps(body).encode()
        return b"POST /v2/models/%b/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
            name.encode(),
            len(text),
            text,
        )

    with attacked(server):
        for round_ in range(20):
            for i in range(10):
                with server.raw() as client:
                    client.send(request(1 + i + 10 * round_, True))
                    if i % 3:
                        client.send(request(1 + i + 10 * round_, False) * 5)
                    if i % 2:
                        client.receive_answer()
        with server.channel() as channel:
            code, text = grpc_error(lambda: infer_stub(channel)(message(name, 7777, True, True), timeout=PATIENCE_S))
            assert code == "OK", text
