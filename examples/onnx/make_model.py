"""Makes a small classifier as an ONNX file, where a model repository wants it: models/flowers/1/model.onnx.

    pip install onnx
    python make_model.py
    doorstep serve models
    doorstep infer flowers features=[[5.1,3.5,1.4,0.2],[6.7,3.0,5.2,2.3]]

There is no config: names, datatypes and shapes are read from the file, and so is that it takes batches.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Least squares on the iris data set: 4 measurements in cm → scores of setosa, versicolor, virginica.
WEIGHTS = np.array(
    [[0.066, -0.020, -0.046], [0.243, -0.446, 0.203], [-0.225, 0.221, 0.004], [-0.057, -0.494, 0.552]], np.float32
)
BIAS = np.array([0.118, 1.577, -0.695], np.float32)


def make_model(path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["features", "weights", "bias"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["species"], axis=1, keepdims=0),
        ],
        "flowers",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("species", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(BIAS, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "models")
    make_model(folder / "flowers" / "1" / "model.onnx")
    print(f"wrote {folder}/flowers/1/model.onnx")
