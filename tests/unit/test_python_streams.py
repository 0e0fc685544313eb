"""doorstep.Model with `yield`, `self.request`, and calls of other models: in this process, on a server of functions."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import numpy as np
import pytest

from doorstep import proto
from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.backends.python import PythonBackend
from doorstep.config.model import ModelConfig
from doorstep.errors import ConfigError, DoorstepError, NotFound
from doorstep.request import LATER, Batch, InferenceRequest, Outputs
from doorstep.testing.server_access import FakeServer
from doorstep.types import Tensor, datatype_of

SECONDS = 30.0


def array(*values) -> np.ndarray:
    made = np.empty(len(values), object)
    made[:] = [v.encode() if isinstance(v, str) else v for v in values]
    return made if isinstance(values[0], str) else np.array(values)


class Loaded:
    def __init__(self, folder: Path, source: str, server: FakeServer | None = None, config=None) -> None:
        (folder / "m" / "1").mkdir(parents=True)
        (folder / "m" / "1" / "model.py").write_text(source)
        message = config or proto.ModelConfig()
        message.name, message.backend = "m", "python"
        backend = PythonBackend()
        backend.complete_config(message, folder / "m", folder / "m" / "1", CompletionContext())
        self.config = ModelConfig.from_proto(message)
        self.log: list[str] = []
        self.instance = backend.load_instance(
            InstanceContext(
                self.config, "1", folder / "m", folder / "m" / "1", "m_0", server=server,
                log=lambda _, text: self.log.append(text),
            )
        )  # fmt: skip
        self.emitted: queue.SimpleQueue = queue.SimpleQueue()

    def run(self, *all_inputs: dict, **fields) -> list:
        requests = []
        for inputs in all_inputs:
            tensors = {name: Tensor(name, datatype_of(a), a) for name, a in inputs.items()}
            request = InferenceRequest("m", tensors, None, **fields)
            request.rows = len(next(iter(inputs.values()))) if self.config.max_batch_size else 1
            requests.append(request)
        self.requests = requests
        batch = Batch(requests, sum(r.rows for r in requests))
        batch.emit = lambda request, outputs, final: self.emitted.put((outputs, final))
        self.instance.execute(batch)
        return batch.results

    def next(self):
        outputs, final = self.emitted.get(timeout=SECONDS)
        if isinstance(outputs, DoorstepError) or outputs is None:
            return outputs, final
        return [item.decode() if isinstance(item, bytes) else item for item in outputs[0].array.tolist()], final


WORDS = """
from collections.abc import Iterator
import doorstep
class Model(doorstep.Model):
    def predict(self, text: str) -> Iterator[str]:
        for word in text.split():
            if word == "bad":
                raise ValueError("a bad word")
            yield word
"""


def test_a_predict_that_yields_makes_a_decoupled_model_with_what_it_yields_as_output(tmp_path):
    model = Loaded(tmp_path, WORDS)
    assert model.config.decoupled
    assert [(o.name, o.datatype.name) for o in model.config.outputs.values()] == [("output", "BYTES")]
    assert model.run({"text": array("one two")}) == [LATER]
    assert [model.next() for _ in range(3)] == [(["one"], False), (["two"], False), (None, True)]
    assert model.emitted.empty()


def test_what_a_generator_raises_is_its_last_response(tmp_path):
    model = Loaded(tmp_path, WORDS)
    model.run({"text": array("one bad two")})
    assert model.next() == (["one"], False)
    error, final = model.next()
    assert (error.message, final) == ("ValueError: a bad word", True)
    assert model.emitted.empty()
    assert any("raised at 1/model.py:8" in line or "model.py:8" in line for line in model.log)


def test_a_client_that_leaves_ends_the_generator(tmp_path):
    source = """
from collections.abc import Iterator
import doorstep
class Model(doorstep.Model):
    closed = False
    def predict(self, n: int) -> Iterator[int]:
        try:
            while True:
                n += 1
                yield n
                if n == 3:
                    self.leave()
                assert n < 10
        finally:
            self.closed = True
"""
    model = Loaded(tmp_path, source)
    model.instance._model.leave = lambda: [request.cancel() for request in model.requests]
    model.run({"n": array(0)})
    assert model.instance._model.closed
    sent = [model.next() for _ in range(model.emitted.qsize())]
    assert sent == [([1], False), ([2], False), ([3], False), (None, True)]


ASYNC = """
from collections.abc import AsyncIterator
import asyncio
import doorstep
class Model(doorstep.Model):
    def load(self):
        self.both = 0
        self.loop = None
    async def predict(self, n: int) -> AsyncIterator[int]:
        self.both += 1
        yield -n
        while self.both < 2:
            await asyncio.sleep(0)
        for i in range(n):
            self.request.response_parameters["i"] = i
            yield i
"""


def test_async_generators_run_beside_each_other(tmp_path):
    model = Loaded(tmp_path, ASYNC)
    assert model.run({"n": array(1)}) == [LATER]
    assert model.run({"n": array(2)}) == [LATER]  # the first one waits for this one
    got = [model.emitted.get(timeout=SECONDS) for _ in range(7)]
    assert sum(final for _, final in got) == 2
    told = [outputs.parameters for outputs, _ in got if isinstance(outputs, Outputs)]
    assert sorted(p["i"] for p in told) == [0, 0, 1]


@pytest.mark.parametrize(
    ("source", "decoupled", "text"),
    [
        (WORDS, False, "predict yields, but config.pbtxt says model_transaction_policy { decoupled: false }"),
        (WORDS.replace("Iterator[str]", "str").replace("yield word", "return word"), True,
         "config.pbtxt says model_transaction_policy { decoupled: true }, but predict returns one value"),
    ],
)  # fmt: skip
def test_a_config_that_contradicts_predict_is_refused(tmp_path, source, decoupled, text):
    config = proto.ModelConfig()
    config.model_transaction_policy.decoupled = decoupled
    with pytest.raises(ConfigError) as raised:
        Loaded(tmp_path, source, config=config)
    assert text in raised.value.message
    assert "model.py:5" in raised.value.message


def test_a_model_knows_the_requests_it_runs_and_answers_with_parameters(tmp_path):
    source = """
import doorstep
class Model(doorstep.Model):
    max_batch_size = 8
    def predict(self, n: list[int]) -> list[int]:
        for number, request in enumerate(self.requests):
            request.response_parameters["id"] = request.id
            request.response_parameters["got"] = request.parameters["p"] + number
            assert not request.is_cancelled()
        return n
"""
    model = Loaded(tmp_path, source)
    results = model.run({"n": array(1, 2)[:, None]}, {"n": array(3)[:, None]}, id="x", parameters={"p": 5})
    assert [r.parameters for r in results] == [{"id": "x", "got": 5}, {"id": "x", "got": 6}]
    assert [r[0].array.ravel().tolist() for r in results] == [[1, 2], [3]]


def test_a_response_parameter_that_cannot_be_sent_is_that_requests_error(tmp_path):
    source = """
import doorstep
class Model(doorstep.Model):
    def predict(self, n: int) -> int:
        self.request.response_parameters["x"] = [n]
        return n
"""
    (result,) = Loaded(tmp_path, source).run({"n": array(1)})
    assert "response parameter 'x' is [1]" in result.message


CALLER = """
import doorstep
class Model(doorstep.Model):
    def predict(self, text: str) -> list[str]:
        answer = self.server.infer("upper", text=[text, "b"])
        return [item.decode() for item in answer["out"]] + [str(answer.parameters["n"])]
"""


def upper(call):
    (tensor,) = call.inputs
    made = np.array([item.upper() for item in tensor.array.tolist()], object)
    yield Outputs([Tensor("out", tensor.datatype, made)], {"n": 3}), True


def test_a_model_calls_another(tmp_path):
    server = FakeServer({"upper": upper})
    model = Loaded(tmp_path, CALLER, server)
    (result,) = model.run({"text": array("ä")})
    assert [item.decode() for item in result[0].array] == ["ä", "B", "3"]  # bytes have no other ä
    (call,) = server.calls
    assert call.parent is model.requests[0]
    assert (call.model_name, call.model_version, [t.name for t in call.inputs]) == ("upper", "", ["text"])


def test_the_other_models_error_is_raised_and_becomes_this_ones(tmp_path):
    server = FakeServer({"upper": lambda call: [(NotFound("no such thing"), True)]})
    (result,) = Loaded(tmp_path, CALLER, server).run({"text": array("a")})
    assert isinstance(result, NotFound)
    assert result.message == "no such thing"


def test_without_a_server_calling_says_so(tmp_path):
    (result,) = Loaded(tmp_path, CALLER).run({"text": array("a")})
    assert "does not run in a server" in result.message


GATHER = """
import asyncio
from collections.abc import AsyncIterator
import doorstep
class Model(doorstep.Model):
    async def predict(self, n: int) -> list[int]:
        slow = self.server.model("slow", "2", parameters={"a": 1}, timeout_us=7, sequence=9, sequence_start=True)
        answers = await asyncio.gather(*(slow.infer_async(x=i) for i in range(n)))
        streamed = [int(a["y"][0]) async for a in self.server.stream("slow", x=n)]
        return [int(a["y"][0]) for a in answers] + streamed
"""


def test_calls_of_an_async_predict_are_awaited_together(tmp_path):
    together = threading.Barrier(4)

    class Late(FakeServer):
        def call(self, call):
            responses = super().call(call)

            def answer() -> None:
                if call.model_version:
                    together.wait(SECONDS)  # all of them, or none
                responses.add([Tensor("y", call.inputs[0].datatype, call.inputs[0].array * 2)], True)

            threading.Thread(target=answer).start()
            return responses

    server = Late({"slow": lambda call: ()})
    (result,) = Loaded(tmp_path, GATHER, server).run({"n": array(4)})
    assert result[0].array.tolist() == [0, 2, 4, 6, 8]
    call = server.calls[0]
    assert (call.parameters, call.timeout_us, call.correlation_id, call.sequence_start) == ({"a": 1}, 7, 9, True)
