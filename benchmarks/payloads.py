"""The requests that are sent, as files: JSON, JSON with binary tensors, gRPC messages. Knows no server."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc import service_pb2

from benchmarks.load import HttpBody
from benchmarks.models import IMAGE, MLP_INPUTS, TOKENS
from doorstep.types import Array


@dataclass(frozen=True, slots=True)
class Payloads:
    """One file a request; all are written once, before anything is measured."""

    mlp_json: HttpBody
    mlp_binary: HttpBody
    mlp_grpc: Path
    image_binary: HttpBody
    image_grpc: Path
    python_json: HttpBody
    python_grpc: Path
    python_image_grpc: Path
    minilm_binary: HttpBody


def write_payloads(folder: Path) -> Payloads:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    row = rng.standard_normal((1, MLP_INPUTS)).astype(np.float32).round(3)
    image = rng.standard_normal(IMAGE).astype(np.float32)
    tokens = np.random.default_rng(13).integers(1000, 20000, (1, TOKENS))
    return Payloads(
        mlp_json=_json(folder / "mlp.json", "input", row),
        mlp_binary=_binary(folder / "mlp.bin", {"input": row}),
        mlp_grpc=_grpc(folder / "mlp.grpc", "mlp", "input", row),
        image_binary=_binary(folder / "image.bin", {"INPUT0": image}),
        image_grpc=_grpc(folder / "image.grpc", "identity", "INPUT0", image),
        python_json=_json(folder / "python.json", "INPUT0", row),
        python_grpc=_grpc(folder / "python.grpc", "python_small", "INPUT0", row),
        python_image_grpc=_grpc(folder / "python_image.grpc", "python_large", "INPUT0", image),
        minilm_binary=_binary(
            folder / "minilm.bin",
            {
                "input_ids": tokens,
                "attention_mask": np.ones((1, TOKENS), np.int64),
                "token_type_ids": np.zeros((1, TOKENS), np.int64),
            },
        ),
    )


_NAMES = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64"}


def _json(path: Path, name: str, array: Array) -> HttpBody:
    data = [float(f"{x:.3f}") for x in array.ravel()]
    request = {"inputs": [{"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype], "data": data}]}
    path.write_text(json.dumps(request, separators=(",", ":")))
    return HttpBody(path)


def _binary(path: Path, arrays: dict[str, Array]) -> HttpBody:
    inputs = [
        {
            "name": name,
            "shape": list(array.shape),
            "datatype": _NAMES[array.dtype],
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in arrays.items()
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}, separators=(",", ":")).encode()
    path.write_bytes(head + b"".join(array.tobytes() for array in arrays.values()))
    return HttpBody(path, "application/octet-stream", len(head))


def _grpc(path: Path, model: str, name: str, array: Array) -> Path:
    request = service_pb2.ModelInferRequest(
        model_name=model,
        inputs=[
            service_pb2.ModelInferRequest.InferInputTensor(
                name=name, datatype=_NAMES[array.dtype], shape=list(array.shape)
            )
        ],
        raw_input_contents=[array.tobytes()],
    )
    message = request.SerializeToString()
    path.write_bytes(b"\0" + struct.pack(">I", len(message)) + message)
    return path
