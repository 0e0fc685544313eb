"""What an .onnx file says about its model's config: completes what the user left out, and finds what contradicts it.

Knows the config's message and the file's header; loads nothing. The rules are Triton's onnxruntime backend's: names,
datatypes and dims come from the file where the config lists no inputs (or no outputs); the model batches if every
tensor's first dimension is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from doorstep.backends.base import CompletionContext
from doorstep.backends.onnxruntime.header import OnnxHeader, ValueInfo
from doorstep.config.sequence import sequence_spec
from doorstep.errors import Problem
from doorstep.types import BY_CONFIG_NUMBER, DataType


def complete(proto: Any, header: OnnxHeader, context: CompletionContext) -> list[Problem]:
    """Fills `proto` in place. Returns what makes that impossible."""
    problems = [
        Problem(
            f"{kind} '{value.name}' in the model file",
            "its type has no name in the V2 protocol (only plain tensors of the 14 datatypes can be served)",
            "convert it inside the model",
        )
        for kind, values in (("input", header.inputs), ("output", header.outputs))
        for value in values
        if value.datatype is None
    ]
    if problems:
        return problems
    written = bool(proto.input and proto.output)  # a config with both is taken as it is
    if proto.max_batch_size == 0 and not proto.input and not proto.output and _all_batch(header):
        proto.max_batch_size = context.default_max_batch_size
    batches = proto.max_batch_size > 0
    sequence = _sequence_tensors(proto)
    if not proto.input:
        for value in header.inputs:
            if value.name not in sequence["input"]:
                _add(proto.input.add(), value, batches)
    if not proto.output:
        for value in header.outputs:
            if value.name not in sequence["output"]:
                _add(proto.output.add(), value, batches)
    if not written and proto.max_batch_size > 1 and proto.WhichOneof("scheduling_choice") is None:
        proto.dynamic_batching.SetInParent()
    return []


def _all_batch(header: OnnxHeader) -> bool:
    return all(value.shape and value.shape[0] == -1 for value in (*header.inputs, *header.outputs))


def _add(tensor: Any, value: ValueInfo, batches: bool) -> None:
    assert value.datatype is not None
    tensor.name = value.name
    tensor.data_type = value.datatype.config_number
    dims = list(value.shape or ())
    if batches:
        dims = dims[1:]
    if dims:
        tensor.dims.extend(dims)
    else:  # config.pbtxt has no way to say "no dimensions": one element, reshaped to none
        tensor.dims.append(1)
        tensor.reshape.SetInParent()


def contradictions(proto: Any, header: OnnxHeader) -> list[Problem]:
    """Where the config says something else than the file."""
    problems: list[Problem] = []
    for kind, tensors, values in (("input", proto.input, header.inputs), ("output", proto.output, header.outputs)):
        known = {value.name: value for value in values}
        for tensor in tensors:
            value = known.get(tensor.name)
            if value is None:
                problems.append(
                    Problem(
                        f"{kind} '{tensor.name}'",
                        f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {_names(known)}",
                        "use a name from the model file",
                    )
                )
                continue
            problems += _mismatch(proto, kind, tensor, value)
        sequence = _sequence_tensors(proto)[kind]
        problems += _sequence_problems(kind, sequence, known)
        if kind == "input":
            listed = {tensor.name for tensor in tensors} | {n for b in proto.batch_input for n in b.target_name}
            listed |= sequence.keys()
            problems += [
                Problem("input", f"the model file needs input '{name}', which the config does not list", "add it")
                for name in known
                if name not in listed
            ]
    return problems


def _sequence_tensors(proto: Any) -> dict[str, dict[str, DataType]]:
    """By "input" and "output": the tensors of the file that are a sequence's, not the client's."""
    found: dict[str, dict[str, DataType]] = {"input": {}, "output": {}}
    spec = sequence_spec(proto)
    if spec is not None:
        found["input"] = {control.name: control.datatype for control in spec.controls}
        if spec.correlation is not None:
            found["input"][spec.correlation[0]] = spec.correlation[1]
        for state in spec.states:
            found["input"][state.input_name] = found["output"][state.output_name] = state.datatype
    return found


def _sequence_problems(kind: str, tensors: dict[str, DataType], known: dict[str, ValueInfo]) -> Iterator[Problem]:
    for name, datatype in tensors.items():
        value = known.get(name)
        if value is None:
            what = f"configuration specified sequence control or state '{name}', but model does not provide that {kind}"
            yield Problem("sequence_batching", what, f"its {kind}s are {_names(known)}")
        elif value.datatype is not None and value.datatype is not datatype:
            what = (
                f"tensor '{name}': the model expects data-type {value.datatype.config_name} but the model "
                f"configuration specifies data-type {datatype.config_name}"
            )
            yield Problem("sequence_batching", what, "say it as the model file does")


def _mismatch(proto: Any, kind: str, tensor: Any, value: ValueInfo) -> list[Problem]:
    where = f"{kind} '{tensor.name}'"
    batches = proto.max_batch_size > 0
    problems = []
    asked = BY_CONFIG_NUMBER.get(tensor.data_type)
    if value.datatype is not None and asked is not value.datatype:
        problems.append(
            Problem(
                where,
                f"unexpected datatype {asked.config_name if asked else 'TYPE_INVALID'}, "
                f"the model file has {value.datatype.config_name}",
                f"set data_type: {value.datatype.config_name}",
            )
        )
    if value.shape is None:
        return problems
    dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
    full = ([-1] if batches and not tensor.is_shape_tensor else []) + dims
    if kind == "input" and tensor.allow_ragged_batch:
        if list(value.shape) != [-1]:
            what = f"the model file's shape is {list(value.shape)}, but a ragged input comes as one flat vector"
            fix = "give the model an input of shape [-1], or take allow_ragged_batch out"
            problems.append(Problem(where, what, fix))
        return problems
    if kind == "output" and any(tensor.name in described.target_name for described in proto.batch_output):
        return problems  # it is cut by an input's shape, whatever its own
    if value.shape == () and set(full) == {1}:
        return problems  # a scalar may be written as [1], [1, 1] …: the instance reshapes it (onnxruntime.cc)
    if len(full) != len(value.shape) or any(
        a != b and -1 not in (a, b) for a, b in zip(full, value.shape, strict=True)
    ):
        problems.append(
            Problem(
                where,
                f"dims {dims}{' with a batch dimension in front' if batches else ''} do not fit the model file's shape "
                f"{list(value.shape)}",
                "leave input and output out of config.pbtxt to have them filled in from the file",
            )
        )
    elif batches and value.shape and value.shape[0] > 0:
        problems.append(
            Problem(
                where,
                f"max_batch_size is set, but the model file fixes the first dimension to {value.shape[0]}",
                "set max_batch_size: 0 and put the whole shape into dims",
            )
        )
    return problems


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
