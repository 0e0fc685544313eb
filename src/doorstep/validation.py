"""Whether a request fits a model's config: names, datatypes, shapes, batch size, sizes. Knows no protocol and no queue.

The texts are Triton's (core, infer_request.cc), because its clients and their tests match on them; those that Triton
prefixes with `[request id: …]` are prefixed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np

from doorstep.config.model import ModelConfig, TensorSpec
from doorstep.errors import InvalidArgument
from doorstep.request import InferenceRequest
from doorstep.types import BYTES, DataType, Tensor

INT64_MAX = 2**63 - 1
MOST_DIMENSIONS = 64  # an array's; the product of a longer shape may have millions of digits, and is not looked at

# What a request calls by a name that is no datatype; it fits no model.
INVALID = DataType("<invalid>", "TYPE_INVALID", 0, np.dtype(np.void), 0)

# Marks an UnfitTensor, so that one comparison tells it from every tensor that can be right.
_UNFIT = DataType("<unfit>", "TYPE_INVALID", 0, np.dtype(np.void), 0)
_NO_DATA = np.empty(0, np.uint8)

_BATCH_NOTE = (
    "NOTE: Setting a non-zero max_batch_size in the model config requires a batch dimension to be prepended to each "
    "input shape. If you want to specify the full shape including the batch dim in your input dims config, try setting "
    "max_batch_size to zero. See the model configuration docs for more info on max_batch_size."
)
_SHAPES_KEPT = 256  # accepted shapes remembered per input


class UnfitTensor(Tensor):
    """An input whose data does not make an array of its declared datatype and shape.

    A codec puts it where the tensor would be, so that the errors a request can have are looked for in one order,
    whatever brought it. `byte_size` is what the data came to; BYTES data say in `problem` what is wrong with them, as
    a format string for the request's `prefix`, the input's `name` and the `model`'s. It never gets past `validate`.
    """

    __slots__ = ("byte_size", "declared", "declared_shape", "problem")

    def __init__(
        self, name: str, declared: DataType, declared_shape: Sequence[int], byte_size: int, problem: str = ""
    ) -> None:
        super().__init__(name, _UNFIT, _NO_DATA)
        self.declared = declared
        self.declared_shape = tuple(declared_shape)
        self.byte_size = byte_size
        self.problem = problem

    @property
    def shape(self) -> tuple[int, ...]:
        return self.declared_shape

    def __repr__(self) -> str:
        return f"<UnfitTensor {self.name} {self.declared} {list(self.declared_shape)} {self.byte_size} bytes>"


def request_prefix(request_id: str) -> str:
    """How Triton begins an error of one request."""
    return f"[request id: {request_id or '<id_unknown>'}] "


def shape_text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


class Validator:
    """The rules of one model version, made once. Touched only from the event loop."""

    __slots__ = ("_accepted", "_batches", "_config", "_count", "_outputs")

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._count = len(config.inputs) if len(config.required_inputs) == len(config.inputs) else -1
        self._batches = config.max_batch_size > 0
        self._outputs = config.outputs
        # Per input: its datatype and the wire shapes already found right, with the rows each makes.
        self._accepted: dict[str, tuple[DataType, dict[tuple[int, ...], int]]] = {
            name: (spec.datatype, {}) for name, spec in config.inputs.items()
        }

    def validate(self, request: InferenceRequest) -> None:
        """Sets `request.rows`, or raises InvalidArgument."""
        if request.requested_outputs:
            outputs = self._outputs
            for name in request.requested_outputs:
                if name not in outputs:
                    raise InvalidArgument(f"unexpected inference output '{name}' for model '{self._config.name}'")
        inputs = request.inputs
        if len(inputs) != self._count:
            self._check_count(request)
        accepted = self._accepted
        rows = 0
        for name, tensor in inputs.items():
            known = accepted.get(name)
            if known is None or tensor.datatype is not known[0]:
                break
            its_rows = known[1].get(tensor.array.shape)
            if its_rows is None or (its_rows != rows and rows):
                break
            rows = its_rows
        else:
            request.rows = rows or 1
            return
        self._validate_thoroughly(request)

    def _check_count(self, request: InferenceRequest) -> None:
        config = self._config
        got, most, least = len(request.inputs), len(config.inputs), len(config.required_inputs)
        if least <= got <= most:
            return
        missing = [f"'{name}'" for name in config.inputs if name in config.required_inputs - request.inputs.keys()]
        given = ",".join(f"'{name}'" for name in request.inputs)
        expected = (
            f"expected {most} inputs but got {got} inputs"
            if most == least
            else f"expected number of inputs between {least} and {most} but got {got} inputs"
        )
        # Triton writes a lone "]" where nothing is missing: it takes off the bracket it meant for a comma.
        missing_text = "[" + ",".join(missing) + "]" if missing else "]"
        raise InvalidArgument(
            f"{request_prefix(request.id)}{expected} for model '{config.name}'. Got input(s) [{given}], "
            f"but missing required input(s) {missing_text}. Please provide all required input(s)."
        )

    def _validate_thoroughly(self, request: InferenceRequest) -> None:
        """Every check in Triton's order; remembers the shapes that pass."""
        config = self._config
        prefix = request_prefix(request.id)
        for name in request.inputs:
            if name not in config.inputs:
                raise InvalidArgument(f"unexpected inference input '{name}' for model '{config.name}'")
        rows = self._rows(request, prefix) if self._batches else 0
        for name, tensor in request.inputs.items():
            spec = config.inputs[name]
            datatype = tensor.declared if isinstance(tensor, UnfitTensor) else tensor.datatype
            if datatype is not spec.datatype:
                raise InvalidArgument(
                    f"{prefix}inference input '{name}' data-type is '{datatype}', "
                    f"but model '{config.name}' expects '{spec.datatype}'"
                )
            self._check_shape(tensor, spec, prefix)
            batched = self._has_batch_dimension(spec)
            if isinstance(tensor, UnfitTensor) or (batched and rows == 0):
                self._check_size(tensor, spec, prefix, rows)
            if rows or not batched:
                shapes = self._accepted[name][1]
                if len(shapes) >= _SHAPES_KEPT:
                    shapes.clear()
                shapes[tensor.shape] = rows if batched else 0
        request.rows = rows if self._batches else 1

    def _has_batch_dimension(self, spec: TensorSpec) -> bool:
        return len(spec.shape) != len(spec.dims)

    def _rows(self, request: InferenceRequest, prefix: str) -> int:
        """The batch size that all inputs share."""
        config = self._config
        rows = 0
        for name, tensor in request.inputs.items():
            spec = config.inputs[name]
            if not self._has_batch_dimension(spec):
                continue
            if not tensor.shape:
                raise InvalidArgument(
                    f"{prefix}input '{name}' has no shape but model requires batch dimension for '{config.name}'"
                )
            if rows == 0:
                rows = tensor.shape[0]
            elif tensor.shape[0] != rows:
                raise InvalidArgument(
                    f"{prefix}input '{name}' batch size does not match other inputs for '{config.name}'"
                )
        if rows > config.max_batch_size or rows < 0:
            raise InvalidArgument(
                f"{prefix}inference request batch-size must be <= {config.max_batch_size} for '{config.name}'"
            )
        return rows

    def _check_shape(self, tensor: Tensor, spec: TensorSpec, prefix: str) -> None:
        model = self._config.name
        shape = tensor.shape
        start = 1 if self._has_batch_dimension(spec) else 0
        fits = len(shape) == len(spec.shape)
        if fits:
            for got, wanted in zip(shape[start:], spec.dims, strict=True):
                if got == -1:
                    raise InvalidArgument(
                        f"{prefix}All input dimensions should be specified for input '{spec.name}' "
                        f"for model '{model}', got {shape_text(shape)}"
                    )
                if wanted not in (-1, got):
                    fits = False
                    break
        if not fits:
            # Triton shows a batch dimension, and the note, wherever the model batches.
            expected = (-1, *spec.dims) if self._batches else spec.dims
            note = _BATCH_NOTE if self._batches else ""
            raise InvalidArgument(
                f"{prefix}unexpected shape for input '{spec.name}' for model '{model}'. "
                f"Expected {shape_text(expected)}, got {shape_text(shape)}. {note}"
            )

    def _check_size(self, tensor: Tensor, spec: TensorSpec, prefix: str, rows: int) -> None:
        """Raises what is wrong with data that do not fill their shape; a batch of zero rows may be right."""
        name, model = spec.name, self._config.name
        shape = tensor.shape
        if self._has_batch_dimension(spec) and rows == 0:
            shape = shape[1:]  # Triton leaves a batch size of zero out of the shape
        if any(dim < 0 for dim in shape):
            where = "dimension in shape" if spec.datatype is BYTES else "dimension"
            raise InvalidArgument(f"tensor '{name}' contains an invalid {where} {shape_text(shape)}")
        count = prod(shape)
        if count * max(spec.datatype.itemsize, 1) > INT64_MAX:
            what = "element count" if spec.datatype is BYTES else "byte size"
            raise InvalidArgument(f"{what} for tensor '{name}' exceeds maximum size of {INT64_MAX}")
        if isinstance(tensor, UnfitTensor):
            if tensor.problem:
                raise InvalidArgument(tensor.problem.format(prefix=prefix, name=name, model=model))
            got = tensor.byte_size
        else:
            got = tensor.array.nbytes
        if spec.datatype is BYTES:
            if count:
                raise InvalidArgument(
                    f"{prefix}expected {count} string elements for inference input '{name}' for model '{model}', got 0"
                )
        elif got != count * spec.datatype.itemsize:
            raise _size_mismatch(prefix, name, model, count * spec.datatype.itemsize, got)
        if isinstance(tensor, UnfitTensor):  # data beside zero rows: Triton would take them, and no array can hold them
            raise _size_mismatch(prefix, name, model, prod(tensor.shape) * spec.datatype.itemsize, got)


def _size_mismatch(prefix: str, name: str, model: str, expected: int, got: int) -> InvalidArgument:
    return InvalidArgument(
        f"{prefix}input byte size mismatch for input '{name}' for model '{model}'. Expected {expected}, got {got}"
    )
