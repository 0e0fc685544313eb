"""Ragged batches (Triton's ragged_batching.md): requests of different sizes in one execution, over HTTP and gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

from doorstep.testing.onnx_models import save_model
from doorstep.testing.server import ServerFailed, ServerProcess

pytestmark = pytest.mark.xdist_group("ragged")

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
KINDS = {
    "count": "BATCH_ELEMENT_COUNT",
    "end": "BATCH_ACCUMULATED_ELEMENT_COUNT",
    "bounds": "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
    "longest": "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE",
    "shape": "BATCH_ITEM_SHAPE",
    "flat_shape": "BATCH_ITEM_SHAPE_FLATTEN",
}
# The requests wait for each other: only together they are the preferred size.
CONFIG = """
max_batch_size: 3
input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }
output { name: "doubled" data_type: TYPE_FP32 dims: [ -1 ] }
output { name: "count_" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "end_" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "start_" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "longest_" data_type: TYPE_INT64 dims: [ 1 ] }
output { name: "shape_" data_type: TYPE_INT32 dims: [ 1 ] }
output { name: "flat_shape_" data_type: TYPE_INT32 dims: [ 1 ] }
batch_output { target_name: "doubled" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "x" }
dynamic_batching { preferred_batch_size: [ 3 ] max_queue_delay_microseconds: 30000000 }
parameters { key: "execution" value { string_value: "inline" } }
""" + "".join(
    f'batch_input {{ kind: {kind} target_name: "{name}" source_input: "x" '
    f"data_type: {'TYPE_FP32' if name == 'longest' else 'TYPE_INT32'} }}\n"
    for name, kind in KINDS.items()
)


def save_ragged(folder: Path, config: str = CONFIG) -> None:
    """Doubles a flat vector, and gives back what the server says of it, a row per request."""
    column = numpy_helper.from_array(np.array([1], np.int64), "column")
    first = numpy_helper.from_array(np.array([0], np.int64), "first")
    before_last = numpy_helper.from_array(np.array([-1], np.int64), "before_last")
    save_model(
        folder / "1" / "model.onnx",
        [
            helper.make_node("Add", ["x", "x"], ["doubled"]),
            helper.make_node("Unsqueeze", ["count", "column"], ["count_"]),
            helper.make_node("Unsqueeze", ["end", "column"], ["end_"]),
            helper.make_node("Slice", ["bounds", "first", "before_last"], ["starts"]),
            helper.make_node("Unsqueeze", ["starts", "column"], ["start_"]),
            helper.make_node("Shape", ["longest"], ["longest_size"]),
            helper.make_node("Shape", ["count_"], ["rows_by_one"]),
            helper.make_node("Expand", ["longest_size", "rows_by_one"], ["longest_"]),
            helper.make_node("Identity", ["shape"], ["shape_"]),
            helper.make_node("Unsqueeze", ["flat_shape", "column"], ["flat_shape_"]),
        ],
        [
            ("x", FLOAT, ["N"]), ("count", INT32, ["R"]), ("end", INT32, ["R"]), ("bounds", INT32, ["B"]),
            ("longest", FLOAT, ["M"]), ("shape", INT32, ["R", 1]), ("flat_shape", INT32, ["R"]),
        ],
        [
            ("doubled", FLOAT, ["N"]), ("count_", INT32, ["R", 1]), ("end_", INT32, ["R", 1]),
            ("start_", INT32, ["R", 1]), ("longest_", INT64, ["R", 1]), ("shape_", INT32, ["R", 1]),
            ("flat_shape_", INT32, ["R", 1]),
        ],
        [column, first, before_last],
    )  # fmt: skip
    (folder / "config.pbtxt").write_text(config)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("models")
    save_ragged(models / "ragged")
    with ServerProcess(models) as process:
        yield process


Infer = Callable[[list[float]], Any]


@pytest.fixture(params=["http", "grpc"])
def infer(request: pytest.FixtureRequest, server: ServerProcess) -> Iterator[Infer]:
    module: Any = {"http": httpclient, "grpc": grpcclient}[request.param]
    port = server.http_port if request.param == "http" else server.grpc_port
    options = {"concurrency": 3} if request.param == "http" else {}
    with module.InferenceServerClient(f"127.0.0.1:{port}", **options) as client:

        def call(values: list[float]) -> Any:
            tensor = module.InferInput("x", [1, len(values)], "FP32")
            tensor.set_data_from_numpy(np.array([values], np.float32))
            return client.infer("ragged", [tensor])

        yield call


def test_requests_of_different_sizes_run_together_and_each_gets_its_own(infer: Infer) -> None:
    given = [[1.0, 2.0], [3.0, 4.0, 5.0], [6.0]]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(infer, given))
    spans = []
    for values, answer in zip(given, answers, strict=True):
        np.testing.assert_array_equal(answer.as_numpy("doubled"), [[2 * v for v in values]])
        said = {name: int(answer.as_numpy(name)[0, 0]) for name in
                ("count_", "start_", "end_", "longest_", "shape_", "flat_shape_")}  # fmt: skip
        assert said["count_"] == said["shape_"] == said["flat_shape_"] == len(values)
        assert said["longest_"] == 3
        spans.append((said["start_"], said["end_"]))
        assert said["end_"] - said["start_"] == len(values)
    spans.sort()
    assert spans[0][0] == 0
    assert spans[-1][1] == 6
    assert all(a[1] == b[0] for a, b in pairwise(spans))  # one after another, without a gap


def test_a_batch_of_one_execution(server: ServerProcess, infer: Infer) -> None:
    """The three ran in one execution, which only ragged batching allows."""
    with httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        before = client.get_inference_statistics("ragged")["model_stats"][0]
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(infer, [[1.0], [1.0, 2.0], [1.0, 2.0, 3.0]]))
        after = client.get_inference_statistics("ragged")["model_stats"][0]
    assert after["execution_count"] - before["execution_count"] == 1
    assert after["inference_count"] - before["inference_count"] == 3


def test_a_wrong_datatype_beside_good_ones_is_refused_alone(server: ServerProcess, infer: Infer) -> None:
    with httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}") as client:
        tensor = httpclient.InferInput("x", [1, 1], "INT32")
        tensor.set_data_from_numpy(np.array([[1]], np.int32))
        with pytest.raises(InferenceServerException, match="inference input 'x' data-type is 'INT32'"):
            client.infer("ragged", [tensor])
        described = httpclient.InferInput("count", [1], "INT32")
        described.set_data_from_numpy(np.array([1], np.int32))
        good = httpclient.InferInput("x", [1, 1], "FP32")
        good.set_data_from_numpy(np.array([[1]], np.float32))
        with pytest.raises(InferenceServerException, match="expected 1 inputs but got 2 inputs"):
            client.infer("ragged", [good, described])
    with ThreadPoolExecutor(3) as pool:
        assert [a.as_numpy("doubled").shape for a in pool.map(infer, [[1.0], [1.0] * 2, [1.0] * 3])] == [
            (1, 1), (1, 2), (1, 3)]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (('source_input: "x" data_type: TYPE_INT32', 'source_input: "nope" data_type: TYPE_INT32'),
         "unknown source input name 'nope'"),
        (("kind: BATCH_ELEMENT_COUNT", 'source_input: "x" kind: BATCH_ELEMENT_COUNT'),
         "batch input kind 'BATCH_ELEMENT_COUNT' expects 1 source input, got 2"),
        (("data_type: TYPE_FP32 }", "data_type: TYPE_INT64 }"),
         "batch input data type must be TYPE_INT32 or TYPE_FP32"),
        (('target_name: "doubled"', 'target_name: "trebled"'), "unknown target output name 'trebled'"),
        (("dims: [ -1 ] allow_ragged_batch: true", "dims: [ -1 ] allow_ragged_batch: true optional: true"),
         "ragged input 'x' cannot be optional"),
        (('target_name: "count"', 'target_name: "x"'), "batch input 'x' is also an input that clients send"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_refused_with_the_fields_name(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    assert change[0] in CONFIG
    save_ragged(tmp_path / "ragged", CONFIG.replace(*change, 1))
    with pytest.raises(ServerFailed) as failed, ServerProcess(tmp_path):
        pass
    assert expected in str(failed.value)


def test_a_model_file_whose_input_is_not_flat_is_refused(tmp_path: Path) -> None:
    save_model(
        tmp_path / "ragged" / "1" / "model.onnx",
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", FLOAT, ["N", "M"])],
        [("y", FLOAT, ["N", "M"])],
    )
    (tmp_path / "ragged" / "config.pbtxt").write_text(
        'max_batch_size: 2 input { name: "x" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [ -1 ] }'
    )
    with pytest.raises(ServerFailed) as failed, ServerProcess(tmp_path):
        pass
    assert "the model file's shape is [-1, -1], but a ragged input comes as one flat vector" in str(failed.value)
