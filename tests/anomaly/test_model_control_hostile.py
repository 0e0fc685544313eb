"""Models that load, unload and call models, themselves among them, from where nobody should."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harm import PATIENCE_S, Victim, attacked, check_text, save_python, tensor

from doorstep.testing.onnx_models import save_adder

HEAD = """
import asyncio, json, os, threading, time
import numpy as np
import triton_python_backend_utils as pb_utils

def text(request, name="x"):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy().ravel()[0].decode()

def said(value):
    return pb_utils.InferenceResponse([pb_utils.Tensor("y", np.array([str(value).encode()], np.object_))])

def ask(model, value):
    return pb_utils.InferenceRequest(model_name=model, requested_output_names=["y"],
                                     inputs=[pb_utils.Tensor("x", np.array([value.encode()], np.object_))])
"""
TEXTS = """
backend: "python"
input { name: "x" data_type: TYPE_STRING dims: [ 1 ] }
output { name: "y" data_type: TYPE_STRING dims: [ 1 ] }
instance_group { count: %d kind: KIND_CPU }
"""
CONTROLLER = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        return [self.one(request) for request in requests]

    def one(self, request):
        try:
            return said(eval(text(request)))
        except Exception as error:
            return said(f"{type(error).__name__}: {error}")
"""
)
ITSELF = (
    HEAD
    + """
class TritonPythonModel:
    def execute(self, requests):
        results = []
        for request in requests:
            depth = int(text(request))
            if depth == 0:
                results.append(said("the bottom"))
                continue
            answer = ask("itself", str(depth - 1)).exec()
            if answer.has_error():
                results.append(pb_utils.InferenceResponse(error=answer.error()))
            else:
                results.append(said(answer.output_tensors()[0].as_numpy().ravel()[0].decode()))
        return results
"""
)
DEEP = (
    HEAD
    + """
class TritonPythonModel:
    async def execute(self, requests):
        for request in requests:
            asyncio.get_running_loop().create_task(self.one(request, request.get_response_sender()))

    async def one(self, request, sender):
        depth = int(text(request))
        if depth == 0:
            answer = said("the bottom")
        else:
            async for got in await ask("deep", str(depth - 1)).async_exec(decoupled=True):
                if got.has_error():
                    answer = pb_utils.InferenceResponse(error=got.error())
                elif got.output_tensors():
                    answer = said(got.output_tensors()[0].as_numpy().ravel()[0].decode())
        sender.send(answer, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
)
LOADS = (
    HEAD
    + """
class TritonPythonModel:
    def initialize(self, args):
        pb_utils.load_model({name!r})

    def execute(self, requests):
        return [said("{name}") for _ in requests]
"""
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("control") / "models"
    save_adder(models / "add" / "1" / "model.onnx", 1)
    save_adder(models / "other" / "1" / "model.onnx", 2)
    save_python(models, "controller", CONTROLLER, TEXTS % 1)
    save_python(models, "itself", ITSELF, TEXTS % 1)
    save_python(models, "deep", DEEP, "model_transaction_policy { decoupled: true }" + TEXTS % 1)
    for i in range(6):
        save_python(models, f"nests_{i}", LOADS.replace("{name!r}", f"'leaf_{i}'").replace("{name}", "n"), TEXTS % 1)
        save_adder(models / f"leaf_{i}" / "1" / "model.onnx", 3)
    save_python(models, "narcissus", LOADS.replace("{name!r}", "'narcissus'").replace("{name}", "n"), TEXTS % 1)
    save_python(models, "left", LOADS.replace("{name!r}", "'right'").replace("{name}", "l"), TEXTS % 1)
    save_python(models, "right", LOADS.replace("{name!r}", "'left'").replace("{name}", "r"), TEXTS % 1)
    return models


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Victim]:
    wanted = [f"--load-model={name}" for name in ("add", "other", "controller", "itself", "deep")]
    with Victim(models, "--model-control-mode=explicit", *wanted, "--model-load-thread-count=2") as victim:
        yield victim
        victim.assert_sound()


def ask(server: Victim, model: str, text: str) -> str:
    status, answer = server.infer(model, tensor("x", [1], "BYTES", [text]))
    check_text(str(answer), text)
    return str(answer["outputs"][0]["data"][0]) if status == 200 else f"{status}: {answer['error']}"


def test_a_model_that_unloads_itself_answers_and_is_gone(server: Victim) -> None:
    with attacked(server):
        assert ask(server, "controller", "pb_utils.unload_model('controller')") == "None"
        server.wait_for(lambda: server.get("/v2/models/controller/ready")[0] != 200, "it is unloaded")
        assert server.post("/v2/repository/models/controller/load")[0] == 200
        assert ask(server, "controller", "1 + 1") == "2"


def test_a_model_that_loads_itself_anew_answers(server: Victim) -> None:
    config = {
        "backend": "python",
        "input": [{"name": "x", "data_type": "TYPE_STRING", "dims": [1]}],
        "output": [{"name": "y", "data_type": "TYPE_STRING", "dims": [1]}],
        "parameters": {"n": {"string_value": "1"}},
    }
    with attacked(server):
        said = ask(server, "controller", f"pb_utils.load_model('controller', config={json.dumps(json.dumps(config))})")
        assert said == "None"
        assert ask(server, "controller", "2 + 2") == "4"
        assert server.post("/v2/repository/models/controller/load")[0] == 200


@pytest.mark.parametrize(
    "call",
    [
        "pb_utils.load_model('')",
        "pb_utils.load_model('../models/add')",
        "pb_utils.load_model('no\\0ne')",
        "pb_utils.load_model('x' * 100_000)",
        "pb_utils.load_model('\\ud800')",
        "pb_utils.load_model('other', config='{')",
        "pb_utils.load_model('other', config='[]')",
        "pb_utils.load_model('other', config='{\"backend\": 5}')",
        "pb_utils.load_model('new', files={'1/model.onnx': b''})",
        "pb_utils.load_model('new', config='{}', files={'file:../../x': b'1'})",
        "pb_utils.load_model('new', config='{}', files={'file:/etc/x': b'1'})",
        "pb_utils.load_model('new', config='{}', files={'file:1/\\ud800': b'1'})",
        "pb_utils.load_model('new', config='{}', files={'file:' + 'a/' * 3000 + 'x': b'1'})",
        "pb_utils.unload_model('\\ud800')",
        "ask('\\ud800', 'x').exec().error().message()",
        "ask('x' * 1_000_000, 'x').exec().error().message()[:100]",
        "ask('add', 'x').exec().error().message()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['\\0'], inputs=[]).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['y'], inputs=[pb_utils.Tensor('x', "
        "np.zeros((1, 1), np.float32))], parameters={'\\ud800': '\\ud800'}).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['y'], inputs=[pb_utils.Tensor('x', "
        "np.zeros((1, 1), np.float32))], parameters={'a': 10 ** 400}).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['y'], inputs=[pb_utils.Tensor('x', "
        "np.zeros((1, 1), np.float32))] * 1000).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['y'], correlation_id=-1, inputs=[pb_utils"
        ".Tensor('x', np.zeros((1, 1), np.float32))]).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['y'], timeout=-5, inputs=[pb_utils"
        ".Tensor('x', np.zeros((1, 1), np.float32))]).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', requested_output_names=['y'], timeout=10**30, inputs=[pb_utils"
        ".Tensor('x', np.zeros((1, 1), np.float32))]).exec().error()",
        "pb_utils.InferenceRequest(model_name='add', model_version=10**30, requested_output_names=['y'], inputs=[]"
        ").exec().error().message()",
    ],
)
def test_calls_that_make_no_sense_harm_the_caller_alone(server: Victim, call: str) -> None:
    with attacked(server):
        said = ask(server, "controller", call)
        assert "killed" not in said
        assert ask(server, "controller", "1 + 1") == "2"


def test_a_model_that_calls_itself_waits_for_itself_until_its_client_goes(server: Victim) -> None:
    with attacked(server, workers=0):
        assert ask(server, "itself", "0") == "the bottom"
        clients = [server.raw() for _ in range(8)]
        body = json.dumps({"inputs": [tensor("x", [1], "BYTES", ["1000"])]}).encode()
        for client in clients:
            client.send(
                b"POST /v2/models/itself/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
            )
        server.wait_for(lambda: server.metric("doorstep_queue_depth", model="itself") >= 8, "they wait")
        for client in clients:
            client.close()
        server.wait_for(lambda: server.metric("doorstep_inflight_requests", model="itself") == 0, "they have ended")
        assert ask(server, "itself", "0") == "the bottom"


def test_a_thousand_calls_deep(server: Victim) -> None:
    body = {"text": "x", "x": "1000"}
    with attacked(server):
        status, answer = server.call("POST", "/v2/models/deep/generate", body)
        assert (status, b"the bottom" in answer) == (200, True)


def test_models_whose_loading_loads_others_do_not_wait_for_each_others_threads(server: Victim) -> None:
    """More of them than there are threads that load."""
    answers: list[Any] = []
    with attacked(server, workers=6):
        threads = [
            threading.Thread(target=lambda i=i: answers.append(server.post(f"/v2/repository/models/nests_{i}/load")))
            for i in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert [status for status, _ in answers] == [200] * 6, answers
    before = server.snapshot()
    for i in range(6):
        assert server.post(f"/v2/repository/models/nests_{i}/unload")[0] == 200
        assert server.post(f"/v2/repository/models/leaf_{i}/unload")[0] == 200
    server.assert_unharmed(before, workers=-6)


@pytest.mark.parametrize("name", ["narcissus", "left"])
def test_a_model_whose_loading_waits_for_itself_fails_to_load(server: Victim, name: str) -> None:
    with attacked(server):
        status, answer = server.post(f"/v2/repository/models/{name}/load")
        assert (status, "cannot wait meanwhile" in answer["error"]) == (400, True)
    assert server.post("/v2/repository/models/controller/load")[0] == 200
