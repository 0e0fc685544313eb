"""Ensembles: inference through steps of every kind, their config, and those whose steps do not fit. Knows no server."""

from __future__ import annotations

import json
from typing import Any

from .http_request import Json
from .wire import HttpCase

_ADD = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
                if (x < 0).any():
                    responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("below zero")))
                    continue
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x + 1)]))
            return responses
"""

_SUM = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                given = [t.as_numpy() for t in request.inputs()]
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", sum(given))]))
            return responses
"""

_TEXT = """
    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
                upper = np.array([v.upper() for v in x.ravel()], dtype=object).reshape(x.shape)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", upper)]))
            return responses
"""

_SAYS = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
                said = {
                    "id": request.request_id(),
                    "correlation": str(request.correlation_id()),
                    "flags": request.flags(),
                    "parameters": json.loads(request.parameters() or "{}"),
                    "timeout": request.timeout(),
                    "outputs": list(request.requested_output_names()),
                }
                text = np.array([json.dumps(said, sort_keys=True).encode()], dtype=object)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x), pb_utils.Tensor("SAID", text)]))
            return responses
"""

_MANY = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            for request in requests:
                sender = request.get_response_sender()
                x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", x)]))
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""

_NONE = """
    class TritonPythonModel:
        def initialize(self, args):
            raise RuntimeError("cannot start")

        def execute(self, requests):
            return []
"""


def _io(direction: str, name: str, dims: str = "[ 2 ]", kind: str = "INT32", extra: str = "") -> str:
    return f'{direction} {{ name: "{name}" data_type: TYPE_{kind} dims: {dims} {extra} }}\n'


def _model(code: str, *tensors: str, batch: int = 0, extra: str = "") -> Any:
    group = "instance_group { count: 1 kind: KIND_CPU }\n"
    config = f'backend: "python"\nmax_batch_size: {batch}\n{group}{"".join(tensors)}{extra}\n'
    return config, code, ("1",), {}


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> str:
    maps = [("input_map", inputs), ("output_map", outputs)]
    text = " ".join(f'{m} {{ key: "{k}" value: "{v}" }}' for m, pairs in maps for k, v in pairs.items())
    return f'  step {{ model_name: "{model}" model_version: {version} {text} }}\n'


def _ensemble(steps: str, *tensors: str, batch: int = 0, extra: str = "") -> Any:
    config = (
        f'platform: "ensemble"\nmax_batch_size: {batch}\n{"".join(tensors)}ensemble_scheduling {{\n{steps}}}\n{extra}'
    )
    return config, None, ("1",), {}


_IN, _OUT = _io("input", "IN"), _io("output", "OUT")
_X, _Y = _io("input", "X"), _io("output", "Y")
_LINE = _step("e_add", {"X": "IN"}, {"Y": "t"}) + _step("e_add", {"X": "t"}, {"Y": "OUT"})
_ONE = _step("e_add", {"X": "IN"}, {"Y": "OUT"})

# name → (config, model.py or None, versions, files)
MODELS: dict[str, tuple[str, str | None, tuple[str, ...], dict[str, str]]] = {
    "e_add": _model(_ADD, _X, _Y),
    "e_batch": _model(_ADD, _X, _Y, batch=4),
    "e_wide": _model(_ADD, _io("input", "X", "[ -1, 2 ]"), _io("output", "Y", "[ -1, 2 ]")),
    "e_sum": _model(_SUM, _io("input", "A"), _io("input", "B", extra="optional: true"), _Y),
    "e_text": _model(_TEXT, _io("input", "X", "[ -1 ]", "STRING"), _io("output", "Y", "[ -1 ]", "STRING")),
    "e_says": _model(_SAYS, _X, _Y, _io("output", "SAID", "[ 1 ]", "STRING")),
    "e_many": _model(_MANY, _X, _Y, extra="model_transaction_policy { decoupled: true }"),
    "e_broken": _model(_NONE, _X, _Y),
    "line": _ensemble(_LINE, _IN, _OUT),
    "diamond": _ensemble(
        _step("e_add", {"X": "IN"}, {"Y": "t"})
        + _step("e_add", {"X": "t"}, {"Y": "u"})
        + _step("e_sum", {"A": "t", "B": "u"}, {"Y": "OUT"}),
        _IN, _OUT,
    ),
    "fork": _ensemble(
        _step("e_add", {"X": "IN"}, {"Y": "P"}) + _step("e_add", {"X": "IN"}, {"Y": "Q"}),
        _IN, _io("output", "P"), _io("output", "Q"),
    ),
    "maybe": _ensemble(
        _step("e_sum", {"A": "IN", "B": "MORE"}, {"Y": "OUT"}), _IN, _io("input", "MORE", extra="optional: true"), _OUT
    ),
    "texts": _ensemble(
        _step("e_text", {"X": "IN"}, {"Y": "OUT"}),
        _io("input", "IN", "[ -1 ]", "STRING"), _io("output", "OUT", "[ -1 ]", "STRING"),
    ),
    "nested": _ensemble(
        _step("line", {"IN": "IN"}, {"OUT": "t"}) + _step("fork", {"IN": "t"}, {"P": "OUT"}), _IN, _OUT
    ),
    "told": _ensemble(
        _step("e_says", {"X": "IN"}, {"Y": "t", "SAID": "FIRST"}) + _step("e_says", {"X": "t"}, {"SAID": "SECOND"}),
        _IN, _io("output", "FIRST", "[ 1 ]", "STRING"), _io("output", "SECOND", "[ 1 ]", "STRING"),
    ),
    "batches": _ensemble(
        _step("e_batch", {"X": "IN"}, {"Y": "t"}) + _step("e_wide", {"X": "t"}, {"Y": "OUT"}),
        _IN, _OUT, batch=4,
    ),
    "single": _ensemble(
        _step("e_add", {"X": "IN"}, {"Y": "t"}) + _step("e_batch", {"X": "t"}, {"Y": "OUT"}), _IN, _OUT
    ),
    "reshaped": _ensemble(
        _ONE,
        _io("input", "IN", "[ 1, 2 ]", extra="reshape { shape: [ 2 ] }"),
        _io("output", "OUT", "[ 1, 2 ]", extra="reshape { shape: [ 2 ] }"),
    ),
    "streams": _ensemble(_step("e_many", {"X": "IN"}, {"Y": "OUT"}), _IN, _OUT),
    # none of these can be loaded
    "x_absent": _ensemble(
        _step("nobody", {"X": "IN"}, {"Y": "t"}) + _step("e_add", {"X": "t"}, {"Y": "OUT"}), _IN, _OUT
    ),
    "x_broken": _ensemble(_step("e_broken", {"X": "IN"}, {"Y": "OUT"}), _IN, _OUT),
    "x_outer": _ensemble(_step("x_broken", {"IN": "IN"}, {"OUT": "OUT"}), _IN, _OUT),
    "x_version": _ensemble(_step("e_add", {"X": "IN"}, {"Y": "OUT"}, 3), _IN, _OUT),
    "x_type": _ensemble(_ONE, _io("input", "IN", kind="FP32"), _OUT),
    "x_shape": _ensemble(_ONE, _io("input", "IN", "[ 3 ]"), _OUT),
    "x_output": _ensemble(_ONE, _IN, _io("output", "OUT", "[ 2, 2 ]")),
    "x_batch": _ensemble(_step("e_batch", {"X": "IN"}, {"Y": "OUT"}), _IN, _OUT, batch=8),
    "x_input": _ensemble(_step("e_add", {"Z": "IN"}, {"Y": "OUT"}), _IN, _OUT),
    "x_result": _ensemble(_step("e_add", {"X": "IN"}, {"Z": "OUT"}), _IN, _OUT),
    "x_unmapped": _ensemble(_step("e_sum", {"B": "IN"}, {"Y": "OUT"}), _IN, _OUT),
    "x_mixed": _ensemble(
        _step("e_many", {"X": "IN"}, {"Y": "t"}) + _step("e_sum", {"A": "t", "B": "IN"}, {"Y": "OUT"}), _IN, _OUT
    ),
    "x_self": _ensemble(_step("x_self", {"IN": "IN"}, {"OUT": "OUT"}), _IN, _OUT),
    "x_one": _ensemble(_step("x_two", {"IN": "IN"}, {"OUT": "OUT"}), _IN, _OUT),
    "x_two": _ensemble(_step("x_one", {"IN": "IN"}, {"OUT": "OUT"}), _IN, _OUT),
    "x_twice": _ensemble(_ONE + _ONE, _IN, _OUT),
    "x_unused": _ensemble(_ONE, _IN, _OUT, _io("input", "MORE")),
}  # fmt: skip

LOADED = ("line", "diamond", "fork", "maybe", "texts", "nested", "told", "batches", "single", "reshaped", "streams")
OPTIONS = ("--model-control-mode=explicit", *(f"--load-model={name}" for name in LOADED))
CASES: list[HttpCase] = []


def _infer(name: str, model: str, *inputs: Json, **rest: Any) -> None:
    body = json.dumps({"inputs": list(inputs), **rest}).encode()
    CASES.append(HttpCase(f"{model}: {name}", "POST", f"/v2/models/{model}/infer", (), body))


def _ints(name: str, *data: int, shape: list[int] | None = None) -> Json:
    return {"name": name, "datatype": "INT32", "shape": shape or [len(data)], "data": list(data)}


def _post(path: str, body: Any = None) -> None:
    payload = b"" if body is None else json.dumps(body).encode()
    CASES.append(HttpCase(f"POST {path}{' ' + payload.decode() if payload else ''}", "POST", path, (), payload))


for _model_name in ("line", "diamond", "batches", "streams", "reshaped"):
    CASES.append(HttpCase(f"config of {_model_name}", "GET", f"/v2/models/{_model_name}/config"))
    CASES.append(HttpCase(f"metadata of {_model_name}", "GET", f"/v2/models/{_model_name}"))
_infer("plain", "line", _ints("IN", 1, 2))
_infer("with an id", "line", _ints("IN", 1, 2), id="mine")
_infer("a wrong shape", "line", _ints("IN", 1, 2, 3))
_infer("a sequence", "line", _ints("IN", 1, 2), parameters={"sequence_id": 7, "sequence_start": True})
_infer("a sequence with a name", "line", _ints("IN", 1, 2), parameters={"sequence_id": "seven", "sequence_end": True})
_infer("plain", "diamond", _ints("IN", 1, 2))
_infer("all outputs", "fork", _ints("IN", 1, 2))
_infer("one output", "fork", _ints("IN", 1, 2), outputs=[{"name": "Q"}])
_infer("the input that may be left out, given", "maybe", _ints("IN", 1, 2), _ints("MORE", 10, 20))
_infer("the input that may be left out, left out", "maybe", _ints("IN", 1, 2))
_infer("the other left out", "maybe", _ints("MORE", 1, 2))
_infer("plain", "texts", {"name": "IN", "datatype": "BYTES", "shape": [3], "data": ["a", "", "grün"]})
_infer("plain", "nested", _ints("IN", 1, 2))
for _output in ("FIRST", "SECOND"):
    _infer(
        f"what the steps are told for {_output}",
        "told",
        _ints("IN", 1, 2),
        id="mine",
        parameters={"k": "v", "n": 3, "sequence_id": 9},
        outputs=[{"name": _output}],
    )
_infer("a step that fails", "line", _ints("IN", -1, 2))
_infer("a step of a step that fails", "nested", _ints("IN", -1, 2))
_infer("one row", "batches", _ints("IN", 1, 2, shape=[1, 2]))
_infer("three rows", "batches", _ints("IN", 1, 2, 3, 4, 5, 6, shape=[3, 2]))
_infer("too many rows", "batches", _ints("IN", *range(10), shape=[5, 2]))
_infer("plain", "single", _ints("IN", 1, 2))
_infer("plain", "reshaped", _ints("IN", 1, 2, shape=[1, 2]))
_infer("over HTTP", "streams", _ints("IN", 1, 2))

for _model_name in MODELS:
    if _model_name.startswith("x_"):
        _post(f"/v2/repository/models/{_model_name}/load")
_post("/v2/repository/index", {"ready": True})
# what becomes of ensembles without the models they need
_post("/v2/repository/models/e_text/unload")
_infer("after its model is gone", "texts", {"name": "IN", "datatype": "BYTES", "shape": [1], "data": ["a"]})
_post("/v2/repository/models/e_text/load")
_infer("after its model is back", "texts", {"name": "IN", "datatype": "BYTES", "shape": [1], "data": ["a"]})
_post("/v2/repository/models/told/unload", {"parameters": {"unload_dependents": True}})
CASES.append(HttpCase("e_says, which went with it", "GET", "/v2/models/e_says/ready"))
_post("/v2/repository/models/diamond/unload", {"parameters": {"unload_dependents": True}})
CASES.append(HttpCase("e_sum, which another needs", "GET", "/v2/models/e_sum/ready"))
