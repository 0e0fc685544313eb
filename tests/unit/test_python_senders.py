"""Response senders of Triton models: who may send what and when, in the words of Triton's response_sender.cc."""

from __future__ import annotations

import gc
import queue
import threading
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from doorstep import proto
from doorstep.backends.base import InstanceContext
from doorstep.backends.python import PythonBackend
from doorstep.backends.python.triton_instance import TritonInstance
from doorstep.config.model import ModelConfig
from doorstep.errors import DoorstepError, ErrorCode
from doorstep.request import LATER, RESCHEDULE, Batch, InferenceRequest, Outputs
from doorstep.types import INT32, Tensor

SECONDS = 30.0
CONFIG = """
name: "m" backend: "python"
input { name: "X" data_type: TYPE_INT32 dims: 1 }
output { name: "Y" data_type: TYPE_INT32 dims: 1 }
output { name: "Z" data_type: TYPE_INT32 dims: 1 }
"""
HEAD = """
import threading
import numpy as np
import triton_python_backend_utils as pb_utils
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
def answer(value, **rest):
    return pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([value], np.int32))], **rest)
class TritonPythonModel:
    def execute(self, requests):
"""


class Running:
    """An instance in this process; what it emits is in `emitted`."""

    def __init__(
        self, folder: Path, body: str, *, decoupled: bool, server=None, head: str = HEAD, config: str = CONFIG
    ) -> None:
        (folder / "m" / "1").mkdir(parents=True)
        lines = body if head is not HEAD else "\n".join("        " + line for line in body.strip("\n").split("\n"))
        (folder / "m" / "1" / "model.py").write_text(head + lines)
        message = proto.ModelConfig()
        text_format.Parse(config, message)
        message.model_transaction_policy.decoupled = decoupled
        self.log: list[tuple[str, str]] = []
        instance = PythonBackend().load_instance(
            InstanceContext(
                ModelConfig.from_proto(message),
                "1",
                folder / "m",
                folder / "m" / "1",
                "m_0",
                log=lambda level, text: self.log.append((level, text)),
                server=server,
            )
        )
        assert isinstance(instance, TritonInstance)
        self.instance = instance
        self.emitted: queue.SimpleQueue = queue.SimpleQueue()

    def run(self, *values: int, **fields) -> Batch:
        requests = []
        for value in values:
            request = InferenceRequest("m", {"X": Tensor("X", INT32, np.array([value], np.int32))}, None, **fields)
            requests.append(request)
        batch = Batch(requests, len(requests))
        batch.emit = lambda request, outputs, final: self.emitted.put((request, outputs, final))
        self.instance.execute(batch)
        return batch

    def next(self):
        _, outputs, final = self.emitted.get(timeout=SECONDS)
        return (shown(outputs), final)


def shown(outputs):
    if isinstance(outputs, DoorstepError) or outputs is None:
        return outputs
    return [int(tensor.array[0]) for tensor in outputs]


def test_a_decoupled_model_sends_as_many_responses_as_it_likes(tmp_path):
    model = Running(
        tmp_path,
        """
for request in requests:
    sender = request.get_response_sender()
    for i in range(int(request.inputs()[0].as_numpy()[0])):
        sender.send(answer(i))
    sender.send(flags=FINAL)
""",
        decoupled=True,
    )
    batch = model.run(2, 0)
    assert batch.results == [LATER, LATER]
    assert [model.next() for _ in range(4)] == [([0], False), ([1], False), (None, True), (None, True)]
    gc.collect()
    assert model.emitted.empty()


def test_the_last_response_may_carry_the_final_flag(tmp_path):
    model = Running(tmp_path, "requests[0].get_response_sender().send(answer(7), FINAL)", decoupled=True)
    model.run(1)
    assert model.next() == ([7], True)


def test_a_sender_is_used_from_a_thread_after_execute_has_returned(tmp_path):
    model = Running(
        tmp_path,
        """
self.go = go = threading.Event()
def work(sender):
    go.wait()
    sender.send(answer(1, parameters={"n": 1, "s": "x", "b": True}))
    sender.send(answer(2), flags=FINAL)
for request in requests:
    threading.Thread(target=work, args=(request.get_response_sender(),)).start()
""",
        decoupled=True,
    )
    batch = model.run(1)
    assert batch.results == [LATER]
    assert model.emitted.empty()
    model.instance._model.go.set()
    _, outputs, final = model.emitted.get(timeout=SECONDS)
    assert isinstance(outputs, Outputs)
    assert outputs.parameters == {"n": 1, "s": "x", "b": True}
    assert not final
    assert model.next() == ([2], True)


@pytest.mark.parametrize(
    ("decoupled", "sends", "text"),
    [
        (True, "s.send(answer(1), 2)", "Unable to send response. Unsupported flag provided."),
        (True, "s.send()", "Inference Response object must be provided when the response flags is set to zero."),
        (True, "s.send(flags=FINAL); s.send(answer(1))", "Unable to send response. Response sender has been closed."),
        (True, "s.send(flags=FINAL); s.send(flags=FINAL)",
         "Unable to send response. Response sender has been closed."),
        (False, "s.send(answer(1)); s.send(answer(2))",
         "Unable to send response. Non-decoupled model cannot send more than one response."),
        (False, "s.send(answer(1), FINAL); s.send(answer(2), FINAL)",
         "Unable to send response. Non-decoupled model cannot send more than one response."),
        (False, "s.send(flags=FINAL)",
         "Unable to send response. Non-decoupled model cannot send complete final before sending a response."),
        (False, "s.send(answer(1), FINAL); s.send(flags=FINAL)",
         "Unable to send response. Response sender has been closed."),
    ],
)  # fmt: skip
def test_what_a_sender_refuses_is_refused_in_tritons_words(tmp_path, decoupled, sends, text):
    model = Running(
        tmp_path,
        f"""
s = requests[0].get_response_sender()
try:
    {sends}
except pb_utils.TritonModelException as error:
    self.error = str(error)
""",
        decoupled=decoupled,
    )
    model.run(1)
    assert model.instance._model.error == text


def test_a_model_that_is_not_decoupled_may_send_its_one_response(tmp_path):
    model = Running(
        tmp_path,
        """
requests[0].get_response_sender().send(answer(1), FINAL)
sender = requests[1].get_response_sender()
sender.send(answer(2))
sender.send(flags=FINAL)
return [None, None, answer(3)]
""",
        decoupled=False,
    )
    batch = model.run(1, 2, 3)
    assert batch.results[:2] == [LATER, LATER]
    assert shown(batch.results[2]) == [3]
    assert [model.next(), model.next()] == [([1], True), ([2], True)]
    gc.collect()
    assert model.emitted.empty()


def test_a_response_both_sent_and_returned_is_one_too_many(tmp_path):
    model = Running(
        tmp_path, "requests[0].get_response_sender().send(answer(1), FINAL)\nreturn [answer(2), answer(3)]",
        decoupled=False,
    )  # fmt: skip
    batch = model.run(1, 2)
    assert batch.results[0] is LATER  # it has its answer
    assert batch.results[1].message == (
        "Failed to process the request(s) for model 'm_0', message: Unable to send response. Non-decoupled model "
        "cannot send more than one response."
    )


def test_a_decoupled_model_returns_nothing(tmp_path):
    model = Running(tmp_path, "return [answer(1)]", decoupled=True)
    (result,) = model.run(1).results
    assert result.message == (
        "Failed to process the request(s) for model 'm_0', message: Python model 'm_0' is using the decoupled mode and "
        "the execute function must return None."
    )
    assert result.code is ErrorCode.INTERNAL


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize(
    "body", ["pass", "requests[0].get_response_sender()", "self.kept = requests; self.kept = None"]
)
def test_a_request_dropped_without_a_final_response_ends_in_an_error(tmp_path, decoupled, body):
    model = Running(tmp_path, body, decoupled=decoupled)
    batch = model.run(1)
    assert batch.results == [LATER]
    gc.collect()
    error, final = model.next()
    assert final
    assert "model 'm' dropped the request without a final response" in error.message


def test_a_response_without_the_word_that_it_is_the_last_still_arrives(tmp_path):
    model = Running(tmp_path, "requests[0].get_response_sender().send(answer(4))", decoupled=False)
    model.run(1)
    gc.collect()
    assert model.next() == ([4], True)


def test_an_error_response_is_the_requests_end(tmp_path):
    model = Running(
        tmp_path,
        """
sender = requests[0].get_response_sender()
sender.send(answer(1))
sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError("no more", pb_utils.TritonError.UNAVAILABLE)))
sender.send(answer(2))
sender.send(flags=FINAL)
""",
        decoupled=True,
    )
    model.run(1)
    assert model.next() == ([1], False)
    error, _ = model.next()
    assert (error.message, error.code) == ("no more", ErrorCode.UNAVAILABLE)
    gc.collect()
    assert model.emitted.empty()


def test_what_execute_raises_fails_those_that_are_not_answered_and_closes_their_senders(tmp_path):
    model = Running(
        tmp_path,
        """
self.senders = [request.get_response_sender() for request in requests]
self.senders[0].send(flags=FINAL)
self.senders[1].send(answer(1))
raise RuntimeError("boom")
""",
        decoupled=True,
    )
    batch = model.run(1, 2)
    assert batch.results[0] is LATER
    assert batch.results[1].message == "Failed to process the request(s) for model 'm_0', message: RuntimeError: boom"
    import triton_python_backend_utils as pb_utils

    with pytest.raises(pb_utils.TritonModelException, match="Response sender has been closed"):
        model.instance._model.senders[1].send(flags=1)


ASYNC = """
import asyncio
import numpy as np
import triton_python_backend_utils as pb_utils
def answer(value):
    return pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([value], np.int32))])
class TritonPythonModel:
    def initialize(self, args):
        self.go = None
    async def execute(self, requests):
        self.go = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        for request in requests:
            request.get_response_sender().send(answer(0))
        await self.go.wait()
        if requests[0].inputs()[0].as_numpy()[0] < 0:
            raise ValueError("negative")
        for request in requests:
            request.get_response_sender().send(answer(1), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


@pytest.mark.parametrize("value", [1, -1])
def test_an_async_execute_of_a_decoupled_model_runs_beside_the_next_batch(tmp_path, value):
    model = Running(tmp_path, ASYNC, decoupled=True, head="")
    assert model.run(value).results == [LATER]
    assert model.next() == ([0], False)
    model.instance._model.loop.call_soon_threadsafe(model.instance._model.go.set)
    outputs, final = model.next()
    assert final
    if value > 0:
        assert outputs == [1]
    else:
        assert outputs.message == "Failed to process the request(s) for model 'm_0', message: ValueError: negative"
        assert any("raised at" in text for _, text in model.log)
    gc.collect()
    assert model.emitted.empty()


def test_a_request_is_seen_again_where_the_model_says_so(tmp_path):
    body = """
requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
return [None, answer(2)]
"""
    model = Running(tmp_path, body, decoupled=False)
    batch = model.run(1, 2)
    assert batch.results[0] is RESCHEDULE
    assert shown(batch.results[1]) == [2]
    gc.collect()
    assert model.emitted.empty()


def test_a_decoupled_model_sends_and_asks_for_the_request_again(tmp_path):
    body = """
requests[0].get_response_sender().send(answer(2))
requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
"""
    model = Running(tmp_path, body, decoupled=True)
    assert model.run(1).results == [RESCHEDULE]
    assert model.next() == ([2], False)
    gc.collect()
    assert model.emitted.empty()


def test_a_response_for_a_request_to_be_seen_again_is_refused_in_tritons_words(tmp_path):
    body = """
requests[0].set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
return [answer(1)]
"""
    (result,) = Running(tmp_path, body, decoupled=False).run(1).results
    assert "Expected a None object in the execute function return list for reschduled request" in result.message


def test_cancellation_is_seen_by_request_and_sender(tmp_path):
    body = """
self.kept = requests[0]
self.sender = requests[0].get_response_sender()
"""
    model = Running(tmp_path, body, decoupled=True)
    (request,) = model.run(1).requests
    kept, sender = model.instance._model.kept, model.instance._model.sender
    assert (kept.is_cancelled(), sender.is_cancelled()) == (False, False)
    request.cancel()
    assert (kept.is_cancelled(), sender.is_cancelled()) == (True, True)


def test_only_outputs_that_were_asked_for_are_sent(tmp_path):
    body = """
response = pb_utils.InferenceResponse([pb_utils.Tensor(n, np.array([i], np.int32)) for i, n in enumerate("YZ")])
requests[0].get_response_sender().send(response, FINAL)
"""
    model = Running(tmp_path, body, decoupled=True)
    model.run(1, requested_outputs=("Z",))
    assert model.next() == ([1], True)


def test_many_threads_may_use_one_sender(tmp_path):
    body = """
sender = requests[0].get_response_sender()
threads = [threading.Thread(target=lambda: [sender.send(answer(i)) for i in range(50)]) for _ in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
sender.send(flags=FINAL)
"""
    model = Running(tmp_path, body, decoupled=True)
    model.run(1)
    sent = [model.next() for _ in range(401)]
    assert sent[-1] == (None, True)
    assert sorted(outputs[0] for outputs, _ in sent[:-1]) == sorted(list(range(50)) * 8)
    assert threading.active_count() < 50


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def is_ready(self):\n        return True", True),
        ("async def is_ready(self):\n        return False", False),
        ("other = 1", True),
    ],
)
def test_a_models_own_readiness(tmp_path, source, expected):
    head = f"class TritonPythonModel:\n    {source}\n    def execute(self, requests):\n        return []\n"
    assert Running(tmp_path, "", decoupled=False, head=head).instance.is_ready() is expected


def test_readiness_that_is_no_bool_is_refused_in_tritons_words(tmp_path):
    head = (
        "class TritonPythonModel:\n    def is_ready(self):\n        return 1\n    def execute(self, r):\n        pass\n"
    )
    model = Running(tmp_path, "", decoupled=False, head=head)
    with pytest.raises(Exception, match=r"is_ready\(\) must return a boolean value"):
        model.instance.is_ready()


@pytest.mark.parametrize(
    ("value", "datatype", "dtype"),
    [("np.array([7], np.int64)", "INT64", np.int64), ("np.array([[b'7', b'']], object)", "BYTES", np.object_)],
)
def test_an_output_of_another_datatype_and_shape_is_sent_as_it_is_and_said_once(tmp_path, value, datatype, dtype):
    body = f"return [pb_utils.InferenceResponse([pb_utils.Tensor('Y', {value})]) for _ in requests]"
    model = Running(tmp_path, body, decoupled=False)
    for batch in (model.run(1, 2), model.run(3)):
        for (tensor,) in batch.results:
            assert (tensor.name, tensor.datatype.name, tensor.array.dtype) == ("Y", datatype, dtype)
            assert tensor.array.shape in {(1,), (1, 2)}
    said = f"output 'Y' of model 'm' is {datatype}, but its config says TYPE_INT32: sent as it is"
    assert model.log == [("WARNING", said)]


@pytest.mark.parametrize("decoupled", [False, True])
def test_an_output_that_the_config_does_not_have_is_left_out_and_said_once(tmp_path, decoupled):
    body = """
for request in requests:
    made = [pb_utils.Tensor(name, np.array([5], np.int32)) for name in ("OTHER", "Z")]
    request.get_response_sender().send(pb_utils.InferenceResponse(made), FINAL)
"""
    model = Running(tmp_path, body, decoupled=decoupled)
    for _ in range(2):
        model.run(1)
        assert model.next() == ([5], True)
    assert model.log == [("WARNING", "output 'OTHER' of model 'm' is not in its config: it is not sent")]


def test_an_output_that_its_configs_reshape_does_not_fit_is_that_requests_error(tmp_path):
    config = CONFIG.replace('name: "Y" data_type: TYPE_INT32 dims: 1', 'name: "Y" data_type: TYPE_INT32 dims: [2, 2] '
                            "reshape { shape: 4 }")  # fmt: skip
    body = """
return [
    pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.arange(int(r.inputs()[0].as_numpy()[0]), dtype=np.int32))])
    for r in requests
]
"""
    model = Running(tmp_path, body, decoupled=False, config=config)
    fits, fits_not = model.run(4, 5).results
    assert fits[0].array.tolist() == [[0, 1], [2, 3]]
    assert fits_not.message == (
        "output 'Y' of model 'm' has the shape [5], which cannot be reshaped to [2, 2], as its config says"
    )


@pytest.mark.parametrize("ending", ["raise ValueError('late')", "sender.send(answer(6))", "return [answer(6)]"])
def test_the_response_that_was_sent_stands_whatever_execute_does_then(tmp_path, ending):
    body = "sender = requests[0].get_response_sender()\nsender.send(answer(5))\n" + ending
    model = Running(tmp_path, body, decoupled=False)
    assert [shown(result) for result in model.run(1).results] == [[5]]
