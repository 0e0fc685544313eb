"""The repository both servers load: Python-backend models whose answers are exact in every numpy. Knows no server."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

from .cache_cases import MODELS as CACHE_MODELS
from .ensemble_cases import MODELS as ENSEMBLE_MODELS
from .sequence_cases import MODELS as SEQUENCE_MODELS

# Loaded at the start of the explicit-mode run; the rest of MODELS is there to be loaded, or to fail, by request.
LOADED = (
    "add_sub",
    "counted",
    "identity_fp32",
    "identity_bytes",
    "every_type",
    "classifier",
    "matrix",
    "scalar",
    "multi",
    "untouched",
    "raises",
    "params",
    "optional",
)

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "STRING",
)  # fmt: skip

_IDENTITY = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            return [
                pb_utils.InferenceResponse(
                    [pb_utils.Tensor(t.name().replace("IN", "OUT", 1), t.as_numpy()) for t in request.inputs()]
                )
                for request in requests
            ]
"""

_ADD_SUB = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                a = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
                b = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
                outputs = [pb_utils.Tensor("OUTPUT0", a + b), pb_utils.Tensor("OUTPUT1", a - b)]
                responses.append(pb_utils.InferenceResponse(outputs))
            return responses
"""

_CLASSIFIER = """
    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                scores = pb_utils.get_input_tensor_by_name(request, "SCORES").as_numpy()
                ranks = np.argsort(scores, axis=-1).astype(np.int32)
                names = np.array([str(i % 3).encode() for i in range(scores.size)], dtype=object).reshape(scores.shape)
                outputs = [
                    pb_utils.Tensor("PROB", scores),
                    pb_utils.Tensor("RANK", ranks),
                    pb_utils.Tensor("NAME", names),
                ]
                responses.append(pb_utils.InferenceResponse(outputs))
            return responses
"""

_MULTI = """
    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            self.version = int(args["model_version"])

        def execute(self, requests):
            answer = pb_utils.Tensor("VERSION", np.array([self.version], dtype=np.int32))
            return [pb_utils.InferenceResponse([answer]) for _ in requests]
"""

_RAISES = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    # The classes of the core are there once a model is initialised, not yet when its file is read for auto-completion.
    CODES = "INVALID_ARG", "NOT_FOUND", "UNAVAILABLE", "UNSUPPORTED", "ALREADY_EXISTS", "UNKNOWN", "CANCELLED"


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                kind = int(pb_utils.get_input_tensor_by_name(request, "KIND").as_numpy()[0])
                if kind == 1:
                    responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("no luck today")))
                elif 2 <= kind <= 8:
                    code = getattr(pb_utils.TritonError, CODES[kind - 2])
                    responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("no luck", code)))
                elif kind == 9:
                    raise ValueError("the model's own mistake")
                elif kind == 10:
                    raise pb_utils.TritonModelException("a model exception")
                elif kind == 11:
                    return []
                elif kind == 12:
                    responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OTHER", np.zeros(1, np.int32))]))
                elif kind == 13:
                    responses.append(pb_utils.InferenceResponse([]))
                elif kind == 14:
                    responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("DONE", np.zeros(1, np.float64))]))
                elif kind == 15:
                    responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("DONE", np.zeros((2, 2), np.int32))]))
                else:
                    responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("DONE", np.ones(1, np.int32))]))
            return responses
"""

_PARAMS = """
    import json

    import numpy as np
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                parameters = json.loads(request.parameters())
                said = [
                    request.request_id(),
                    str(request.correlation_id()),
                    str(request.flags()),
                    str(request.timeout()),
                    json.dumps(parameters, sort_keys=True),
                ]
                answer = np.array([s.encode() for s in said], dtype=object)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("SAID", answer)]))
            return responses
"""

_OPTIONAL = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            responses = []
            for request in requests:
                a = pb_utils.get_input_tensor_by_name(request, "A").as_numpy()
                b = pb_utils.get_input_tensor_by_name(request, "B")
                answer = a if b is None else a + b.as_numpy()
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("SUM", answer)]))
            return responses
"""


def _tensor(direction: str, name: str, data_type: str, dims: str, extra: str = "") -> str:
    return f'{direction} {{ name: "{name}" data_type: TYPE_{data_type} dims: {dims} {extra} }}\n'


def _config(*tensors: str, batch: int = 0, extra: str = "") -> str:
    instances = "instance_group { count: 1 kind: KIND_CPU }\n"
    return f'backend: "python"\nmax_batch_size: {batch}\n{instances}{extra}{"".join(tensors)}'


def _every_type() -> str:
    inputs = [_tensor("input", f"IN_{d}", d, "[ -1 ]", "optional: true") for d in DATATYPES]
    outputs = [_tensor("output", f"OUT_{d}", d, "[ -1 ]") for d in DATATYPES]
    return _config(*inputs, _tensor("input", "IN_BF16", "BF16", "[ -1 ]", "optional: true"), *outputs)


_ADD_SUB_CONFIG = _config(
    *(_tensor("input", f"INPUT{i}", "INT32", "[ 4 ]") for i in (0, 1)),
    *(_tensor("output", f"OUTPUT{i}", "INT32", "[ 4 ]") for i in (0, 1)),
    batch=8,
    extra="dynamic_batching { }\n",
)

# name → config.pbtxt, model.py, versions, further files
MODELS: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {
    "add_sub": (_ADD_SUB_CONFIG, _ADD_SUB, ("1",), {}),
    "counted": (_ADD_SUB_CONFIG, _ADD_SUB, ("1",), {}),  # asked only by the cases about statistics
    "identity_fp32": (
        _config(_tensor("input", "IN", "FP32", "[ -1 ]"), _tensor("output", "OUT", "FP32", "[ -1 ]")),
        _IDENTITY,
        ("1",),
        {},
    ),
    "identity_bytes": (
        _config(_tensor("input", "IN", "STRING", "[ -1 ]"), _tensor("output", "OUT", "STRING", "[ -1 ]"), batch=4),
        _IDENTITY,
        ("1",),
        {},
    ),
    "every_type": (_every_type(), _IDENTITY, ("1",), {}),
    "classifier": (
        _config(
            _tensor("input", "SCORES", "FP32", "[ 5 ]"),
            _tensor("output", "PROB", "FP32", "[ 5 ]", 'label_filename: "labels.txt"'),
            _tensor("output", "RANK", "INT32", "[ 5 ]"),
            _tensor("output", "NAME", "STRING", "[ 5 ]"),
            batch=4,
        ),
        _CLASSIFIER,
        ("1",),
        {"labels.txt": "ant\nbee\ncat\n"},  # shorter than the output: the last classes have no label
    ),
    "matrix": (
        _config(_tensor("input", "IN", "FP64", "[ 2, 3 ]"), _tensor("output", "OUT", "FP64", "[ 2, 3 ]")),
        _IDENTITY,
        ("1",),
        {},
    ),
    "scalar": (
        _config(
            _tensor("input", "IN", "INT64", "[ 1 ]", "reshape { shape: [ ] }"),
            _tensor("output", "OUT", "INT64", "[ 1 ]", "reshape { shape: [ ] }"),
            batch=4,
        ),
        _IDENTITY,
        ("1",),
        {},
    ),
    "multi": (
        _config(
            _tensor("input", "IN", "INT32", "[ 1 ]"),
            _tensor("output", "VERSION", "INT32", "[ 1 ]"),
            extra="version_policy { specific { versions: [ 1, 3 ] } }\n",
        ),
        _MULTI,
        ("1", "2", "3"),
        {},
    ),
    "untouched": (  # never asked, so that its statistics are zero
        _config(
            _tensor("input", "IN", "INT32", "[ 1 ]"),
            _tensor("output", "VERSION", "INT32", "[ 1 ]"),
            extra="version_policy { all { } }\n",
        ),
        _MULTI,
        ("1", "2"),
        {},
    ),
    "raises": (
        _config(_tensor("input", "KIND", "INT32", "[ 1 ]"), _tensor("output", "DONE", "INT32", "[ 1 ]")),
        _RAISES,
        ("1",),
        {},
    ),
    "params": (
        _config(_tensor("input", "IN", "INT32", "[ 1 ]"), _tensor("output", "SAID", "STRING", "[ -1 ]")),
        _PARAMS,
        ("1",),
        {},
    ),
    "optional": (
        _config(
            _tensor("input", "A", "INT32", "[ -1 ]"),
            _tensor("input", "B", "INT32", "[ -1 ]", "optional: true"),
            _tensor("output", "SUM", "INT32", "[ -1 ]"),
        ),
        _OPTIONAL,
        ("1",),
        {},
    ),
    "on_demand": (
        _config(_tensor("input", "IN", "INT32", "[ 1 ]"), _tensor("output", "VERSION", "INT32", "[ 1 ]")),
        _MULTI,
        ("1", "2"),
        {},
    ),
    "broken_code": (
        _config(_tensor("input", "IN", "INT32", "[ 1 ]"), _tensor("output", "OUT", "INT32", "[ 1 ]")),
        "raise RuntimeError('cannot start')\n",
        ("1",),
        {},
    ),
    "no_version": (
        _config(_tensor("input", "IN", "INT32", "[ 1 ]"), _tensor("output", "OUT", "INT32", "[ 1 ]")),
        _IDENTITY,
        (),
        {},
    ),
    "bad_config": ("max_batch_size: many\n", _IDENTITY, ("1",), {}),
    "other_name": ('name: "not_this"\n' + _config(), _IDENTITY, ("1",), {}),
}


ALL_MODELS = {**ENSEMBLE_MODELS, **CACHE_MODELS, **SEQUENCE_MODELS, **MODELS}


def write_repository(folder: Path, names: tuple[str, ...] | None = None) -> Path:
    """Writes the models called `names` (all of them where None) under `folder`, and returns it."""
    for name in names or tuple(MODELS):
        config, code, versions, files = ALL_MODELS[name]
        model = folder / name
        model.mkdir(parents=True)
        (model / "config.pbtxt").write_text(config)
        for filename, text in files.items():
            (model / filename).write_text(text)
        for version in versions:
            (model / version).mkdir()
            if code is not None:
                (model / version / "model.py").write_text(dedent(code).lstrip("\n"))
    return folder
