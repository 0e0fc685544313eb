"""Whether the models of an ensemble's steps fit together: tensors, types, shapes, batches, decoupled ones. Knows their
complete configs and nothing that runs.

Texts are Triton's (ensemble_utils.cc); it stops at the first, here all are told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from doorstep.errors import Problem
from doorstep.types import BY_CONFIG_NUMBER


@dataclass(slots=True)
class _Node:
    """An ensemble tensor, as the first who mentions it says it is."""

    model: str
    data_type: int
    dims: tuple[int, ...]
    full: tuple[int, ...]  # with the batch dimension, where there is one
    makers: list[str] = field(default_factory=list)  # the tensors it is made of
    step: int = -1  # that makes it
    decoupled: bool = False
    label: int = -1  # of the decoupled step whose responses it comes with; -1: not known yet


def check_ensemble_graph(proto: Any, configs: Mapping[tuple[str, str], Any]) -> Iterator[Problem]:
    """What is wrong with `proto`, whose own check found nothing. `configs`: (namespace, model) → complete config.

    Sets model_transaction_policy.decoupled as the steps make it."""
    shown = identifier(proto)
    batching = proto.max_batch_size > 0
    nodes: dict[str, _Node] = {}
    for io in (*proto.input, *proto.output):
        dims = tuple(io.reshape.shape if io.HasField("reshape") else io.dims)
        nodes.setdefault(io.name, _node(shown, io.data_type, dims, batching))
    found = False
    for index, step in enumerate(proto.ensemble_scheduling.step):
        where = f"ensemble_scheduling.step[{index}]"
        config = configs[step.model_namespace, step.model_name]
        for problem in _check_step(proto, shown, where, index, step, config, nodes):
            found = True
            yield problem
    if not found:
        yield from _check_decoupled(proto, shown, nodes)


def identifier(step: Any) -> str:
    """As Triton writes a model that may have a namespace; an ensemble's own is in its steps' business only."""
    name = step.model_name if hasattr(step, "model_name") else step.name
    namespace = getattr(step, "model_namespace", "")
    return f"{namespace}::{name}" if namespace else str(name)


def _node(model: str, data_type: int, dims: tuple[int, ...], batching: bool) -> _Node:
    return _Node(model, data_type, dims, (-1, *dims) if batching else dims)


def _check_step(
    proto: Any, shown: str, where: str, index: int, step: Any, config: Any, nodes: dict[str, _Node]
) -> Iterator[Problem]:
    model = identifier(step)
    if config.max_batch_size and config.max_batch_size < proto.max_batch_size:
        what = (
            f"ensemble {shown} allows maximum batch size {proto.max_batch_size}, but it contains model "
            f"{step.model_name} which only allows maximum batch size to be {config.max_batch_size}"
        )
        yield Problem("max_batch_size", what)
    batching = config.max_batch_size > 0
    known = {io.name: io for io in config.input}
    for name, tensor in step.input_map.items():
        io = known.get(name)
        if io is None:
            what = (
                f"in ensemble {shown}, ensemble tensor {tensor} is mapping to non-existing input {name} in model "
                f"{model}"
            )
            yield Problem(f"{where}.input_map", what)
            continue
        yield from _agree(shown, where, nodes, tensor, _node(model, io.data_type, tuple(io.dims), batching))
    for io in config.input:
        if io.name not in step.input_map and not io.optional:
            what = f"in ensemble {shown}, input {io.name} in model {model} is not mapped to any ensemble tensors"
            yield Problem(f"{where}.input_map", what)
    known = {io.name: io for io in config.output}
    for name, tensor in step.output_map.items():
        io = known.get(name)
        if io is None:
            what = (
                f"in ensemble {shown}, ensemble tensor {tensor} is mapped from non-existing output {name} in model "
                f"{step.model_name}"
            )
            yield Problem(f"{where}.output_map", what)
            continue
        yield from _agree(shown, where, nodes, tensor, _node(model, io.data_type, tuple(io.dims), batching))
        node = nodes[tensor]
        node.step = index
        node.decoupled = config.model_transaction_policy.decoupled
        node.makers = list(step.input_map.values())


def _agree(shown: str, where: str, nodes: dict[str, _Node], tensor: str, node: _Node) -> Iterator[Problem]:
    """Two who mention a tensor must mean the same; wildcards are looked at when a request comes."""
    other = nodes.setdefault(tensor, node)
    start = f"in ensemble {shown}, ensemble tensor {tensor}: inconsistent"
    if other.data_type != node.data_type:
        what = (
            f"{start} data type: {_type(other.data_type)} is inferred from model {other.model} while "
            f"{_type(node.data_type)} is inferred from model {node.model}"
        )
        yield Problem(where, what)
    elif not _fit(other.dims, node.dims) and not _fit(other.full, node.full):
        what = (
            f"{start} shape: {_dims(other.full)} is inferred from model {other.model} while {_dims(node.full)} is "
            f"inferred from model {node.model}"
        )
        yield Problem(where, what)


def _check_decoupled(proto: Any, shown: str, nodes: dict[str, _Node]) -> Iterator[Problem]:
    """Labels each tensor with the decoupled step that it comes from: those that are used together must agree."""
    for io in proto.input:
        nodes[io.name].label = 0
    labels: dict[int, int] = {}  # per decoupled step
    steps = proto.ensemble_scheduling.step
    left = {name for name, node in nodes.items() if node.label < 0}
    told: set[int] = set()
    grown = True
    while grown:
        grown = False
        for name in sorted(left):
            node = nodes[name]
            sources = {nodes[maker].label for maker in node.makers}
            if not sources or -1 in sources:
                continue
            if len(sources) > 1 and node.step not in told:
                told.add(node.step)
                step = f" (step {node.step}, model '{identifier(steps[node.step])}')"
                yield _mixed(shown, node.model, f"ensemble_scheduling.step[{node.step}]", step)
            node.label = labels.setdefault(node.step, len(labels) + 1) if node.decoupled else max(sources)
            left.discard(name)
            grown = True
    outputs = {nodes[io.name].label for io in proto.output}
    if len(outputs) > 1:
        yield _mixed(shown, shown, "output")
    proto.model_transaction_policy.decoupled = bool(labels)


def _mixed(shown: str, model: str, where: str, step: str = "") -> Problem:
    what = f"in ensemble {shown}, step of model '{model}' receives inputs originated from different decoupled models"
    return Problem(where, what + step)


def _fit(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _type(number: int) -> str:
    found = BY_CONFIG_NUMBER.get(number)
    return "TYPE_INVALID" if found is None else found.config_name


def _dims(dims: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, dims))}]"
