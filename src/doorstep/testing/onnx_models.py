"""Small ONNX models for tests and examples, made with the `onnx` package. Knows no server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET = 17
_IR_VERSION = 8


def save_model(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: Any = ()) -> Path:
    """Writes an .onnx file; `inputs` and `outputs` are (name, TensorProto type, shape), str or None for free sizes."""
    graph = helper.make_graph(
        nodes,
        path.stem,
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        list(weights),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)])
    model.ir_version = _IR_VERSION
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def save_adder(path: Path, constant: float) -> Path:
    """y = x + constant, x of shape [N, 1]: one version can be told from another by its answer."""
    return save_model(
        path,
        [helper.make_node("Add", ["x", "c"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 1])],
        [("y", TensorProto.FLOAT, ["N", 1])],
        [numpy_helper.from_array(np.array([constant], np.float32), "c")],
    )


def save_identity(path: Path, element: int = TensorProto.FLOAT, shape: list[Any] | None = None) -> Path:
    shape = ["N", 4] if shape is None else shape
    return save_model(
        path, [helper.make_node("Identity", ["x"], ["y"])], [("x", element, shape)], [("y", element, shape)]
    )
