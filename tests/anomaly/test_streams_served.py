"""Decoupled models and their callers in a real server: clients that read slowly, leave, and processes that die."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from harm import MIB, PATIENCE_S, Victim, attacked, check_text, save_python, tensor
from tritonclient.utils import InferenceServerException

from doorstep.testing.onnx_models import save_adder

DECOUPLED = """
import os, threading
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.open = 0

    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.answer, args=(request, request.get_response_sender()), daemon=True).start()

    def answer(self, request, sender):
        count, size = pb_utils.get_input_tensor_by_name(request, "COUNT").as_numpy()
        sent = 0
        while sent != count and not sender.is_cancelled():
            out = np.full(size, sent, np.int32)
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)]))
            sent += 1
            if sent == 100:
                pb_utils.Logger.log_info("a hundred are sent")
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        pb_utils.Logger.log_info("an answer has ended")
"""
CONFIG = """
backend: "python"
model_transaction_policy { decoupled: true }
input { name: "COUNT" data_type: TYPE_INT32 dims: 2 }
output { name: "OUT" data_type: TYPE_INT32 dims: -1 }
"""
CALLER = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        results = []
        for request in requests:
            asked = pb_utils.InferenceRequest(
                model_name="stream", requested_output_names=["OUT"], inputs=request.inputs(),
                trace=request.trace())
            total = 0
            for response in asked.exec(decoupled=True):
                if response.has_error():
                    raise pb_utils.TritonModelException(response.error().message())
                if response.output_tensors():
                    total += int(response.output_tensors()[0].as_numpy().sum())
            results.append(pb_utils.InferenceResponse([pb_utils.Tensor("TOTAL", np.array([total], np.int64))]))
        return results
"""
CALLER_CONFIG = """
backend: "python"
input { name: "COUNT" data_type: TYPE_INT32 dims: 2 }
output { name: "TOTAL" data_type: TYPE_INT64 dims: 1 }
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Victim]:
    models: Path = tmp_path_factory.mktemp("streams")
    save_adder(models / "add" / "1" / "model.onnx", 1.0)
    save_python(models, "stream", DECOUPLED, CONFIG)
    save_python(models, "caller", CALLER, CALLER_CONFIG)
    with Victim(models) as victim:
        yield victim


def wanted(count: int, size: int) -> list[Any]:
    made = grpcclient.InferInput("COUNT", [2], "INT32")
    made.set_data_from_numpy(np.array([count, size], np.int32))
    return [made]


def ended(server: Victim) -> int:
    return server.logs().count("an answer has ended")


class Stream:
    """tritonclient's stream; what comes of it is in `got`."""

    def __init__(self, server: Victim) -> None:
        self.client = grpcclient.InferenceServerClient(server.grpc)
        self.got: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def __enter__(self) -> Stream:
        self.client.start_stream(lambda result, error: self.got.put((result, error)))
        return self

    def __exit__(self, *_: object) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()

    def ask(self, count: int, size: int, **rest: Any) -> None:
        self.client.async_stream_infer("stream", wanted(count, size), enable_empty_final_response=True, **rest)

    def next(self) -> Any:
        result, error = self.got.get(timeout=PATIENCE_S)
        if error is not None:
            check_text(error.message())
            raise error
        return result

    def read_all(self) -> None:
        """Until an error comes."""
        while True:
            self.next()


@pytest.mark.parametrize(("count", "size"), [(2000, 4), (30, 300_000)])
def test_many_and_large_responses_arrive_whole_and_in_order(server, count, size):
    with attacked(server, grown=200 * MIB), Stream(server) as stream:
        stream.ask(count, size)
        for n in range(count):
            out = stream.next().as_numpy("OUT")
            assert out.shape == (size,)
            assert (out == n).all()
        assert stream.next().get_response().parameters["triton_final_response"].bool_param


def read_nothing(server: Victim, size: int) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """An endless `generate_stream` that nobody reads."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE_S)
    connection.request("POST", "/v2/models/stream/generate_stream", json.dumps({"COUNT": [-1, size]}))
    return connection, connection.getresponse()


@pytest.mark.parametrize("size", [1, 100_000])
def test_an_endless_answer_that_nobody_reads_costs_bounded_memory(server, size):
    hundreds, over = server.logs().count("a hundred"), ended(server)
    with attacked(server, grown=100 * MIB):
        before = sum(process.memory_info().rss for process in server.tree)
        connection, answer = read_nothing(server, size)
        if size == 1:
            server.wait_for(lambda: server.logs().count("a hundred") > hundreds, "a hundred responses")
        # It stands still: the model's process uses no time any more.
        worker = next(p for p in server.workers if p.name() == "ds:stream_0")
        used = -1.0

        def rests() -> bool:
            nonlocal used
            before_ns, used = used, sum(worker.cpu_times()[:2])
            return before_ns == used

        server.wait_for(rests, "a model that waits")
        assert sum(process.memory_info().rss for process in server.tree) - before < 100 * MIB
        with Stream(server) as other:  # another client of the same instance is served meanwhile
            other.ask(50, 1)
            assert [int(other.next().as_numpy("OUT")[0]) for _ in range(50)] == list(range(50))
        answer.close()
        connection.close()
        server.wait_for(lambda: ended(server) >= over + 2, "the end of the answer nobody read")


def test_a_client_that_leaves_ends_its_answers(server):
    over = ended(server)
    with attacked(server):
        with Stream(server) as stream:
            for n in range(5):
                stream.ask(-1, 10, request_id=str(n))
            answered: set[str] = set()
            while len(answered) < 5:
                answered.add(stream.next().get_response().id)
        server.wait_for(lambda: ended(server) == over + 5, "five ends")


def test_a_process_killed_in_mid_stream_tells_every_client(server):
    with attacked(server, grown=100 * MIB):
        with Stream(server) as first, Stream(server) as second:
            for stream in (first, second):
                stream.ask(-1, 10)
                stream.next()
            os.kill(next(p.pid for p in server.workers if p.name() == "ds:stream_0"), signal.SIGKILL)
            for stream in (first, second):
                with pytest.raises(InferenceServerException, match="Stub process 'stream_0' is not healthy"):
                    stream.read_all()
        with Stream(server) as stream:
            stream.ask(3, 1)
            assert [int(stream.next().as_numpy("OUT")[0]) for _ in range(3)] == [0, 1, 2]


def total(server: Victim, count: int, size: int) -> tuple[int, Any]:
    status, answer = server.infer("caller", tensor("COUNT", [2], "INT32", [count, size]))
    return status, answer["outputs"][0]["data"][0] if status == 200 else answer["error"]


def test_a_model_calls_one_that_answers_many_times(server):
    total(server, 10, 200_000)  # the memory for such responses is there from now on, and with it its descriptors
    with attacked(server, grown=100 * MIB):
        assert total(server, 100, 10) == (200, 10 * sum(range(100)))
        assert total(server, 10, 200_000) == (200, 200_000 * sum(range(10)))
        assert total(server, 0, 1) == (200, 0)


@pytest.mark.parametrize("killed", ["ds:stream_0", "ds:caller_0"])
def test_a_process_killed_during_a_call_fails_the_caller_and_nobody_else(server, killed):
    over = ended(server)
    with attacked(server, grown=100 * MIB):
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE_S)
        body = {"inputs": [tensor("COUNT", [2], "INT32", [-1, 10])]}
        hundreds = server.logs().count("a hundred")
        connection.request("POST", "/v2/models/caller/infer", json.dumps(body))
        server.wait_for(lambda: server.logs().count("a hundred") > hundreds, "a hundred responses")
        os.kill(next(p.pid for p in server.workers if p.name() == killed), signal.SIGKILL)
        answer = connection.getresponse()
        said = json.loads(answer.read())["error"]
        connection.close()
        assert answer.status == 500
        check_text(said)
        assert f"Stub process '{killed[3:]}' is not healthy" in said
        if killed == "ds:caller_0":
            server.wait_for(lambda: ended(server) > over, "the end of what was asked for it")
        server.wait_for(lambda: total(server, 3, 1) == (200, 3), "both at work again")


def test_a_client_that_leaves_ends_what_a_model_asked_for_it(server):
    over = ended(server)
    with attacked(server):
        connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=PATIENCE_S)
        body = {"inputs": [tensor("COUNT", [2], "INT32", [-1, 10])]}
        hundreds = server.logs().count("a hundred")
        connection.request("POST", "/v2/models/caller/infer", json.dumps(body))
        server.wait_for(lambda: server.logs().count("a hundred") > hundreds, "a hundred responses")
        connection.close()
        server.wait_for(lambda: ended(server) > over, "the end of what was asked for it")
        server.wait_for(lambda: total(server, 3, 1) == (200, 3), "both at work again")
