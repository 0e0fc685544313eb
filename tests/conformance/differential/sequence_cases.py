"""Sequences of requests, one after the other, with flags right and wrong, and models that say what they were given.

The models answer with every control they see, so that what a scheduler tells them is compared too. Knows no server.
Neither text ids as a control (2.51 fails on them) nor streams (2.51 may run a sequence's requests out of order) are
here: they are in test_sequences_over_the_wire.py.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from .http_request import Json
from .wire import GrpcCase, HttpCase

_CODE = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.sums = {}

        def execute(self, requests):
            responses = []
            for row, request in enumerate(requests):
                seen = {t.name(): t.as_numpy() for t in request.inputs()}
                value = seen.pop("IN")
                controls = {n: [a.dtype.str, list(a.shape), str(a.ravel()[0])] for n, a in sorted(seen.items())}
                if controls["READY"][2] in ("1", "1.0", "True"):
                    key = controls["CORRID"][2]
                    total = value if controls["START"][2] in ("1", "1.0", "True") else self.sums[key] + value
                    self.sums[key] = total
                    said = {**controls, "row": row, "rows": len(requests), "flags": request.flags()}
                    said["id"] = str(request.correlation_id())
                    text = np.full(value.shape, json.dumps(said, sort_keys=True).encode(), dtype=object)
                    outputs = [pb_utils.Tensor("SUM", total), pb_utils.Tensor("SAID", text)]
                else:
                    outputs = []
                responses.append(pb_utils.InferenceResponse(outputs))
            return responses
"""


def _config(strategy: str, values: str, ids: str, batch: int) -> str:
    controls = ", ".join(
        f'{{ name: "{kind}" control [ {{ kind: CONTROL_SEQUENCE_{kind} {values} }} ] }}'
        for kind in ("START", "READY", "END")
    )
    return f"""
backend: "python"
max_batch_size: {batch}
instance_group {{ count: 1 kind: KIND_CPU }}
input {{ name: "IN" data_type: TYPE_INT32 dims: [ 1 ] }}
output {{ name: "SUM" data_type: TYPE_INT32 dims: [ 1 ] }}
output {{ name: "SAID" data_type: TYPE_STRING dims: [ 1 ] }}
sequence_batching {{
  {strategy}
  max_sequence_idle_microseconds: 60000000
  control_input [
    {controls},
    {{ name: "CORRID" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: {ids} }} ] }}
  ]
}}
"""


_INT, _FLOAT, _BOOL = "int32_false_true: [ 0, 1 ]", "fp32_false_true: [ 0, 1 ]", "bool_false_true: [ false, true ]"
_OLDEST = "oldest { max_candidate_sequences: 4 }"
_NAMES = {
    "direct": _config("direct { }", _INT, "TYPE_UINT64", 4),
    "oldest": _config(_OLDEST, _FLOAT, "TYPE_INT64", 4),
    "direct_32": _config("direct { }", _BOOL, "TYPE_UINT32", 4),
    "direct_alone": _config("direct { }", _FLOAT, "TYPE_INT32", 0),
    "oldest_alone": _config(_OLDEST, _BOOL, "TYPE_UINT32", 0),
}
MODELS: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    name: (config, _CODE, ("1",), {}) for name, config in _NAMES.items()
}

# (sequence, value, flags): an interleaving whose every answer follows from those before it
Step = tuple[int, int, str]


def _steps(name: str) -> list[Step]:
    first, second, third = 5, 2**31 + 6, 2**63 - 1
    if "alone" in name:  # one slot an instance: what goes on beside it would wait in the backlog
        return [(first, 1, ""), (first, 2, "s"), (first, 3, ""), (first, 4, "e"), (second, 5, "se"), (third, 6, "e")]
    return [
        (first, 1, ""),
        (first, 2, "e"),
        (first, 1, "s"),
        (second, 10, "s"),
        (first, 2, ""),
        (third, 100, "s"),
        (second, 20, ""),
        (first, 3, "s"),  # again, before its end
        (first, 4, ""),
        (first, 5, "e"),
        (first, 6, ""),
        (first, 7, "se"),
        (first, 8, "e"),
        (third, 200, ""),
        (third, 300, "e"),
        (second, 30, "e"),
        (second, 40, "e"),
    ]


def _post(name: str, model: str, request: Json) -> HttpCase:
    return HttpCase(name, "POST", f"/v2/models/{model}/infer", (), json.dumps(request).encode())


def _flags(flags: str) -> Json:
    return {name: True for letter, name in (("s", "sequence_start"), ("e", "sequence_end")) if letter in flags}


def _http(name: str, model: str, value: int, parameters: Json, rows: int = 1) -> HttpCase:
    shape = [1] if "alone" in model else [rows, 1]
    tensor = {"name": "IN", "shape": shape, "datatype": "INT32", "data": [value] * rows}
    return _post(name, model, {"inputs": [tensor], "parameters": parameters})


def _message(model: str, value: int, parameters: Json) -> Any:
    shape = [1] if "alone" in model else [1, 1]
    message = service_pb2.ModelInferRequest(model_name=model, id=str(value))
    message.inputs.add(name="IN", datatype="INT32", shape=shape)
    message.raw_input_contents.append(np.array([value], np.int32).tobytes())
    for key, parameter in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(parameter)]
        setattr(message.parameters[key], kind, parameter)
    return message


def _cases() -> list[HttpCase | GrpcCase]:
    cases: list[HttpCase | GrpcCase] = []
    for model in MODELS:
        for front in ("HTTP", "gRPC"):
            for number, (sequence, value, flags) in enumerate(_steps(model)):
                parameters = {"sequence_id": sequence, **_flags(flags)}
                name = f"{model} step {number}: {sequence} {flags or '-'}"
                if front == "HTTP":
                    cases.append(_http(name, model, value, parameters))
                else:
                    cases.append(GrpcCase(name, "ModelInfer", (_message(model, value, parameters),)))
    for model in ("direct", "oldest"):
        for name, parameters in (
            ("no sequence", {}),
            ("sequence 0", {"sequence_id": 0, "sequence_start": True}),
            ("sequence ''", {"sequence_id": "", "sequence_start": True}),
            ("sequence -1", {"sequence_id": -1, "sequence_start": True}),
            ("sequence 1.5", {"sequence_id": 1.5, "sequence_start": True}),
            ("sequence true", {"sequence_id": True, "sequence_start": True}),
            ("sequence 2^64", {"sequence_id": 2**64, "sequence_start": True}),
            ("start 1", {"sequence_id": 1, "sequence_start": 1}),
            ("end 'yes'", {"sequence_id": 1, "sequence_start": True, "sequence_end": "yes"}),
            ("start false", {"sequence_id": 1, "sequence_start": False}),
            ("a long text", {"sequence_id": "x" * 129, "sequence_start": True}),
            ("a text for a number", {"sequence_id": "abc", "sequence_start": True, "sequence_end": True}),
        ):
            cases.append(_http(f"{model} {name}", model, 1, parameters))
            if all(type(p) in (bool, str) or (type(p) is int and p < 2**63) for p in parameters.values()):
                cases.append(GrpcCase(f"{model} {name}", "ModelInfer", (_message(model, 1, parameters),)))
        cases.append(_http(f"{model} two rows", model, 1, {"sequence_id": 3, "sequence_start": True}, rows=2))
        control = {"name": "START", "shape": [1, 1], "datatype": "INT32", "data": [1]}
        request = {"inputs": [control], "parameters": {"sequence_id": 3, "sequence_start": True}}
        cases.append(_post(f"{model} a control from the client", model, request))
        cases.append(HttpCase(f"{model} metadata", "GET", f"/v2/models/{model}"))
    return cases


CASES = tuple(_cases())
