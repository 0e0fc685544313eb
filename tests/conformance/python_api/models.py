"""Models that use the whole of Triton's Python API, as a user writes them. Nothing in them knows who runs them."""

from __future__ import annotations

from pathlib import Path

REPEAT = """
import threading
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            threading.Thread(target=self.work, args=(request, request.get_response_sender())).start()
        return None

    def work(self, request, sender):
        count = int(pb_utils.get_input_tensor_by_name(request, "N").as_numpy()[0])
        if count < 0:
            error = pb_utils.TritonError(f"negative: {count}", pb_utils.TritonError.INVALID_ARG)
            sender.send(pb_utils.InferenceResponse(error=error), FINAL)
            return
        for i in range(count):
            out = pb_utils.Tensor("OUT", np.array([i], np.int32))
            last = FINAL if i == count - 1 and count % 2 else 0
            sender.send(pb_utils.InferenceResponse([out]), last)
        if count % 2 == 0:
            sender.send(flags=FINAL)
"""

REPEAT_CONFIG = """
backend: "python"
input { name: "N" data_type: TYPE_INT32 dims: 1 }
output { name: "OUT" data_type: TYPE_INT32 dims: 1 }
model_transaction_policy { decoupled: true }
instance_group { kind: KIND_CPU }
"""

ADD = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            a, b = (pb_utils.get_input_tensor_by_name(request, n).as_numpy() for n in "AB")
            if a[0] == 13:
                error = pb_utils.TritonError("unlucky", pb_utils.TritonError.UNAVAILABLE)
                responses.append(pb_utils.InferenceResponse([], error))
                continue
            if a[0] == 99:
                raise ValueError("everything failed")
            told = json.loads(request.parameters())  # seen in the answer: one more for each
            a = a + len(told) + len(request.request_id())
            outputs = [pb_utils.Tensor("SUM", a + b), pb_utils.Tensor("DIFF", a - b)]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
"""

ADD_CONFIG = """
backend: "python"
input { name: "A" data_type: TYPE_FP32 dims: 2 }
input { name: "B" data_type: TYPE_FP32 dims: 2 }
output { name: "SUM" data_type: TYPE_FP32 dims: 2 }
output { name: "DIFF" data_type: TYPE_FP32 dims: 2 }
instance_group { kind: KIND_CPU }
"""

# Takes Python code as its input, and answers with what the code leaves in `said`.
ASK = """
import asyncio
import json
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
RESCHEDULE = pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE


def add(a, b=1.0, model="add", outputs=("SUM",), shape=2, dtype=np.float32, **rest):
    tensors = [pb_utils.Tensor("A", np.full(shape, a, dtype)), pb_utils.Tensor("B", np.full(2, b, np.float32))]
    return pb_utils.InferenceRequest(model_name=model, requested_output_names=list(outputs), inputs=tensors, **rest)


def repeat(n, **rest):
    tensors = [pb_utils.Tensor("N", np.array([n], np.int32))]
    return pb_utils.InferenceRequest(model_name="repeat", requested_output_names=["OUT"], inputs=tensors, **rest)


def show(response):
    if response.has_error():
        return response.error().message()
    return {t.name(): t.as_numpy().tolist() for t in response.output_tensors()}


class TritonPythonModel:
    def execute(self, requests):
        (request,) = requests
        code = request.inputs()[0].as_numpy()[0].decode()
        names = {**globals(), "request": request, "self": self}
        try:
            exec(code, names)
            said = names["said"]
        except BaseException as error:
            said = [type(error).__name__, str(error)]
        text = np.array([json.dumps(said).encode()], np.object_)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("SAID", text)])]
"""

ASYNC = ASK.replace("    def execute(self, requests):", "    async def execute(self, requests):").replace(
    '            exec(code, names)\n            said = names["said"]\n',
    '            exec(code, names)\n            said = await names["main"]()\n',
)

ASK_CONFIG = """
backend: "python"
input { name: "CODE" data_type: TYPE_STRING dims: 1 }
output { name: "SAID" data_type: TYPE_STRING dims: 1 }
instance_group { kind: KIND_CPU }
"""

# A model that is not decoupled and sends its one response itself.
SENDS = """
import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def execute(self, requests):
        (request,) = requests
        what = request.inputs()[0].as_numpy()[0].decode()
        sender = request.get_response_sender()
        answer = pb_utils.InferenceResponse([pb_utils.Tensor("SAID", np.array([what.encode()], np.object_))])
        if what == "sent":
            sender.send(answer, FINAL)
        elif what == "sent, None returned":
            sender.send(answer, FINAL)
            return [None]
        elif what == "returned":
            return [answer]
        elif what == "too many":
            return [answer, answer]
        elif what == "no list":
            return answer
        elif what == "no response":
            return ["text"]
        elif what == "raise":
            raise pb_utils.TritonModelException("told so")
        elif what == "rescheduled and answered":
            request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            return [answer]
"""

MODELS = {
    "repeat": (REPEAT, REPEAT_CONFIG),
    "add": (ADD, ADD_CONFIG),
    "ask": (ASK, ASK_CONFIG),
    "ask_async": (ASYNC, ASK_CONFIG),
    "sends": (SENDS, ASK_CONFIG),
}


def write_models(repository: Path) -> Path:
    for name, (source, config) in MODELS.items():
        folder = repository / name
        (folder / "1").mkdir(parents=True)
        (folder / "1" / "model.py").write_text(source)
        (folder / "config.pbtxt").write_text(f'name: "{name}"\n{config}')
    # Loaded by a model, never at start.
    (repository / "late" / "1").mkdir(parents=True)
    (repository / "late" / "1" / "model.py").write_text(ADD)
    (repository / "late" / "config.pbtxt").write_text('name: "late"\n' + ADD_CONFIG)
    return repository
