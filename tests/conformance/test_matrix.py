"""The same inputs give the same outputs: every protocol, every way of batching, every place to run.

One server with all the models; one client of each kind. Expected values are computed here, with numpy.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from doorstep.testing.onnx_models import save_model
from doorstep.testing.server import ServerProcess

sys.path.insert(0, str(Path(__file__).parent))

from transports import HALVES, NAMES, NUMPY, Answer, Array, Refused, Transport, connect

pytestmark = pytest.mark.xdist_group("matrix")

DATATYPES = tuple(name for name in NUMPY if name not in HALVES)
ONNX_TYPES = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16, "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8, "INT16": TensorProto.INT16, "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64, "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
HINTS = {
    name: "np.object_" if name == "BYTES" else "ml_dtypes.bfloat16" if name == "BF16" else f"np.{np.dtype(t).name}"
    for name, t in NUMPY.items()
}
HINTS["BOOL"] = "np.bool_"

# How a model batches: what config.pbtxt says of it.
BATCHING = {
    "alone": "max_batch_size: 0",
    "plain": "max_batch_size: 8",
    "dynamic": "max_batch_size: 8\ndynamic_batching { }",
}
# Where and with what it runs; the worker processes are few, because each has to start.
RUNS: dict[str, tuple[str, str]] = {  # name → (backend, execution)
    "onnx-inline": ("onnxruntime", "inline"),
    "onnx-thread": ("onnxruntime", "thread"),
    "onnx-process": ("onnxruntime", "process"),
    "identity-inline": ("identity", "inline"),
    "identity-thread": ("identity", "thread"),
    "identity-process": ("identity", "process"),
    "doorstep": ("python", "process"),
    "triton": ("python", "process"),
}
COPIES = [
    f"{run}-{batching}"
    for run in RUNS
    for batching in BATCHING
    if not (run in ("onnx-process", "identity-process", "triton") and batching == "plain")
]

# Models of one tensor, for raw requests.
SINGLES = [
    *((kind, run) for run in ("onnx-inline", "identity-thread") for kind in DATATYPES),
    ("FP32", "doorstep"), ("BYTES", "doorstep"),
]  # fmt: skip


def config_of(name: str, run: str, batching: str, datatypes: tuple[str, ...]) -> str:
    backend, execution = RUNS[run]
    dims = 1 if datatypes == ("BYTES",) else -1  # a raw request can carry one string, and only to dims: [1]
    lines = [f'name: "{name}"', f'backend: "{backend}"', BATCHING[batching]]
    if backend != "python":
        lines.append(f'parameters {{ key: "execution" value {{ string_value: "{execution}" }} }}')
    for kind in datatypes:
        config_type = "TYPE_STRING" if kind == "BYTES" else f"TYPE_{kind}"
        lines.append(f'input {{ name: "x{kind}" data_type: {config_type} dims: {dims} }}')
        lines.append(f'output {{ name: "y{kind}" data_type: {config_type} dims: {dims} }}')
    return "\n".join(lines)


def save_copy(models: Path, name: str, run: str, batching: str, datatypes: tuple[str, ...]) -> None:
    """A model whose output y<datatype> is its input x<datatype>."""
    version = models / name / "1"
    version.mkdir(parents=True)
    (models / name / "config.pbtxt").write_text(config_of(name, run, batching, datatypes))
    if run.startswith("onnx"):
        shape = ["N"] if batching == "alone" else ["B", "N"]
        save_model(
            version / "model.onnx",
            [helper.make_node("Identity", [f"x{kind}"], [f"y{kind}"]) for kind in datatypes],
            [(f"x{kind}", ONNX_TYPES[kind], shape) for kind in datatypes],
            [(f"y{kind}", ONNX_TYPES[kind], shape) for kind in datatypes],
        )
    elif run == "doorstep":
        arguments = ", ".join(f"x{kind}: npt.NDArray[{HINTS[kind]}]" for kind in datatypes)
        results = ", ".join(f'"y{kind}": x{kind}' for kind in datatypes)
        (version / "model.py").write_text(
            "import doorstep, ml_dtypes\nimport numpy as np\nimport numpy.typing as npt\n\n"
            "class Model(doorstep.Model):\n"
            f"    max_batch_size = {0 if batching == 'alone' else 8}\n\n"
            f"    def predict(self, {arguments}) -> dict:\n        return {{{results}}}\n"
        )
    elif run == "triton":
        (version / "model.py").write_text(
            "import triton_python_backend_utils as pb_utils\n\n"
            "def renamed(t):\n"
            "    name = 'y' + t.name()[1:]\n"
            "    if t.triton_dtype() == 14:  # numpy has no bfloat16\n"
            "        return pb_utils.Tensor.from_dlpack(name, t.to_dlpack())\n"
            "    return pb_utils.Tensor(name, t.as_numpy())\n\n"
            "class TritonPythonModel:\n"
            "    def execute(self, requests):\n"
            "        return [\n"
            "            pb_utils.InferenceResponse([\n"
            "                renamed(t)\n"
            "                for t in request.inputs()\n"
            "                if 'y' + t.name()[1:] in request.requested_output_names()\n"
            "            ])\n"
            "            for request in requests\n"
            "        ]\n"
        )


DOORSTEP_ODD = """
import doorstep
import numpy as np

class Model(doorstep.Model):
    outputs = {"total": int, "words": list[str], "scale": float}

    def predict(self, a: int, words: list[str], b: int = 10, scale: float | None = None):
        return {"total": a + b, "words": [w.upper() for w in words], "scale": -1.0 if scale is None else scale * 2}
"""
TRITON_ODD = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            get = lambda name: pb_utils.get_input_tensor_by_name(request, name)
            a, b, scale = get("a"), get("b"), get("scale")
            total = a.as_numpy() + (10 if b is None else b.as_numpy())
            words = np.array([w.decode().upper() for w in get("words").as_numpy()], dtype=np.object_)
            scale = np.array([-1.0]) if scale is None else scale.as_numpy() * 2
            responses.append(pb_utils.InferenceResponse([
                pb_utils.Tensor("total", total), pb_utils.Tensor("words", words), pb_utils.Tensor("scale", scale),
            ]))
        return responses
"""
ODD_CONFIG = """
backend: "python"
input { name: "a" data_type: TYPE_INT64 dims: 1 }
input { name: "words" data_type: TYPE_STRING dims: -1 }
input { name: "b" data_type: TYPE_INT64 dims: 1 optional: true }
input { name: "scale" data_type: TYPE_FP64 dims: 1 optional: true }
output { name: "total" data_type: TYPE_INT64 dims: 1 }
output { name: "words" data_type: TYPE_STRING dims: -1 }
output { name: "scale" data_type: TYPE_FP64 dims: 1 }
"""
# The wire has one more dimension than the model, or one less: `reshape`.
RESHAPE_CONFIG = """
name: "{name}" backend: "onnxruntime" max_batch_size: {rows}
input {{ name: "x" data_type: TYPE_FP32 dims: [ 2, 3 ] reshape: {{ shape: [ 6 ] }} }}
input {{ name: "s" data_type: TYPE_FP32 dims: [ 1 ] reshape: {{ shape: [ ] }} }}
output {{ name: "y" data_type: TYPE_FP32 dims: [ 3, 2 ] reshape: {{ shape: [ 6 ] }} }}
output {{ name: "t" data_type: TYPE_FP32 dims: [ 1 ] reshape: {{ shape: [ ] }} }}
parameters {{ key: "execution" value {{ string_value: "{execution}" }} }}
"""
ECHO_REQUEST = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [pb_utils.InferenceResponse([pb_utils.Tensor("seen", np.array([json.dumps({
            "id": r.request_id(), "parameters": json.loads(r.parameters()), "outputs": r.requested_output_names(),
        })], dtype=np.object_))]) for r in requests]
"""


def save_models(models: Path) -> None:
    for copy in COPIES:
        run, batching = copy.rsplit("-", 1)
        save_copy(models, copy, run, batching, DATATYPES)
    for run in ("onnx-inline", "onnx-thread", "identity-inline", "doorstep", "triton"):
        save_copy(models, f"halves-{run}", run, "dynamic", HALVES)
    for kind, run in SINGLES:
        save_copy(models, f"{kind}-{run}", run, "alone", (kind,))
    for name, source in {"doorstep-odd": DOORSTEP_ODD, "triton-odd": TRITON_ODD}.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "model.py").write_text(source)
        (models / name / "config.pbtxt").write_text(f'name: "{name}"\n{ODD_CONFIG}')
    for name, rows, execution in (("reshape", 0, "thread"), ("reshape-rows", 4, "inline")):
        rank = ["B"] if rows else []
        save_model(
            models / name / "1" / "model.onnx",
            [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Add", ["s", "s"], ["t"])],
            [("x", TensorProto.FLOAT, [*rank, 6]), ("s", TensorProto.FLOAT, rank)],
            [("y", TensorProto.FLOAT, [*rank, 6]), ("t", TensorProto.FLOAT, rank)],
        )
        (models / name / "config.pbtxt").write_text(RESHAPE_CONFIG.format(name=name, rows=rows, execution=execution))
    (models / "echo-request" / "1").mkdir(parents=True)
    (models / "echo-request" / "1" / "model.py").write_text(ECHO_REQUEST)
    (models / "echo-request" / "config.pbtxt").write_text(
        'backend: "python" input { name: "x" data_type: TYPE_INT32 dims: 1 }\n'
        'output { name: "seen" data_type: TYPE_STRING dims: 1 }'
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("matrix")
    save_models(models)
    with ServerProcess(models, "--model-load-thread-count=2") as found:
        yield found


@pytest.fixture(scope="module")
def transports(server: ServerProcess) -> Iterator[Callable[[str], Transport]]:
    made: dict[str, Transport] = {}

    def get(name: str) -> Transport:
        if name not in made:
            made[name] = connect(name, server)
        return made[name]

    yield get
    for transport in made.values():
        transport.close()


@pytest.fixture(params=NAMES)
def transport(request: pytest.FixtureRequest, transports: Callable[[str], Transport]) -> Transport:
    return transports(request.param)


@pytest.fixture(params=[name for name in NAMES if name != "http-raw"])
def any_inputs(request: pytest.FixtureRequest, transports: Callable[[str], Transport]) -> Transport:
    """The transports that carry more than one input."""
    return transports(request.param)


# Values

TEXTS = (b"", "é☃ \U0001f600".encode(), b"a" * 300, b'"\\\n\t', b"plain")
BLOBS = (b"", b"\x00\x01\xff\xfe", b"\xc3", bytes(range(256)) * 3, b"plain")


def values(kind: str, shape: tuple[int, ...], *, text: bool) -> Array:
    """As many values at the edges of the datatype as the shape holds."""
    size = int(np.prod(shape))
    dtype = np.dtype(NUMPY[kind])
    if kind == "BYTES":
        pool: Any = TEXTS if text else BLOBS
    elif kind == "BOOL":
        pool = (True, False, False)
    elif dtype.kind in "iu":
        pool = (np.iinfo(dtype).max, np.iinfo(dtype).min, 0, 1, 2)
    else:
        finfo = ml_dtypes.finfo(dtype)
        pool = (0.1, float(finfo.max), float(finfo.min), float(finfo.smallest_subnormal), -0.0, 1.5)
        pool = pool if text else (*pool, np.inf, -np.inf, np.nan)
    array = np.empty(size, dtype)
    array[:] = [pool[i % len(pool)] for i in range(size)]
    return array.reshape(shape)


def same(found: Array, expected: Array) -> bool:
    """Bit for bit, so that NaN is NaN and -0.0 is not 0.0."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return (
        found.tolist() == expected.tolist() if expected.dtype == np.object_ else found.tobytes() == expected.tobytes()
    )


def check(answer: Answer, expected: dict[str, Array]) -> None:
    assert set(answer.outputs) == set(expected)
    for name, array in expected.items():
        found = answer.outputs[name]
        assert same(found, array), f"{name}: {found.dtype}{found.shape} {found} instead of {array.dtype} {array}"


def copied(inputs: dict[str, Array]) -> dict[str, Array]:
    return {f"y{name[1:]}": array for name, array in inputs.items()}


@pytest.mark.parametrize("copy", COPIES)
def test_the_matrix_is_what_it_says(server: ServerProcess, copy: str) -> None:
    run, batching = copy.rsplit("-", 1)
    with urllib.request.urlopen(server.url(f"/v2/models/{copy}/config"), timeout=30) as answer:
        config = json.load(answer)
    assert (config["backend"], config["parameters"]["execution"]["string_value"]) == RUNS[run]
    # A doorstep.Model that has max_batch_size always batches.
    dynamic = batching == "dynamic" or (batching, run) == ("plain", "doorstep")
    assert (config["max_batch_size"] > 0, "dynamic_batching" in config) == (batching != "alone", dynamic)


# Every datatype, through every transport, wherever it runs


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("rows", [1, 5, 0], ids=["one", "several", "zero-size"])
def test_every_datatype_comes_back_as_it_went(any_inputs: Transport, copy: str, rows: int) -> None:
    """`rows` is the size of the free dimension; a model that batches gets two rows of it."""
    text = any_inputs.text_only or copy.startswith("onnx")  # onnxruntime's strings are text
    shape = (rows,) if copy.endswith("alone") else (2, rows)
    inputs = {
        f"x{kind}": values(kind, shape, text=text if kind == "BYTES" else any_inputs.text_only) for kind in DATATYPES
    }
    answer = any_inputs.infer(copy, inputs)
    check(answer, copied(inputs))
    assert answer.datatypes == {f"y{kind}": kind for kind in DATATYPES}
    assert (answer.model_name, answer.model_version) == (copy, "1")


@pytest.mark.parametrize("run", ["onnx-inline", "onnx-thread", "identity-inline", "doorstep", "triton"])
def test_half_precision_comes_back_as_it_went(any_inputs: Transport, run: str) -> None:
    inputs = {f"x{kind}": values(kind, (3, 9), text=False) for kind in HALVES}
    if any_inputs.halves:
        check(any_inputs.infer(f"halves-{run}", inputs), copied(inputs))
        empty = {name: array[:, :0] for name, array in inputs.items()}
        check(any_inputs.infer(f"halves-{run}", empty), copied(empty))
    elif any_inputs.name in ("http1-by-hand", "http2-json"):  # the others' clients refuse by themselves
        with pytest.raises(Refused, match=r"data via JSON is not supported. Please use the binary data format"):
            any_inputs.infer(f"halves-{run}", inputs)


@pytest.mark.parametrize(("kind", "run"), SINGLES)
def test_one_tensor_needs_no_more_than_its_bytes(transport: Transport, kind: str, run: str) -> None:
    if kind == "BYTES":
        for element in TEXTS:
            inputs = {"xBYTES": np.array([element], np.object_)}
            check(transport.infer(f"BYTES-{run}", inputs), copied(inputs))
    else:
        inputs = {f"x{kind}": values(kind, (4,), text=True)}
        check(transport.infer(f"{kind}-{run}", inputs), copied(inputs))


@pytest.mark.parametrize("run", ["onnx-inline", "onnx-thread", "onnx-process", "doorstep", "triton"])
def test_large_tensors_come_back_as_they_went(any_inputs: Transport, run: str) -> None:
    """Large enough for shared memory, several frames, and bodies that land in a buffer of their own."""
    inputs = {f"x{kind}": values(kind, (2, 3), text=True) for kind in DATATYPES}
    inputs["xFP32"] = np.arange(120_000, dtype=np.float32).reshape(2, 60_000)
    inputs["xBYTES"] = np.array([[b"long " * 20_000, b""], [b"short", b"x"]], np.object_)
    check(any_inputs.infer(f"{run}-dynamic", inputs), copied(inputs))


@pytest.mark.parametrize("copy", COPIES)
def test_only_the_requested_outputs_come(any_inputs: Transport, copy: str) -> None:
    shape = (2,) if copy.endswith("alone") else (1, 2)
    inputs = {f"x{kind}": values(kind, shape, text=True) for kind in DATATYPES}
    wanted = ("yBYTES", "yINT8")
    answer = any_inputs.infer(copy, inputs, outputs=wanted)
    check(answer, {name: inputs[f"x{name[1:]}"] for name in wanted})


@pytest.mark.parametrize("copy", [c for c in COPIES if not c.endswith("alone")])
def test_batches_up_to_the_largest_are_taken_and_larger_ones_refused(any_inputs: Transport, copy: str) -> None:
    for rows in (1, 7, 8):
        inputs = {f"x{kind}": values(kind, (rows, 3), text=True) for kind in DATATYPES}
        check(any_inputs.infer(copy, inputs), copied(inputs))
    inputs = {f"x{kind}": values(kind, (9, 3), text=True) for kind in DATATYPES}
    with pytest.raises(Refused, match=f"inference request batch-size must be <= 8 for '{copy}'"):
        any_inputs.infer(copy, inputs)


@pytest.mark.parametrize("copy", COPIES)
def test_requests_at_once_get_their_own_answers(server: ServerProcess, copy: str) -> None:
    """Whatever shares a batch, over whatever protocols, each client gets the rows it sent."""

    def client(name: str) -> None:
        transport = connect(name, server)
        try:
            for i in range(6):
                shape = (3,) if copy.endswith("alone") else (1 + i % 3, 3)
                inputs = {f"x{kind}": values(kind, shape, text=True) for kind in DATATYPES}
                inputs["xINT32"] = np.full(shape, hash((name, i)) % 2**31, np.int32)
                inputs["xBYTES"] = np.full(shape, f"{name} {i}".encode(), np.object_)
                check(transport.infer(copy, inputs, id=f"{name}-{i}"), copied(inputs))
        finally:
            transport.close()

    # The blocking tritonclient.http runs on gevent, which wants a thread of its own for each client, as here.
    names = ["http-binary", "grpc", "grpc-contents", "http1-by-hand"]
    with ThreadPoolExecutor(len(names)) as pool:
        for done in [pool.submit(client, name) for name in names]:
            done.result(60)


# Shapes, optional inputs, ids and parameters


def test_reshape_works_both_ways_and_scalars_travel_as_one_element(any_inputs: Transport) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    answer = any_inputs.infer("reshape", {"x": x, "s": np.array([1.5], np.float32)})
    check(answer, {"y": (x * 2).reshape(3, 2), "t": np.array([3.0], np.float32)})


@pytest.mark.parametrize("rows", [1, 3])
def test_reshape_leaves_the_batch_dimension_alone(any_inputs: Transport, rows: int) -> None:
    x = np.arange(6 * rows, dtype=np.float32).reshape(rows, 2, 3)
    s = np.arange(rows, dtype=np.float32).reshape(rows, 1)
    answer = any_inputs.infer("reshape-rows", {"x": x, "s": s})
    check(answer, {"y": (x * 2).reshape(rows, 3, 2), "t": s * 2})


@pytest.mark.parametrize("model", ["doorstep-odd", "triton-odd"])
@pytest.mark.parametrize("with_b", [False, True])
@pytest.mark.parametrize("with_scale", [False, True])
def test_optional_inputs_may_be_left_out(any_inputs: Transport, model: str, with_b: bool, with_scale: bool) -> None:
    inputs = {"a": np.array([5], np.int64), "words": np.array([b"one", "zw\u00f6".encode()], np.object_)}
    if with_b:
        inputs["b"] = np.array([100], np.int64)
    if with_scale:
        inputs["scale"] = np.array([1.25])
    answer = any_inputs.infer(model, inputs)
    check(
        answer,
        {
            "total": np.array([105 if with_b else 15], np.int64),
            "words": np.array([b"ONE", "ZW\u00d6".encode()], np.object_),
            "scale": np.array([2.5 if with_scale else -1.0]),
        },
    )


@pytest.mark.parametrize("model", ["doorstep-odd", "triton-odd"])
def test_an_empty_list_is_an_empty_tensor(any_inputs: Transport, model: str) -> None:
    answer = any_inputs.infer(model, {"a": np.array([5], np.int64), "words": np.empty(0, np.object_)})
    assert answer.outputs["words"].shape == (0,)


@pytest.mark.parametrize("model", ["doorstep-odd", "triton-odd"])
def test_a_missing_required_input_is_refused_in_the_same_words_everywhere(any_inputs: Transport, model: str) -> None:
    with pytest.raises(Refused) as refused:
        any_inputs.infer(model, {"a": np.array([5], np.int64)}, id="r1")
    assert refused.value.text == (
        "[request id: r1] expected number of inputs between 2 and 4 but got 1 inputs for model "
        f"'{model}'. Got input(s) ['a'], but missing required input(s) ['words']. Please provide all required input(s)."
    )
    assert refused.value.code in ("400", "INVALID_ARGUMENT", "")


@pytest.mark.parametrize(
    "copy", ["onnx-inline-alone", "onnx-process-dynamic", "identity-inline-plain", "doorstep-dynamic"]
)
def test_the_id_comes_back(any_inputs: Transport, copy: str) -> None:
    shape = (1,) if copy.endswith("alone") else (1, 1)
    inputs = {f"x{kind}": values(kind, shape, text=True) for kind in DATATYPES}
    assert any_inputs.infer(copy, inputs, id="id é/1").id == "id é/1"
    assert any_inputs.infer(copy, inputs).id == ""


def test_parameters_and_the_id_reach_the_model(any_inputs: Transport) -> None:
    sent = {"flag": True, "count": -3, "text": "é", "share": 0.25}
    answer = any_inputs.infer("echo-request", {"x": np.array([1], np.int32)}, id="abc", parameters=sent)
    seen = json.loads(answer.outputs["seen"][0])
    assert seen == {"id": "abc", "parameters": sent, "outputs": ["seen"]}


def test_an_unknown_model_is_refused_in_the_same_words_everywhere(transport: Transport) -> None:
    with pytest.raises(Refused) as refused:
        transport.infer("nowhere", {"x": np.array([1], np.int32)})
    assert refused.value.text == "Request for unknown model: 'nowhere' is not found"
    assert refused.value.code in ("404", "NOT_FOUND", "")


def test_the_server_logged_no_error(server: ServerProcess) -> None:
    """Runs last: nothing above may have troubled the server."""
    assert [line for line in server.logs().splitlines() if " ERROR " in line or "Traceback" in line] == []
