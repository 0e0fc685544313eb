"""What a sequence model gets besides its inputs: controls and states. Knows no scheduler, no request and no backend.

They are tensors that the backend sees and the client never does: config.pbtxt's `control_input` and `state`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from doorstep.errors import Problem
from doorstep.types import BOOL, BY_CONFIG_NUMBER, BYTES, FP32, INT32, Array, DataType, object_array

INITIAL_STATE_DIRECTORY = "initial_state"
CORRELATION_TYPES = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")


@dataclass(frozen=True, slots=True)
class Control:
    """A tensor that says false or true in the model's own words."""

    kind: str  # START, READY, END
    name: str
    datatype: DataType
    false: float
    true: float


@dataclass(frozen=True, slots=True)
class State:
    """A tensor a model gives with one request of a sequence and gets back with the next."""

    input_name: str
    output_name: str
    datatype: DataType
    dims: tuple[int, ...]
    initial: Array  # with the batch dimension where the model batches


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    controls: tuple[Control, ...]
    correlation: tuple[str, DataType] | None  # the tensor that carries the correlation id
    states: tuple[State, ...]


def sequence_spec(proto: Any, files: Mapping[str, bytes] | None = None) -> SequenceSpec | None:
    """`proto` is checked; `files` has the bytes of data files by the name of the state's input."""
    if not proto.HasField("sequence_batching"):
        return None
    batching = proto.sequence_batching
    controls = []
    correlation = None
    for tensor in batching.control_input:
        for control in tensor.control:
            kind = control.Kind.Name(control.kind).removeprefix("CONTROL_SEQUENCE_")
            if kind == "CORRID":
                correlation = (tensor.name, BY_CONFIG_NUMBER[control.data_type])
            elif control.int32_false_true:
                controls.append(Control(kind, tensor.name, INT32, *control.int32_false_true))
            elif control.fp32_false_true:
                controls.append(Control(kind, tensor.name, FP32, *control.fp32_false_true))
            else:
                controls.append(Control(kind, tensor.name, BOOL, *control.bool_false_true))
    lead = (1,) if proto.max_batch_size > 0 else ()
    states: dict[str, State] = {}
    for state in batching.state:
        if state.input_name in states or any(s.output_name == state.output_name for s in states.values()):
            continue  # Triton keeps the first, and says so in its log
        datatype = BY_CONFIG_NUMBER[state.data_type]
        dims = tuple(state.dims)
        data = (files or {}).get(state.input_name, b"")
        if state.initial_state:
            initial = _initial(state.initial_state[0], datatype, lead, data)
        else:
            initial = _zeros(datatype, lead + tuple(1 if d == -1 else d for d in dims))
        states[state.input_name] = State(state.input_name, state.output_name, datatype, dims, initial)
    return SequenceSpec(tuple(controls), correlation, tuple(states.values()))


def _zeros(datatype: DataType, shape: tuple[int, ...]) -> Array:
    if datatype is BYTES:
        return object_array([b""] * math.prod(shape), shape)
    return np.zeros(shape, datatype.numpy)


def _initial(written: Any, datatype: DataType, lead: tuple[int, ...], data: bytes) -> Array:
    shape = lead + tuple(written.dims)
    if written.WhichOneof("state_data") != "data_file" or not data:
        return _zeros(datatype, shape)
    if datatype is BYTES:
        return object_array(_strings(data), shape)
    return np.frombuffer(data[: math.prod(shape) * datatype.itemsize], datatype.numpy).reshape(shape)


def _strings(data: bytes) -> list[bytes]:
    """As the V2 binary extension lays them out: a 4-byte little-endian length, then the bytes."""
    values = []
    at = 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or at + 4 > len(data):
            raise ValueError("a string goes past the end of the file")
        values.append(data[at + 4 : end])
        at = end
    return values


def read_initial_states(proto: Any, model_directory: Path) -> tuple[dict[str, bytes], list[Problem]]:
    """The data files of initial states by input name, and what is wrong with them."""
    found: dict[str, bytes] = {}
    problems: list[Problem] = []
    root = (model_directory / INITIAL_STATE_DIRECTORY).resolve()
    for i, state in enumerate(proto.sequence_batching.state):
        for n, initial in enumerate(state.initial_state[:1]):
            where = f"sequence_batching.state[{i}].initial_state[{n}].data_file"
            filename = initial.data_file
            if initial.WhichOneof("state_data") != "data_file" or initial.data_type not in BY_CONFIG_NUMBER:
                continue
            shown = f"{model_directory.name}/{INITIAL_STATE_DIRECTORY}/{filename}"
            path = (root / filename).resolve()
            if not path.is_relative_to(root):
                problems.append(Problem(where, f"initial state file '{shown}' is outside the model's folder for them"))
                continue
            try:
                data = path.read_bytes()
            except OSError as error:
                what = f"failed to open text file for read {shown}: {error.strerror}"
                problems.append(Problem(where, what, f"put the file in {model_directory.name}/initial_state/"))
                continue
            what = _misfit(initial, data)
            if what:
                problems.append(Problem(where, what))
            else:
                found[state.input_name] = data
    return found, problems


def _misfit(initial: Any, data: bytes) -> str:
    count = math.prod(initial.dims)
    datatype = BY_CONFIG_NUMBER[initial.data_type]
    if datatype is BYTES:
        try:
            got = len(_strings(data))
        except ValueError as error:
            return f"initial_state file {initial.data_file} is no list of strings: {error}"
        return "" if got == count else f"initial_state setting expects {count} strings, but the file has {got}"
    if len(data) < count * datatype.itemsize:
        return (
            f"initial_state setting expects {count * datatype.itemsize} bytes, but the data provided from "
            f"{initial.data_file}only has {len(data)} bytes."
        )
    return ""


def check_states(proto: Any) -> Iterator[Problem]:
    """What can be wrong with `state`; the texts are Triton's (sequence_batch_scheduler.cc)."""
    batching = proto.sequence_batching
    with_initial: set[str] = set()
    controls = {tensor.name for tensor in batching.control_input}
    inputs = {tensor.name for tensor in proto.input}
    for i, state in enumerate(batching.state):
        where = f"sequence_batching.state[{i}]"
        name = state.input_name
        for attribute in ("input_name", "output_name"):
            if not getattr(state, attribute):
                what = f"sequence batching state must specify '{attribute}' for {proto.name}"
                yield Problem(f"{where}.{attribute}", what)
        if name in controls or name in inputs:
            what = f"sequence batching state input '{name}' is also {'a control' if name in controls else 'an input'}"
            yield Problem(f"{where}.input_name", f"{what} of {proto.name}", "one tensor cannot be both")
        if state.data_type not in BY_CONFIG_NUMBER:
            yield Problem(f"{where}.data_type", f"sequence batching state '{name}' must specify 'data_type'")
        for d, dim in enumerate(state.dims):
            if dim < 1 and dim != -1:
                what = f"sequence batching state '{name}' dimension must be integer >= 1, or -1"
                yield Problem(f"{where}.dims[{d}]", what, "-1 is any size; it starts at 1")
        if len(state.initial_state) > 1:
            what = (
                f"initial_state field for state input '{name}' must contain exactly one or zero element. "
                f"Found '{len(state.initial_state)}' elements."
            )
            yield Problem(f"{where}.initial_state", what)
        elif state.initial_state:
            if name in with_initial:
                yield Problem(f"{where}.input_name", f"State input name '{name}' specified more than once.")
            with_initial.add(name)
            yield from _check_initial(state, state.initial_state[0], f"{where}.initial_state[0]")


def _check_initial(state: Any, initial: Any, where: str) -> Iterator[Problem]:
    name = state.input_name
    if initial.data_type != state.data_type:
        what = f"The data type used for 'initial_state' field of state '{name}' does not match the state data type."
        yield Problem(f"{where}.data_type", what)
    if not initial.name:
        yield Problem(f"{where}.name", f"Field 'name' must be set when using initial_state for state input '{name}'.")
    if len(initial.dims) != len(state.dims):
        what = (
            "Number of dimensions in 'initial_state' doesn't match the size of 'state' dimensions for state input "
            f"'{name}'. {len(initial.dims)} != {len(state.dims)}"
        )
        yield Problem(f"{where}.dims", what)
    else:
        for d, (got, wanted) in enumerate(zip(initial.dims, state.dims, strict=True)):
            if got == -1:
                what = f"'initial_state' field for state input name '{name}' contains variable dimensions."
                yield Problem(f"{where}.dims[{d}]", what)
            elif wanted not in (-1, got) or got < 0:
                what = f"'initial_state' dim for input name '{name}' doesn't match 'state' dim description. "
                yield Problem(f"{where}.dims[{d}]", f"{what}{got} != {wanted}")
    if initial.WhichOneof("state_data") is None:
        yield Problem(where, f"initial_state setting expects state'{name}' to have state_data set")
