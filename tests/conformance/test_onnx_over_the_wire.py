"""ONNX models as a user has them: a file in a folder, with or without a config. Real clients, one server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from onnx import TensorProto, helper, numpy_helper

from doorstep.testing.onnx_models import save_adder, save_identity, save_model
from doorstep.testing.server import ServerFailed, ServerProcess

pytestmark = pytest.mark.xdist_group("onnx-over-the-wire")

FLOAT, STRING, INT64 = TensorProto.FLOAT, TensorProto.STRING, TensorProto.INT64


def save_classifier(folder: Path) -> None:
    """Four scores per row, as they came."""
    save_model(
        folder / "1" / "model.onnx",
        [helper.make_node("Identity", ["x"], ["scores"])],
        [("x", FLOAT, ["N", 4])],
        [("scores", FLOAT, ["N", 4])],
    )
    (folder / "config.pbtxt").write_text(
        "max_batch_size: 8\n"
        'input { name: "x" data_type: TYPE_FP32 dims: 4 }\n'
        'output { name: "scores" data_type: TYPE_FP32 dims: 4 label_filename: "labels.txt" }\n'
    )
    (folder / "labels.txt").write_text("cat\ndog\nbird\nfish\n")


def save_failing(folder: Path) -> None:
    """Fails at run time where the index is out of range."""
    save_model(
        folder / "1" / "model.onnx",
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [("i", INT64, ["N", 1])],
        [("y", FLOAT, ["N", 1])],
        [numpy_helper.from_array(np.array([10, 20, 30], np.float32), "table")],
    )


def save_external(path: Path) -> None:
    """Weights in a file of their own, beside the model."""
    save_adder(path, 5)
    model = onnx.load(str(path))
    onnx.save_model(model, str(path), save_as_external_data=True, location="weights.bin", size_threshold=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    models = tmp_path_factory.mktemp("onnx")
    save_adder(models / "bare" / "1" / "model.onnx", 1)
    for version in (1, 3, 12):
        save_adder(models / "versions" / str(version) / "model.onnx", version)
    (models / "versions" / "config.pbtxt").write_text("version_policy { specific { versions: [ 1, 12 ] } }")
    save_identity(models / "fixed" / "1" / "model.onnx", FLOAT, [2, 3])
    save_identity(models / "scalar" / "1" / "model.onnx", FLOAT, [])
    save_identity(models / "text" / "1" / "model.onnx", STRING, ["N", 2])
    save_adder(models / "renamed" / "1" / "net.onnx", 7)
    (models / "renamed" / "config.pbtxt").write_text('platform: "onnxruntime_onnx" default_model_filename: "net.onnx"')
    save_adder(models / "tuned" / "1" / "model.onnx", 2)
    (models / "tuned" / "config.pbtxt").write_text(
        'name: "tuned" backend: "onnxruntime" max_batch_size: 16\n'
        'input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'output { name: "y" data_type: TYPE_FP32 dims: [ 1 ] }\n'
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }\n'
        "optimization { graph { level: -1 } }\n"
    )
    save_classifier(models / "classifier")
    save_failing(models / "failing")
    save_external(models / "external" / "1" / "model.onnx")
    with ServerProcess(models) as found:
        yield found


def call(server: ServerProcess, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url(path), data), timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def tensor(name: str, datatype: str, shape: list[int], *data: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": list(data)}


def infer(server: ServerProcess, model: str, *inputs: dict[str, Any], **rest: Any) -> tuple[int, Any]:
    return call(server, f"/v2/models/{model}/infer", {"inputs": list(inputs), **rest})


# Without a config


def test_a_file_without_a_config_is_served_and_batches(server: ServerProcess) -> None:
    status, answer = infer(server, "bare", tensor("x", "FP32", [3, 1], 1, 2, 3))
    assert (status, answer["outputs"][0]) == (200, tensor("y", "FP32", [3, 1], 2.0, 3.0, 4.0))
    _, config = call(server, "/v2/models/bare/config")
    assert (config["backend"], config["max_batch_size"]) == ("onnxruntime", 4)
    assert [(i["name"], i["data_type"], i["dims"]) for i in config["input"]] == [("x", "TYPE_FP32", [1])]
    assert config["dynamic_batching"]["preferred_batch_size"] == [4]
    _, metadata = call(server, "/v2/models/bare")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 1]}]


def test_a_file_whose_first_dimension_is_fixed_does_not_batch(server: ServerProcess) -> None:
    _, config = call(server, "/v2/models/fixed/config")
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [2, 3])
    status, answer = infer(server, "fixed", tensor("x", "FP32", [2, 3], *range(6)))
    assert (status, answer["outputs"][0]["data"]) == (200, [0, 1, 2, 3, 4, 5])
    status, answer = infer(server, "fixed", tensor("x", "FP32", [1, 3], *range(3)))
    assert status == 400
    assert "unexpected shape for input 'x' for model 'fixed'. Expected [2,3], got [1,3]." in answer["error"]


def test_a_scalar_is_one_element_on_the_wire(server: ServerProcess) -> None:
    status, answer = infer(server, "scalar", tensor("x", "FP32", [1], 2.5))
    assert (status, answer["outputs"][0]) == (200, tensor("y", "FP32", [1], 2.5))
    _, config = call(server, "/v2/models/scalar/config")
    assert (config["input"][0]["dims"], config["input"][0]["reshape"]) == ([1], {"shape": []})


def test_text_passes_and_bytes_that_are_none_are_refused(server: ServerProcess) -> None:
    with httpclient.InferenceServerClient(server.http) as client:
        text = np.array([["é", ""], ["日本", "x" * 1000]], np.object_)
        result = client.infer("text", [httpclient.InferInput("x", [2, 2], "BYTES").set_data_from_numpy(text)])
        assert result.as_numpy("y").tolist() == [["é".encode(), b""], ["日本".encode(), b"x" * 1000]]
        bad = np.array([[b"\xff\xfe", b"ok"]], np.object_)
        with pytest.raises(Exception, match="not UTF-8"):
            client.infer("text", [httpclient.InferInput("x", [1, 2], "BYTES").set_data_from_numpy(bad)])


def test_weights_in_a_file_of_their_own_are_found(server: ServerProcess) -> None:
    assert infer(server, "external", tensor("x", "FP32", [1, 1], 1))[1]["outputs"][0]["data"] == [6.0]


# With one


def test_a_config_with_inputs_and_outputs_is_taken_as_it_is(server: ServerProcess) -> None:
    """As in Triton, dynamic batching is only added to what had to be completed."""
    _, config = call(server, "/v2/models/tuned/config")
    assert config["max_batch_size"] == 16
    assert "dynamic_batching" not in config
    assert config["parameters"]["intra_op_thread_count"] == {"string_value": "1"}
    assert infer(server, "tuned", tensor("x", "FP32", [16, 1], *range(16)))[1]["outputs"][0]["data"] == [
        float(i + 2) for i in range(16)
    ]


def test_tritons_platform_name_and_another_filename_work(server: ServerProcess) -> None:
    assert infer(server, "renamed", tensor("x", "FP32", [1, 1], 1))[1]["outputs"][0]["data"] == [8.0]
    _, config = call(server, "/v2/models/renamed/config")
    assert (config["platform"], config["backend"]) == ("onnxruntime_onnx", "onnxruntime")


def test_the_version_policy_says_which_versions_there_are(server: ServerProcess) -> None:
    assert call(server, "/v2/models/versions")[1]["versions"] == ["1", "12"]
    x = tensor("x", "FP32", [1, 1], 0)
    assert infer(server, "versions", x)[1]["outputs"][0]["data"] == [12.0], "the newest, unless another is named"
    for version in (1, 12):
        status, answer = call(server, f"/v2/models/versions/versions/{version}/infer", {"inputs": [x]})
        assert (status, answer["model_version"], answer["outputs"][0]["data"]) == (200, str(version), [float(version)])
    status, answer = call(server, "/v2/models/versions/versions/3/infer", {"inputs": [x]})
    assert (status, answer["error"]) == (404, "Request for unknown model: 'versions' version 3 is not found")
    with grpcclient.InferenceServerClient(server.grpc) as client:
        data = grpcclient.InferInput("x", [1, 1], "FP32").set_data_from_numpy(np.zeros((1, 1), np.float32))
        assert client.infer("versions", [data], model_version="1").as_numpy("y").tolist() == [[1.0]]


def test_classes_have_their_labels(server: ServerProcess) -> None:
    scores = np.array([[0.1, 0.7, 0.2, 0.0], [3.0, 1.0, 2.0, 4.0]], np.float32)
    with (
        httpclient.InferenceServerClient(server.http) as over_http,
        grpcclient.InferenceServerClient(server.grpc) as over_grpc,
    ):
        for client, module in ((over_http, httpclient), (over_grpc, grpcclient)):
            result = client.infer(
                "classifier",
                [module.InferInput("x", [2, 4], "FP32").set_data_from_numpy(scores)],
                outputs=[module.InferRequestedOutput("scores", class_count=2)],
            )
            assert result.as_numpy("scores").tolist() == [
                [b"0.700000:1:dog", b"0.200000:2:bird"],
                [b"4.000000:3:fish", b"3.000000:0:cat"],
            ]


# What goes wrong


def test_a_model_that_fails_says_why_and_goes_on(server: ServerProcess) -> None:
    status, answer = infer(server, "failing", tensor("i", "INT64", [1, 1], 7))
    assert status == 500
    assert answer["error"].startswith("onnx runtime error: ")
    assert "/" not in answer["error"].split(" ")[0]
    assert infer(server, "failing", tensor("i", "INT64", [1, 1], 2))[1]["outputs"][0]["data"] == [30.0]


def test_nan_and_infinity_are_no_errors(server: ServerProcess) -> None:
    with httpclient.InferenceServerClient(server.http) as client:
        x = np.array([[np.nan], [np.inf], [-np.inf]], np.float32)
        result = client.infer("bare", [httpclient.InferInput("x", [3, 1], "FP32").set_data_from_numpy(x)])
        assert np.array_equal(result.as_numpy("y"), x, equal_nan=True)


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        (
            'max_batch_size: 4\ninput { name: "x" data_type: TYPE_INT64 dims: [ 1 ] }\n'
            'output { name: "z" data_type: TYPE_FP32 dims: [ 1 ] }',
            ["unexpected datatype TYPE_INT64, the model file has TYPE_FP32", "unexpected inference output 'z'"],
        ),
        ("max_batch_size: -1 instance_group { count: -2 }", ["'max_batch_size' must be non-negative", "has count -2"]),
        ("dynamic_batch { }", ['config.pbtxt:1', "dynamic_batch"]),
        ('parameters { key: "intra_op_thread_count" value { string_value: "many" } }', ["cannot be 'many'"]),
        ("instance_group { kind: KIND_GPU gpus: [ 99 ] }", ["gpu"]),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_served_names_every_problem(tmp_path: Path, config: str, problems: list[str]) -> None:
    save_adder(tmp_path / "wrong" / "1" / "model.onnx", 1)
    (tmp_path / "wrong" / "config.pbtxt").write_text(config)
    with pytest.raises(ServerFailed) as caught, ServerProcess(tmp_path):
        pass
    text = str(caught.value)
    assert "ended with 1" in text
    for problem in problems:
        assert problem.lower() in text.lower()
    assert "Traceback" not in text
