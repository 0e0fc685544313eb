"""What can be wrong with ragged batches as configured: allow_ragged_batch, batch_input, batch_output. Knows no tensor.

Texts are Triton's (model_config_utils.cc, ValidateBatchIO), but for what Triton finds only when a request comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from doorstep.errors import Problem


def check_ragged(proto: Any, *, partial: bool) -> Iterator[Problem]:
    """`partial`: inputs and outputs may still come from the model's file."""
    inputs = {tensor.name for tensor in proto.input}
    outputs = {tensor.name for tensor in proto.output}
    for i, tensor in enumerate(proto.input):
        if tensor.allow_ragged_batch:
            yield from _check_input(tensor, f"input[{i}]", proto)
    for i, described in enumerate(proto.batch_input):
        where = f"batch_input[{i}]"
        yield from _check_source(described, "input", where, inputs, partial=partial and not inputs)
        type_name = described.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number.get(described.data_type)
        if type_name is None or type_name.name not in ("TYPE_INT32", "TYPE_FP32"):
            yield Problem(f"{where}.data_type", "batch input data type must be TYPE_INT32 or TYPE_FP32")
        if not described.target_name:
            yield Problem(
                f"{where}.target_name", "batch input has no target, so the model would not get it", "name one"
            )
        for name in described.target_name:
            if name in inputs:
                what = f"batch input '{name}' is also an input that clients send"
                yield Problem(f"{where}.target_name", what, "take it out of 'input'; the server makes it")
    for i, described in enumerate(proto.batch_output):
        where = f"batch_output[{i}]"
        yield from _check_source(described, "output", where, inputs, partial=partial and not inputs)
        if len(described.target_name) != 1:
            what = f"batch output expects 1 target, got {len(described.target_name)}"
            yield Problem(f"{where}.target_name", what, "write a batch_output for each output")
        for name in described.target_name:
            if name not in outputs and not (partial and not outputs):
                yield Problem(f"{where}.target_name", f"unknown target output name '{name}'")


def _check_input(tensor: Any, where: str, proto: Any) -> Iterator[Problem]:
    if proto.max_batch_size == 0 and proto.input and proto.output:
        what = f"ragged input '{tensor.name}' needs a model that batches: max_batch_size is 0 for {proto.name}"
        yield Problem(f"{where}.allow_ragged_batch", what, "set max_batch_size, or take it out")
    if tensor.optional:
        what = f"ragged input '{tensor.name}' cannot be optional for {proto.name}"
        yield Problem(f"{where}.optional", what, "take one of the two out")


def _check_source(described: Any, kind: str, where: str, inputs: set[str], *, partial: bool) -> Iterator[Problem]:
    name = described.Kind.Name(described.kind) if described.kind in described.Kind.values() else str(described.kind)
    if not name.startswith("BATCH_"):
        yield Problem(f"{where}.kind", f"unknown batch {kind} kind '{name}'")
    if len(described.source_input) != 1:
        what = f"batch {kind} kind '{name}' expects 1 source input, got {len(described.source_input)}"
        yield Problem(f"{where}.source_input", what)
    for source in described.source_input:
        if source not in inputs and not partial:
            yield Problem(f"{where}.source_input", f"unknown source input name '{source}'")
