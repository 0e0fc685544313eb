"""What is asked, and how an answer is written down. Knows no server beyond its two addresses."""

from __future__ import annotations

import http.client
import json
import queue
import re
import struct
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

PATIENCE_S = 15.0  # a model that has not answered by then is not going to

# Python code that model `ask` runs; what it leaves in `said` is the answer.
SYNC = {
    "one call": "said = show(add(3.0).exec())",
    "all of the request": (
        "said = show(add(3.0, request_id='r1', parameters={'k': 1, 'l': 'x', 'm': True}, timeout=1000000,"
        " correlation_id=0, model_version=1,"
        " preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)).exec())"
    ),
    "two outputs": "said = show(add(3.0, outputs=['DIFF', 'SUM']).exec())",
    "no outputs named": "said = show(add(3.0, outputs=[]).exec())",
    "an unknown output": "said = show(add(3.0, outputs=['NOPE']).exec())",
    "an unknown model": "said = show(add(3.0, model='nope').exec())",
    "an unknown version": "said = show(add(3.0, model_version=7).exec())",
    "a model that is not loaded": "said = show(add(3.0, model='late').exec())",
    "a wrong shape": "said = show(add(3.0, shape=3).exec())",
    "a wrong datatype": "said = show(add(3.0, dtype=np.int32).exec())",
    "the model's own error": "said = show(add(13.0).exec())",
    "what the model raised": "said = show(add(99.0).exec())",
    "decoupled, not said so": "said = show(repeat(2).exec())",
    "decoupled, even": "said = [show(r) for r in repeat(2).exec(decoupled=True)]",
    "decoupled, odd": "said = [show(r) for r in repeat(3).exec(decoupled=True)]",
    "decoupled, nothing": "said = [show(r) for r in repeat(0).exec(decoupled=True)]",
    "decoupled, an error": "said = [show(r) for r in repeat(-1).exec(decoupled=True)]",
    "decoupled, twice over": "it = repeat(2).exec(decoupled=True); said = [len(list(it)), len(list(it))]",
    "decoupled of a plain model": "said = [show(r) for r in add(3.0).exec(decoupled=True)]",
    "decoupled of an unknown model": "said = [show(r) for r in add(3.0, model='nope').exec(decoupled=True)]",
    "a model is ready": "said = [pb_utils.is_model_ready('add'), pb_utils.is_model_ready('add', '1')]",
    "a version is not": "said = pb_utils.is_model_ready('add', '7')",
    "an unknown model is not": "said = pb_utils.is_model_ready('nope')",
    "no version": "said = pb_utils.is_model_ready('add', 'x')",
    "load, call, unload": (
        "pb_utils.load_model('late'); a = pb_utils.is_model_ready('late');"
        " b = show(add(3.0, model='late').exec()); pb_utils.unload_model('late'); said = [a, b]"
    ),
    "load of an unknown model": "pb_utils.load_model('nope')",
    "load with files that are no dict": "pb_utils.load_model('late', files=[])",
    "unload of an unknown model": "pb_utils.unload_model('nope')",
    "an empty name": "pb_utils.Tensor('', np.zeros(1))",
    "a datatype numpy has": "pb_utils.Tensor('a', np.zeros(1, np.complex64))",
    "strings through dlpack": "pb_utils.Tensor('a', np.array([b'a'], np.object_)).to_dlpack()",
    "dlpack both ways": (
        "t = pb_utils.Tensor('a', np.arange(6, dtype=np.float32).reshape(2, 3));"
        " u = pb_utils.Tensor.from_dlpack('b', t.to_dlpack());"
        " said = [u.name(), u.as_numpy().tolist(), list(u.shape()), u.is_cpu()]"
    ),
    "dlpack from numpy": "said = pb_utils.Tensor.from_dlpack('b', np.arange(3)).as_numpy().tolist()",
    "dlpack, not contiguous": "pb_utils.Tensor.from_dlpack('b', np.arange(6).reshape(2, 3).T)",
    "dlpack of nothing": "pb_utils.Tensor.from_dlpack('b', 3)",
    "a request of its own has no sender": "add(1.0).get_response_sender().send(flags=FINAL)",
    "no input tensor": "pb_utils.InferenceRequest(model_name='m', requested_output_names=[], inputs=[None])",
    "an empty output name": "add(1.0, outputs=[''])",
    "a correlation id of a wrong type": "add(1.0, correlation_id=1.5)",
    "a metric": (
        "f = pb_utils.MetricFamily(name='c1', description='d', kind=pb_utils.MetricFamily.COUNTER);"
        " m = f.Metric(labels={'a': 'b'}); m.increment(2); m.increment(0.5); said = m.value()"
    ),
    "a gauge": (
        "f = pb_utils.MetricFamily(name='g1', description='d', kind=pb_utils.MetricFamily.GAUGE);"
        " m = f.Metric(); m.set(5); m.increment(-2); said = m.value()"
    ),
    "a counter that falls": (
        "f = pb_utils.MetricFamily(name='c2', description='d', kind=pb_utils.MetricFamily.COUNTER);"
        " f.Metric().increment(-1)"
    ),
    "a counter that is set": (
        "f = pb_utils.MetricFamily(name='c3', description='d', kind=pb_utils.MetricFamily.COUNTER); f.Metric().set(1)"
    ),
    "labels that are no dict": (
        "f = pb_utils.MetricFamily(name='c4', description='d', kind=pb_utils.MetricFamily.COUNTER);"
        " f.Metric(labels=['a'])"
    ),
    "a family of another kind": (
        "f = pb_utils.MetricFamily(name='c5', description='d', kind=pb_utils.MetricFamily.COUNTER);"
        " g = pb_utils.MetricFamily(name='c5', description='d', kind=pb_utils.MetricFamily.GAUGE)"
    ),
}

# The body of `async def main()` in model `ask_async`.
AWAITED = {
    "one": "return show(await add(3.0).async_exec())",
    "several at once": (
        "return [show(r) for r in await asyncio.gather(*[add(float(i)).async_exec() for i in range(5)])]"
    ),
    "an error": "return show(await add(13.0).async_exec())",
    "an unknown model": "return show(await add(1.0, model='nope').async_exec())",
    "decoupled": "return [show(r) for r in await repeat(3).async_exec(decoupled=True)]",
    "decoupled, not said so": "return show(await repeat(3).async_exec())",
}

SENT = (
    "sent", "sent, None returned", "returned", "too many", "no list", "no response", "raise",
    "rescheduled and answered",
)  # fmt: skip

STREAMED = (0, 1, 2, 3, -1)


CRASH = "crash"


def all_questions() -> dict[str, Callable[[int, str], Any]]:
    """By name: what asks a server, given its HTTP port and its gRPC address."""
    asked: dict[str, Callable[[int, str], Any]] = {}
    for name, code in SYNC.items():
        asked[f"bls: {name}"] = lambda http, grpc, code=code: _said(http, "ask", code)
    for name, body in AWAITED.items():
        code = f"async def main():\n    {body}\n"
        asked[f"async: {name}"] = lambda http, grpc, code=code: _said(http, "ask_async", code)
    for what in SENT:
        asked[f"http sends: {what}"] = lambda http, grpc, what=what: _infer(http, "sends", what)
        asked[f"grpc sends: {what}"] = lambda http, grpc, what=what: _infer_grpc(grpc, "sends", what)
    for count in STREAMED:
        asked[f"stream: {count}"] = lambda http, grpc, count=count: _stream(grpc, count)
    add = {
        "id": "h1",
        "parameters": {"p": 1, "q": "x"},
        "inputs": [{"name": n, "datatype": "FP32", "shape": [2], "data": [1, 2]} for n in "AB"],
    }
    asked["http: parameters"] = lambda http, grpc: _post(http, "add", add)
    return asked


def ask_all(http_port: int, grpc: str, answers: dict[str, Any]) -> bool:
    """Adds the answers that are missing. False: the server, or a model's process, has died of one."""
    for name, ask in all_questions().items():
        if name in answers:
            continue
        try:
            answers[name] = ask(http_port, grpc)
        except (ConnectionError, http.client.HTTPException, urllib.error.URLError):
            answers[name] = CRASH
        if "is not healthy" in str(answers[name]):
            answers[name] = CRASH
        if answers[name] == CRASH:
            return False
    return True


def _said(port: int, model: str, code: str) -> Any:
    answer = _infer(port, model, code)
    if answer == "silent":
        return answer
    return normal(json.loads(answer["outputs"][0]["data"][0]) if "outputs" in answer else answer)


def _infer(port: int, model: str, text: str) -> Any:
    return _post(port, model, {"inputs": [{"name": "CODE", "datatype": "BYTES", "shape": [1], "data": [text]}]})


def _post(port: int, model: str, body: Any) -> Any:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v2/models/{model}/infer", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return normal(json.load(response))
    except TimeoutError:
        return "silent"
    except urllib.error.HTTPError as error:
        return normal({"status": error.code, **json.load(error)})


def _infer_grpc(address: str, model: str, text: str) -> Any:
    tensor = grpcclient.InferInput("CODE", [1], "BYTES").set_data_from_numpy(np.array([text.encode()], np.object_))
    with grpcclient.InferenceServerClient(address) as client:
        try:
            return [item.decode() for item in client.infer(model, [tensor], client_timeout=PATIENCE_S).as_numpy("SAID")]
        except InferenceServerException as error:
            return normal([error.status(), error.message()])


def _stream(address: str, count: int) -> Any:
    got: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    tensor = grpcclient.InferInput("N", [1], "INT32")
    tensor._raw_content = struct.pack("<i", count)
    answers = []
    with grpcclient.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: got.put((result, error)))
        client.async_stream_infer("repeat", [tensor], request_id="s", enable_empty_final_response=True)
        while True:
            result, error = got.get(timeout=PATIENCE_S)
            if error is not None:
                answers.append(normal([error.status(), error.message()]))
                break
            response = result.get_response()
            parameters = {k: getattr(v, v.WhichOneof("parameter_choice")) for k, v in response.parameters.items()}
            out = result.as_numpy("OUT")
            answers.append([response.id, None if out is None else out.tolist(), parameters])
            if parameters.get("triton_final_response"):
                break
        client.stop_stream()
    return answers


def normal(value: Any) -> Any:
    """Without what differs from run to run: where a file is, and lines of a traceback."""
    if isinstance(value, str):
        value = re.sub(r"Failed to process the request for model '[^']*', message: ", "", value)  # gone since 2.51
        value = re.sub(r"\n\nAt:\n.*", "", value, flags=re.DOTALL)
        return re.sub(r"'/[^']*/", "'", value)
    if isinstance(value, list):
        return [normal(item) for item in value]
    if isinstance(value, dict):
        return {key: normal(item) for key, item in value.items()}
    return value
