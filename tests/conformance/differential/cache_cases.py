"""What the response cache answers and what it counts: the same question again and again, and others. Knows no server.

The models answer with how often they have run, so that an answer says where it came from.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from .wire import GrpcCase, HttpCase

OPTIONS = ("--cache-config=local,size=1048576",)

_CODE = """
    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.runs = 0

        def execute(self, requests):
            responses = []
            for request in requests:
                value = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
                if (value < 0).any():
                    responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("negative")))
                    continue
                self.runs += 1
                text = np.full(value.shape, str(self.runs).encode(), dtype=object)
                responses.append(pb_utils.InferenceResponse([
                    pb_utils.Tensor("RUNS", np.full(value.shape, self.runs, np.int32)), pb_utils.Tensor("TEXT", text)]))
            return responses
"""
_TENSORS = """
input { name: "IN" data_type: TYPE_INT32 dims: [ 2 ] }
output { name: "RUNS" data_type: TYPE_INT32 dims: [ 2 ] }
"""
_TEXT = 'output { name: "TEXT" data_type: TYPE_STRING dims: [ 2 ] }\n'
_PYTHON = f'backend: "python"\ninstance_group {{ count: 1 kind: KIND_CPU }}\n{_TENSORS}{_TEXT}'
_CACHED = "response_cache { enable: true }\n"
_ENSEMBLE = f"""
platform: "ensemble"
{_TENSORS}
ensemble_scheduling {{ step {{
  model_name: "%s" model_version: -1
  input_map {{ key: "IN" value: "IN" }} output_map {{ key: "RUNS" value: "RUNS" }} }} }}
"""
_CONFIGS = {
    "cached": _PYTHON + _CACHED,
    "cached_batches": _PYTHON + _CACHED + "max_batch_size: 4\ndynamic_batching { }\n",
    "uncached": _PYTHON,
    "cached_ensemble": _ENSEMBLE % "uncached" + _CACHED,
    "ensemble_of_cached": _ENSEMBLE % "cached_step",
    "cached_step": _PYTHON + _CACHED,
}
MODELS: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    name: (config, "" if "platform" in config else _CODE, ("1",), {}) for name, config in _CONFIGS.items()
}


def _cases() -> list[HttpCase | GrpcCase]:
    cases: list[HttpCase | GrpcCase] = []

    def ask(model: str, *values: int, outputs: list[str] | None = None, id: str = "", rows: int = 0) -> None:
        data = list(values) * max(rows, 1)
        shape = [rows, 2] if rows else [2]
        body: dict[str, Any] = {"inputs": [{"name": "IN", "shape": shape, "datatype": "INT32", "data": data}]}
        if id:
            body["id"] = id
        if outputs is not None:
            body["outputs"] = [{"name": name} for name in outputs]
        number = len(cases)
        name = f"{number}: {model} {data} {outputs or ''} {id}".strip()
        cases.append(HttpCase(name, "POST", f"/v2/models/{model}/infer", (), json.dumps(body).encode()))

    def call(model: str, *values: int, rows: int = 0) -> None:
        message = service_pb2.ModelInferRequest(model_name=model)
        message.inputs.add(name="IN", datatype="INT32", shape=[rows, 2] if rows else [2])
        message.raw_input_contents.append(np.array(list(values) * max(rows, 1), np.int32).tobytes())
        cases.append(GrpcCase(f"{len(cases)}: ModelInfer {model} {values} {rows}", "ModelInfer", (message,)))

    def count(model: str) -> None:
        path = f"/v2/models/{model}/stats"
        cases.append(HttpCase(f"{len(cases)}: GET {path}", "GET", path))

    for model, rows in (("cached", 0), ("cached_batches", 1), ("cached_batches", 3)):
        for _ in range(2):
            ask(model, 1, 2, rows=rows)
        ask(model, 1, 2, id="seven", rows=rows)
        ask(model, 2, 1, rows=rows)
        call(model, 1, 2, rows=rows)
        for _ in range(2):
            call(model, 3, 3, rows=rows)
        ask(model, 1, 2, outputs=["RUNS", "TEXT"], rows=rows)
        count(model)
    for model, step in (("cached_ensemble", "uncached"), ("ensemble_of_cached", "cached_step")):
        for _ in range(3):
            ask(model, 5, 6)
        ask(model, 6, 5)
        count(model)
        count(step)
    for _ in range(2):
        ask("uncached", 1, 2)
    # What follows is not counted: 2.51 answers it from its cache, wrongly.
    ask("cached", 8, 8, outputs=["RUNS"])
    ask("cached", 8, 8, outputs=["TEXT"], id="another output")
    ask("cached", -1, 0)
    ask("cached", -1, 0, id="an error again")
    return cases


CASES = tuple(_cases())
