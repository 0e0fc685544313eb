"""The onnxruntime backend: what it reads from a file, what it completes, and what it computes, against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from doorstep import proto
from doorstep.backends.base import CompletionContext, InstanceContext
from doorstep.backends.onnxruntime import OnnxBackend
from doorstep.backends.onnxruntime.header import NotOnnx, read_header
from doorstep.config.model import ModelConfig
from doorstep.errors import BackendError, ConfigError
from doorstep.request import Batch, InferenceRequest
from doorstep.types import BOOL, BYTES, FP16, FP32, INT64, Tensor, datatype_of
from doorstep.workers.sample import NOBODY

Value = tuple[str, int, list[Any] | None]


def save(folder: Path, nodes: list[Any], inputs: list[Value], outputs: list[Value], weights: Any = ()) -> Path:
    def info(value: Value) -> Any:
        return helper.make_tensor_value_info(*value)

    graph = helper.make_graph(nodes, "g", [info(v) for v in inputs], [info(v) for v in outputs], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "model.onnx"))
    return folder


def identity(folder: Path, element: int = TensorProto.FLOAT, shape: list[Any] | None = None) -> Path:
    shape = ["N", 4] if shape is None else shape
    return save(folder, [helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)])


def load(folder: Path, config: Any = None, **context: Any) -> Any:
    config = config or proto.ModelConfig()
    config.name = "m"
    OnnxBackend().complete_config(config, folder.parent, folder, CompletionContext())
    return OnnxBackend().load_instance(
        InstanceContext(ModelConfig.from_proto(config), "1", folder.parent, folder, threads=1, **context)
    )


def run(instance: Any, *requests: dict[str, Any]) -> list[Any]:
    made = []
    for arrays in requests:
        request = InferenceRequest("m", {n: Tensor(n, datatype_of(a), a) for n, a in arrays.items()}, NOBODY)
        request.rows = next(iter(arrays.values())).shape[0] if instance.config.max_batch_size else 1
        made.append(request)
    batch = Batch(made, sum(r.rows for r in made))
    instance.execute(batch)
    return [r if not isinstance(r, (list, tuple)) else {t.name: t for t in r} for r in batch.results]


def test_a_header_says_what_the_runtime_says(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "1",
        [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Not", ["b"], ["nb"])],
        [("x", TensorProto.FLOAT, ["batch", 3]), ("b", TensorProto.BOOL, [2, None])],
        [("y", TensorProto.FLOAT, ["batch", 5]), ("nb", TensorProto.BOOL, [2, "k"])],
        [onnx.numpy_helper.from_array(np.ones((3, 5), np.float32), "w")],
    )
    header = read_header(folder / "model.onnx")
    session = ort.InferenceSession(str(folder / "model.onnx"))
    for ours, theirs in ((header.inputs, session.get_inputs()), (header.outputs, session.get_outputs())):
        assert [v.name for v in ours] == [v.name for v in theirs]
        assert [v.shape for v in ours] == [tuple(d if isinstance(d, int) else -1 for d in v.shape) for v in theirs]
    assert [v.datatype for v in header.inputs] == [FP32, BOOL]


@pytest.mark.parametrize("content", [b"", b"not onnx at all, a text", b"\x08\x08\x3a\xff\x01", bytes(range(256))])
def test_a_file_that_is_no_model_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(NotOnnx):
        read_header(tmp_path / "model.onnx")
    config = proto.ModelConfig(name="m")
    with pytest.raises(ConfigError, match=r"model\.onnx"):
        OnnxBackend().complete_config(config, tmp_path, tmp_path, CompletionContext())


def test_every_prefix_of_a_model_is_refused_cleanly(tmp_path: Path) -> None:
    whole = (identity(tmp_path / "1") / "model.onnx").read_bytes()
    for size in range(1, len(whole) - 1):
        (tmp_path / "cut.onnx").write_bytes(whole[:size])
        try:
            header = read_header(tmp_path / "cut.onnx")
        except NotOnnx:
            continue
        assert [v.name for v in header.inputs] == ["x"]  # only trailing fields were lost


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "resnet.onnx").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"unable to find 'model\.onnx'.*resnet\.onnx"):
        OnnxBackend().complete_config(proto.ModelConfig(name="m"), tmp_path, tmp_path, CompletionContext())


def test_a_model_whose_tensors_all_have_a_free_first_dimension_batches(tmp_path: Path) -> None:
    config = proto.ModelConfig(name="m")
    OnnxBackend().complete_config(config, tmp_path, identity(tmp_path / "1"), CompletionContext())
    assert config.max_batch_size == 4
    assert list(config.input[0].dims) == [4]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


@pytest.mark.parametrize(("shape", "dims", "reshaped"), [([2, 4], [2, 4], False), ([], [1], True), ([4], [4], False)])
def test_other_models_do_not_batch(tmp_path: Path, shape: list[int], dims: list[int], reshaped: bool) -> None:
    config = proto.ModelConfig(name="m")
    OnnxBackend().complete_config(config, tmp_path, identity(tmp_path / "1", shape=shape), CompletionContext())
    assert (config.max_batch_size, list(config.input[0].dims)) == (0, dims)
    assert config.input[0].HasField("reshape") is reshaped


def test_what_the_user_wrote_is_kept_and_contradictions_are_all_named(tmp_path: Path) -> None:
    folder = identity(tmp_path / "1")
    config = proto.ModelConfig(name="m", max_batch_size=2)
    config.input.add(
        name="x",
        data_type=proto.ModelConfig.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name["TYPE_INT8"].number,
        dims=[5],
    )
    config.output.add(name="z", data_type=11, dims=[4])
    with pytest.raises(ConfigError) as caught:
        OnnxBackend().complete_config(config, tmp_path, folder, CompletionContext())
    text = str(caught.value)
    assert "TYPE_INT8" in text
    assert "dims [5]" in text
    assert "unexpected inference output 'z', allowed outputs are: y" in text


def test_a_batch_is_gathered_run_once_and_scattered(tmp_path: Path) -> None:
    instance = load(identity(tmp_path / "1"))
    a = np.arange(8, dtype=np.float32).reshape(2, 4)
    b = a[:1] + 100
    first, second = run(instance, {"x": a}, {"x": b})
    np.testing.assert_array_equal(first["y"].array, a)
    np.testing.assert_array_equal(second["y"].array, b)


@pytest.mark.parametrize(
    ("element", "array"),
    [
        (TensorProto.FLOAT16, np.array([1.5, -2, 0, 7], np.float16)),
        (TensorProto.DOUBLE, np.array([1e300, np.nan, np.inf, -0.0])),
        (TensorProto.INT8, np.array([-128, 0, 1, 127], np.int8)),
        (TensorProto.UINT64, np.array([0, 1, 2, 2**64 - 1], np.uint64)),
        (TensorProto.INT64, np.array([-(2**63), 0, 1, 2**63 - 1], np.int64)),
        (TensorProto.BOOL, np.array([True, False, True, True])),
        (TensorProto.BFLOAT16, np.array([1.5, -2, 0, 7], ml_dtypes.bfloat16)),
    ],
)
def test_every_kind_of_number_goes_through_unchanged(tmp_path: Path, element: int, array: Any) -> None:
    instance = load(identity(tmp_path / "1", element))
    (result,) = run(instance, {"x": array.reshape(1, 4)})
    assert result["y"].array.dtype == array.dtype
    assert result["y"].array.tobytes() == array.tobytes()


def test_strings_go_through_as_utf8_and_bad_bytes_are_refused(tmp_path: Path) -> None:
    instance = load(identity(tmp_path / "1", TensorProto.STRING))
    words = np.array([["née".encode(), b"", b"b", b"c"]], dtype=np.object_)
    (result,) = run(instance, {"x": words})
    assert result["y"].datatype is BYTES
    assert list(result["y"].array[0]) == list(words[0])
    with pytest.raises(BackendError, match="not UTF-8"):
        run(instance, {"x": np.array([[b"\xff", b"", b"", b""]], dtype=np.object_)})


def test_a_scalar_model_takes_one_element(tmp_path: Path) -> None:
    instance = load(identity(tmp_path / "1", TensorProto.FLOAT, []))
    (result,) = run(instance, {"x": np.array([3.5], np.float32)})
    assert result["y"].array.shape == (1,)
    assert result["y"].array[0] == 3.5


@pytest.mark.parametrize("dims", [[1], [1, 1]])
def test_a_scalar_may_be_written_as_ones(tmp_path: Path, dims: list[int]) -> None:
    folder = save(
        tmp_path / "1",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [("x", TensorProto.FLOAT, [])],
        [("y", TensorProto.FLOAT, [])],
    )
    config = proto.ModelConfig()
    for tensors, name in ((config.input, "x"), (config.output, "y")):
        tensors.add(name=name, data_type="TYPE_FP32", dims=dims)
    (result,) = run(load(folder, config), {"x": np.full(dims, 3.5, np.float32)})
    assert result["y"].array.shape == tuple(dims)
    assert result["y"].array.item() == 7
    config.input[0].dims[0] = 2
    with pytest.raises(ConfigError, match="do not fit the model file's shape"):
        load(folder, config)


def test_only_asked_for_outputs_are_computed_and_in_the_models_order(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "1",
        [helper.make_node("Identity", ["x"], ["a"]), helper.make_node("Neg", ["x"], ["b"])],
        [("x", TensorProto.FLOAT, ["N", 2])],
        [("a", TensorProto.FLOAT, ["N", 2]), ("b", TensorProto.FLOAT, ["N", 2])],
    )
    instance = load(folder)
    x = np.ones((1, 2), np.float32)
    request = InferenceRequest("m", {"x": Tensor("x", FP32, x)}, NOBODY, requested_outputs=("b",))
    batch = Batch([request], 1)
    instance.execute(batch)
    assert [t.name for t in batch.results[0]] == ["b"]  # type: ignore[union-attr]
    request.requested_outputs = ("b", "a")
    batch = Batch([request], 1)
    instance.execute(batch)
    assert [t.name for t in batch.results[0]] == ["a", "b"]  # type: ignore[union-attr]


def test_parameters_reach_the_session_and_bad_ones_are_named(tmp_path: Path) -> None:
    config = proto.ModelConfig()
    for name, value in (("intra_op_thread_count", "three"), ("execution_mode", "7"), ("enable_mem_arena", "maybe")):
        config.parameters[name].string_value = value
    config.optimization.graph.level = 9
    with pytest.raises(ConfigError) as caught:
        load(identity(tmp_path / "1"), config)
    for name in ("intra_op_thread_count", "execution_mode", "enable_mem_arena", "graph.level"):
        assert name in str(caught.value)
    good = proto.ModelConfig()
    good.parameters["enable_mem_pattern"].string_value = "0"
    good.parameters["memory.enable_memory_arena_shrinkage"].string_value = "cpu:0"
    (result,) = run(load(identity(tmp_path / "2"), good), {"x": np.ones((1, 4), np.float32)})
    assert result["y"].array.sum() == 4


def test_a_gpu_instance_without_a_gpu_says_what_to_do(tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ConfigError, match=r"KIND_GPU.*onnxruntime-gpu"):
        load(identity(tmp_path / "1"), kind="KIND_GPU")


def test_a_model_that_fails_says_why_without_paths(tmp_path: Path) -> None:
    folder = save(
        tmp_path / "1",
        [helper.make_node("Gather", ["table", "x"], ["y"])],
        [("x", TensorProto.INT64, ["N", 1])],
        [("y", TensorProto.FLOAT, ["N", 1])],
        [onnx.numpy_helper.from_array(np.ones((3,), np.float32), "table")],
    )
    instance = load(folder)
    with pytest.raises(BackendError, match="indices element out of data bounds") as caught:
        run(instance, {"x": np.array([[99]], np.int64)})
    assert str(tmp_path) not in str(caught.value)
    assert datatype_of(np.zeros(1, np.int64)) is INT64
    assert datatype_of(np.zeros(1, np.float16)) is FP16


def test_an_unloaded_instance_refuses(tmp_path: Path) -> None:
    instance = load(identity(tmp_path / "1"))
    instance.unload()
    with pytest.raises(BackendError, match="unloaded"):
        run(instance, {"x": np.ones((1, 4), np.float32)})
