"""What can be wrong with a model's inputs and outputs as configured. Knows no file, no backend and no tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from doorstep.errors import Problem
from doorstep.types import BY_CONFIG_NUMBER

_MOST = 2**63 - 1


def check_tensors(proto: Any, *, partial: bool) -> Iterator[Problem]:
    """`partial`: the model's file may still supply what is missing. Texts are Triton's (model_config_utils.cc)."""
    seen: dict[str, dict[str, int]] = {"input": {}, "output": {}}
    for kind in ("input", "output"):
        for i, io in enumerate(getattr(proto, kind)):
            where = f"{kind}[{i}]"
            for problem in check_tensor(io, f"model {kind} ", where, proto, partial=partial):
                yield Problem(problem.where, f"{problem.what} for {proto.name}", problem.fix)
            if io.name and io.name in seen[kind]:
                what = f"model {kind} '{io.name}' is listed twice for {proto.name}"
                yield Problem(
                    f"{where}.name", what, f"{kind}[{seen[kind][io.name]}] has the name already; take one out"
                )
            seen[kind].setdefault(io.name, i)


def check_tensor(io: Any, prefix: str, where: str, proto: Any, *, partial: bool) -> Iterator[Problem]:
    if not io.name:
        yield Problem(where, f"{prefix}must specify 'name'", "")
        return
    named = f"{prefix}'{io.name}' "
    if io.data_type not in BY_CONFIG_NUMBER and not (partial and io.data_type == 0):
        known = ", ".join(d.config_name for d in BY_CONFIG_NUMBER.values())
        yield Problem(f"{where}.data_type", f"{named}must specify 'data_type'", f"one of {known}")
    if not io.dims and not partial:
        fix = "the shape without the batch dimension, -1 for any size: dims: [ 3, 224, 224 ]"
        yield Problem(f"{where}.dims", f"{named}must specify 'dims'", fix)
    yield from _check_dims(io, named, where, proto)
    if io.DESCRIPTOR.name == "ModelInput" and io.format in (io.FORMAT_NHWC, io.FORMAT_NCHW) and len(io.dims) != 3:
        yield Problem(f"{where}.format", "model input NHWC/NCHW require 3 dims", f"'{io.name}' has {len(io.dims)}")
    if proto.platform != "tensorrt_plan":
        if io.is_shape_tensor:
            yield Problem(
                f"{where}.is_shape_tensor", "shape tensors are only supported for TensorRT platform", "take it out"
            )
        if io.is_non_linear_format_io:
            what = "Non-linear IO format is only supported for the TensorRT platform"
            yield Problem(f"{where}.is_non_linear_format_io", what, "take it out")


def _check_dims(io: Any, named: str, where: str, proto: Any) -> Iterator[Problem]:
    good = True
    for d, dim in enumerate(io.dims):
        if dim < 1 and dim != -1:
            what = f"{named}dimension must be integer >= 1, or -1 to indicate a variable-size dimension"
            fix = "use -1 where any size, also none, may come" if dim == 0 else ""
            yield Problem(f"{where}.dims[{d}]", what, fix)
            good = False
    if good and element_count(io.dims) > _MOST:
        yield Problem(f"{where}.dims", f"element count for tensor '{io.name} dims' exceeds maximum size of {_MOST}")
        good = False
    if not io.HasField("reshape"):
        return
    shape = io.reshape.shape
    if not shape and proto.max_batch_size == 0:
        what = f"{named}cannot have empty reshape for non-batching model as scalar tensors are not supported"
        # dims [1] with an empty reshape is how completion writes an ONNX model's scalar, which can be served.
        if list(io.dims) != [1]:
            yield Problem(f"{where}.reshape", what, "give dims: [ 1 ] with an empty reshape, for a scalar")
            return
    for d, dim in enumerate(shape):
        if dim < 1 and dim != -1:
            what = f"{named}reshape dimensions must be integer >= 1, or -1 to indicate a variable-size dimension"
            yield Problem(f"{where}.reshape.shape[{d}]", what)
            good = False
    if good and io.dims:
        yield from _check_reshape(io.dims, shape, named, where)


def _check_reshape(dims: Sequence[int], shape: Sequence[int], named: str, where: str) -> Iterator[Problem]:
    """Between the variable dimensions, dims and reshape must have the same number of elements:
    [2, 4, -1, 6] may become [8, -1, 1, 6], since 2·4 = 8 and 6 = 1·6."""
    ours, theirs = _trunks(dims), _trunks(shape)
    written = f"dims {list(dims)} and reshape {list(shape)}"
    if len(ours) != len(theirs) and len(ours) > 1 and len(theirs) > 1:
        what = f"{named}has different number of variable-size dimensions for dims and reshape"
        yield Problem(f"{where}.reshape", what, f"{written} have {len(ours) - 1} and {len(theirs) - 1}")
    elif ours != theirs:
        between = " between the -1" if len(ours) > 1 else ""
        fix = f"{written} must have the same number of elements{between}"
        yield Problem(f"{where}.reshape", f"{named}has different size for dims and reshape", fix)


def _trunks(dims: Sequence[int]) -> list[int]:
    trunks = [1]
    for dim in dims:
        if dim == -1:
            trunks.append(1)
        else:
            trunks[-1] *= dim
    return trunks


def element_count(dims: Sequence[int]) -> int:
    """Elements of a shape; -1 if it has a variable dimension, 1 for a scalar."""
    count = 1
    for dim in dims:
        if dim == -1:
            return -1
        count *= dim
    return count
