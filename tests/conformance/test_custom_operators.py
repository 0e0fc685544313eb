"""Operators of other libraries (model_operations) in onnxruntime, each in a server's own process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from onnx import TensorProto, helper

from doorstep.testing.server import ServerFailed, ServerProcess

CONFIG = 'backend: "onnxruntime"\nmodel_operations { op_library_filename: "operators.so" }\n'


def save_upper(models: Path) -> Path:
    """Upper case, by an operator that onnxruntime does not have; its config names the library."""
    graph = helper.make_graph(
        [helper.make_node("StringUpper", ["x"], ["y"], domain="ai.onnx.contrib")],
        "upper",
        [helper.make_tensor_value_info("x", TensorProto.STRING, ["N", 1])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, ["N", 1])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)]
    folder = models / "upper"
    (folder / "1").mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(folder / "1" / "model.onnx"))
    (folder / "config.pbtxt").write_text(CONFIG)
    return folder


def library_of_operators() -> Path:
    """onnxruntime_extensions' own. Its package is not imported: it turns protobuf to another implementation, for the
    whole process and all that it starts."""
    spec = importlib.util.find_spec("onnxruntime_extensions")
    assert spec is not None
    [folder] = spec.submodule_search_locations or []
    [library] = Path(folder).glob("_extensions_pydll*.so")
    return library


@pytest.mark.parametrize("beside", ["version", "model"])
def test_a_library_of_operators_beside_the_model_is_used(tmp_path: Path, beside: str) -> None:
    folder = save_upper(tmp_path)
    (folder / "1" if beside == "version" else folder).joinpath("operators.so").symlink_to(library_of_operators())
    words = np.array([[b"near"], [b"far"]], np.object_)
    with ServerProcess(tmp_path) as server:
        for module, address in ((httpclient, server.http), (grpcclient, server.grpc)):
            with module.InferenceServerClient(address) as client:
                x = module.InferInput("x", [2, 1], "BYTES")
                x.set_data_from_numpy(words)
                assert client.infer("upper", [x]).as_numpy("y").tolist() == [[b"NEAR"], [b"FAR"]]


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "there is no file 'operators.so'"), (b"not ELF", "'operators.so' is no library of onnxruntime operators")],
)
def test_a_library_that_is_missing_or_none_is_named(tmp_path: Path, content: bytes | None, text: str) -> None:
    folder = save_upper(tmp_path)
    if content is not None:
        (folder / "operators.so").write_bytes(content)
    with pytest.raises(ServerFailed) as failed, ServerProcess(tmp_path):
        pass
    assert "model_operations.op_library_filename[0]" in str(failed.value)
    assert text in str(failed.value)
