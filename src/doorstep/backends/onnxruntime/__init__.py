"""The backend for ONNX models. Knows onnxruntime, and no queue, thread or protocol.

Plain `session.run` with numpy arrays is used on the CPU: binding inputs and outputs there costs more than it saves
(5.2 µs against 4.2 µs a run of a 16→64→3 MLP); on a GPU it would keep tensors on the device, which nothing asks for.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime as ort

from doorstep.backends.base import Backend, CompletionContext, InstanceContext, ModelInstance, TensorInstance
from doorstep.backends.onnxruntime.complete import complete, contradictions
from doorstep.backends.onnxruntime.header import ELEMENT_TYPES, NotOnnx, OnnxHeader, ValueInfo, read_header
from doorstep.backends.onnxruntime.options import providers, run_options, session_options
from doorstep.config.model import TensorSpec
from doorstep.errors import BackendError, ConfigError, DoorstepError, Problem
from doorstep.types import BF16, BYTES, DTYPES, Array, object_array

INLINE_BYTES = 8 * 1024 * 1024  # larger files are not worth trying on the event loop
_ORT_TYPES = {
    "tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(float16)": "FP16", "tensor(bfloat16)": "BF16",
    "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32", "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32", "tensor(uint64)": "UINT64",
    "tensor(bool)": "BOOL", "tensor(string)": "BYTES",
}  # fmt: skip


class OnnxBackend(Backend):
    name = "onnxruntime"
    default_filename = "model.onnx"

    def complete_config(
        self, proto: Any, model_directory: Path, version_directory: Path, context: CompletionContext
    ) -> None:
        path = self._file(version_directory, proto)
        header = self._header(path, proto.name)
        problems = complete(proto, header, context) or contradictions(proto, header)
        if problems:
            raise ConfigError(proto.name, problems)

    def load_instance(self, context: InstanceContext) -> ModelInstance:
        path = self._file(context.version_directory, context.config.proto)
        try:
            session = ort.InferenceSession(str(path), session_options(context), providers=providers(context))
        except DoorstepError:
            raise
        except Exception as error:  # onnxruntime has no common base of its own for what it raises
            raise BackendError(f"onnxruntime cannot load {path.name} of '{context.config.name}': {error}") from None
        return OnnxInstance(context, session)

    def may_run_inline(self, context: InstanceContext) -> bool:
        """Whether it is worth measuring: small files only, and no threads asked for."""
        if context.config.parameters.get("intra_op_thread_count", "0") not in ("", "0", "1"):
            return False
        folder = self._file(context.version_directory, context.config.proto).parent
        return sum(f.stat().st_size for f in folder.iterdir() if f.is_file()) <= INLINE_BYTES

    def _file(self, version_directory: Path, proto: Any) -> Path:
        path = version_directory / (proto.default_model_filename or self.default_filename)
        if path.is_dir():  # weights in files of their own, beside model.onnx
            path = path / self.default_filename
        if not path.is_file():  # a pipe would never end
            there = ", ".join(sorted(p.name for p in version_directory.iterdir())) or "nothing"
            raise ConfigError(
                proto.name,
                [
                    Problem(
                        f"{version_directory.name}/{path.name}",
                        f"unable to find '{path.name}' for model '{proto.name}'; the version's folder has {there}",
                        "rename the file, or set default_model_filename in config.pbtxt",
                    )
                ],
            )
        return path

    def _header(self, path: Path, name: str) -> OnnxHeader:
        try:
            header = read_header(path)
        except NotOnnx as error:
            raise ConfigError(name, [Problem(path.name, f"cannot be read as an ONNX model: {error}")]) from None
        if all(value.shape is not None for value in (*header.inputs, *header.outputs)):
            return header
        # The file leaves shapes to inference, which is the runtime's.
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendError(f"onnxruntime cannot load {path.name} of '{name}': {error}") from None
        return OnnxHeader(_values(session.get_inputs()), _values(session.get_outputs()))


def _values(nodes: Any) -> tuple[ValueInfo, ...]:
    return tuple(
        ValueInfo(
            node.name,
            DTYPES.get(_ORT_TYPES.get(node.type, "")),
            tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape),
        )
        for node in nodes
    )


class OnnxInstance(TensorInstance):
    def __init__(self, context: InstanceContext, session: ort.InferenceSession) -> None:
        super().__init__(context.config)
        self._run = _run_of(session)
        self._run_options = run_options(context)
        self._session: ort.InferenceSession | None = session
        self._strings = frozenset(n for n, s in context.config.inputs.items() if s.datatype is BYTES)
        self._has_bf16 = any(
            s.datatype is BF16 for s in (*context.config.inputs.values(), *context.config.outputs.values())
        )
        self._output_names: dict[tuple[str, ...], list[str]] = {}
        # Scalars of the model that the config writes as [1], [1, 1] …
        self._scalar_inputs = _written_longer(context.config.inputs, session.get_inputs())
        self._scalar_outputs = _written_longer(context.config.outputs, session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: tuple[str, ...]) -> Mapping[str, Array]:
        names = self._output_names.get(outputs)
        if names is None:
            names = self._output_names.setdefault(outputs, list(outputs))
        if self._strings:
            inputs = {n: _as_text(a) if n in self._strings else a for n, a in inputs.items()}
        if self._scalar_inputs:
            inputs = {n: a.reshape(()) if n in self._scalar_inputs else a for n, a in inputs.items()}
        try:
            if self._has_bf16:
                return self._run_with_ort_values(inputs, names)
            found = self._run(names, inputs, self._run_options)
        except BackendError:
            raise
        except Exception as error:
            raise BackendError(f"onnx runtime error: {_without_path(error)}") from None
        if self._scalar_outputs:
            shapes = self._scalar_outputs
            found = [np.reshape(a, shapes[n]) if n in shapes else a for n, a in zip(names, found, strict=True)]
        return dict(zip(names, found, strict=True))

    def _run_with_ort_values(self, inputs: Mapping[str, Array], names: list[str]) -> Mapping[str, Array]:
        """numpy has no bfloat16, so such tensors cross as 16-bit integers with onnxruntime told what they are."""
        assert self._session is not None
        bf16_number = next(number for number, datatype in ELEMENT_TYPES.items() if datatype is BF16)
        feed = {}
        for name, array in inputs.items():
            if array.dtype == BF16.numpy:
                raw = np.ascontiguousarray(array).view(np.uint16)
                feed[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, bf16_number)
            else:
                feed[name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        found = self._session.run_with_ort_values(names, feed, self._run_options)
        result = {}
        for name, value in zip(names, found, strict=True):
            array = value.numpy() if self.config.outputs[name].datatype is not BF16 else _bf16(value)
            result[name] = array
        return result

    def unload(self) -> None:
        self._session = None
        self._run = _unloaded


def _written_longer(specs: Mapping[str, TensorSpec], nodes: Any) -> dict[str, tuple[int, ...]]:
    """The model's scalars for which the config has dims: by their name, these dims."""
    scalars = [specs[node.name] for node in nodes if node.shape == [] and node.name in specs]
    dims = {spec.name: spec.dims if spec.reshape is None else spec.reshape for spec in scalars}
    return {name: shape for name, shape in dims.items() if shape}


def _run_of(session: ort.InferenceSession) -> Callable[..., Any]:
    """`session.run`, without its checks where they find nothing: on the CPU they look a second time, in Python, for
    missing inputs, and a small model pays as much for that as for its own work."""
    if session.get_providers() == ["CPUExecutionProvider"]:
        inner: Any = getattr(session, "_sess", session)
        run: Callable[..., Any] = inner.run
        return run
    return cast(Callable[..., Any], session.run)


def _bf16(value: ort.OrtValue) -> Array:
    """onnxruntime gives no numpy view of bfloat16, so its bytes are copied from where they lie."""
    shape = tuple(value.shape())
    size = math.prod(shape) * BF16.itemsize
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), dtype=BF16.numpy).reshape(shape)


def _unloaded(*_: object) -> Any:
    raise BackendError("the model has been unloaded")


def _as_text(array: Array) -> Array:
    """onnxruntime's strings are text: bytes are read as UTF-8."""
    try:
        flat = [v.decode() if isinstance(v, bytes) else str(v) for v in array.ravel()]
    except UnicodeDecodeError as error:
        raise BackendError(f"a string tensor is not UTF-8: {error.reason} at byte {error.start}") from None
    return object_array(flat, array.shape)


def _without_path(error: Exception) -> str:
    """onnxruntime's texts begin with a code and, sometimes, the place in its own sources."""
    text = str(error)
    marker = text.find("Status Message: ")
    return text[marker + len("Status Message: ") :] if marker >= 0 else text
