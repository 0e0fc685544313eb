"""An ensemble's steps and tensors, worked out once at load: who waits for what. Runs nothing and holds no request.

Tensors are numbered, so that a request's are a list. A `Plan` is what is left of the graph when only some outputs are
asked for; a `Binding` is what the models of the steps, as they are served now, add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from doorstep.backends.gather import to_backend
from doorstep.config.model import ModelConfig, TensorSpec
from doorstep.errors import DoorstepError
from doorstep.types import Array

Convert = Callable[[Array], Array]

_PLANS_KEPT = 64  # clients choose which outputs they ask for, and in which order


@dataclass(frozen=True, slots=True)
class Step:
    """One step as configured. Tensors are numbers."""

    index: int
    model: str  # as the serving map knows it: with its namespace, where there are any
    version: str  # "" is the newest
    inputs: tuple[tuple[str, int], ...]  # (the model's input, ensemble tensor)
    outputs: Mapping[str, int]  # the model's output → ensemble tensor
    taken: tuple[int, ...]  # its input tensors, each once

    def __repr__(self) -> str:
        return f"step {self.index}, model '{self.model}'"


@dataclass(slots=True)
class Plan:
    """The steps that the outputs asked for need."""

    steps: tuple[Step, ...]
    outputs: tuple[str, ...]  # in the config's order
    consumers: tuple[tuple[int, ...], ...]  # per tensor: the steps that take it
    missing: tuple[int, ...]  # per step: the tensors it waits for
    uses: tuple[int, ...]  # per tensor: how often it is taken, as an output of the ensemble included
    binding: Binding | None = field(default=None, repr=False)  # the last; good while the models are the same


class Graph:
    """See the module. Immutable but for the plans it remembers."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.tensors: dict[str, int] = {}
        for name in (*config.inputs, *config.outputs):
            self._number(name)
        self.steps = tuple(
            Step(
                index,
                step_model(step),
                _step_version(step),
                tuple((name, self._number(tensor)) for name, tensor in step.input_map.items()),
                {name: self._number(tensor) for name, tensor in step.output_map.items()},
                tuple({self._number(tensor): None for tensor in step.input_map.values()}),
            )
            for index, step in enumerate(config.proto.ensemble_scheduling.step)
        )
        self.inputs = tuple((name, self.tensors[name], _reshaping(spec)) for name, spec in config.inputs.items())
        self._plans: dict[tuple[str, ...], Plan] = {}

    def _number(self, tensor: str) -> int:
        return self.tensors.setdefault(tensor, len(self.tensors))

    def plan(self, requested: tuple[str, ...]) -> Plan:
        """For the outputs a request asks for; () is all of them."""
        found = self._plans.get(requested)
        if found is None:
            if len(self._plans) >= _PLANS_KEPT:
                self._plans.clear()
            found = self._plans[requested] = self._make_plan(requested or self.config.output_names)
        return found

    def _make_plan(self, wanted: Sequence[str]) -> Plan:
        outputs = tuple(name for name in self.config.output_names if name in wanted)
        makers = {tensor: step for step in self.steps for tensor in step.outputs.values()}
        needed: set[int] = set()
        look = [self.tensors[name] for name in outputs]
        while look:
            step = makers.get(look.pop())
            if step is not None and step.index not in needed:
                needed.add(step.index)
                look += step.taken
        consumers: list[list[int]] = [[] for _ in self.tensors]
        missing = [0] * len(self.steps)
        for step in self.steps:
            if step.index in needed:
                missing[step.index] = len(step.taken)
                for tensor in step.taken:
                    consumers[tensor].append(step.index)
        uses = [len(takers) for takers in consumers]
        for name in outputs:
            uses[self.tensors[name]] += 1
        steps = tuple(step for step in self.steps if step.index in needed)
        return Plan(steps, outputs, tuple(map(tuple, consumers)), tuple(missing), tuple(uses))

    def bind(self, plan: Plan, find: Callable[[str, str], Any]) -> Binding:
        """With the models that `find` gives now. Raises what it raises."""
        models = tuple([find(step.model, step.version) for step in plan.steps])
        binding = plan.binding
        if binding is None or binding.models != models:
            binding = plan.binding = Binding(self, plan, models)
        return binding

    def close(self) -> None:
        """Lets go of the models."""
        self._plans.clear()


class BoundStep:
    """A step with the model that runs it."""

    __slots__ = (
        "datatype", "enqueue", "index", "infer", "inputs", "model", "outputs", "requested", "rows", "shape", "step",
        "streams", "taken", "version",
    )  # fmt: skip

    def __init__(self, step: Step, model: Any, plan: Plan, batched: Mapping[int, bool]) -> None:
        config: ModelConfig = model.config
        self.step = step
        self.index = step.index
        self.model = step.model
        self.version = step.version
        self.infer = model.infer
        self.enqueue = model.enqueue
        # Where there is one input: what the model has last found valid. It need not look at the same again.
        self.shape: tuple[int, ...] | None = None
        self.datatype: object = None
        self.rows = 1
        self.taken = step.taken
        self.streams = config.decoupled
        # (the model's input, the tensor, how its shape is to change)
        self.inputs = tuple(
            (name, tensor, _crossing(batched.get(tensor, False), config, name)) for name, tensor in step.inputs
        )
        # (the model's output, the tensor): those that somebody takes
        self.outputs = tuple((name, tensor) for name, tensor in step.outputs.items() if plan.uses[tensor])
        self.requested = () if step.outputs.keys() >= config.outputs.keys() else tuple(step.outputs)


class Binding:
    """A plan with the models that run its steps: what each is given, and how its shapes become the next one's."""

    __slots__ = ("distinct", "models", "outputs", "steps")

    def __init__(self, graph: Graph, plan: Plan, models: tuple[Any, ...]) -> None:
        self.models = models  # one per step of the plan
        self.distinct = tuple(dict.fromkeys(models))
        batched = dict.fromkeys((graph.tensors[name] for name in graph.config.inputs), graph.config.max_batch_size > 0)
        for step, model in zip(plan.steps, models, strict=True):
            batched.update(dict.fromkeys(step.outputs.values(), model.config.max_batch_size > 0))
        self.steps = {
            step.index: BoundStep(step, model, plan, batched) for step, model in zip(plan.steps, models, strict=True)
        }
        self.outputs = tuple(
            (name, graph.tensors[name], _to_output(batched.get(graph.tensors[name], False), graph.config, name))
            for name in plan.outputs
        )


def step_model(step: Any) -> str:
    """The name under which the model of a step is served."""
    return f"{step.model_namespace}::{step.model_name}" if step.model_namespace else str(step.model_name)


def _step_version(step: Any) -> str:
    return "" if step.model_version < 0 else str(step.model_version)


def with_step_labels(config: ModelConfig, find: Callable[[str, str], Any]) -> ModelConfig:
    """Outputs without labels of their own have those of the step's output that they are, as in Triton
    (model_lifecycle.cc). `find` as in `Graph.bind`; a model that is gone again lends none."""
    outputs = dict(config.outputs)
    for step in config.proto.ensemble_scheduling.step:
        bare = {name: outputs[t] for name, t in step.output_map.items() if t in outputs and not outputs[t].labels}
        if not bare:
            continue
        try:
            made: Mapping[str, TensorSpec] = find(step_model(step), _step_version(step)).config.outputs
        except DoorstepError:
            continue
        outputs.update({s.name: replace(s, labels=made[name].labels) for name, s in bare.items() if name in made})
    return replace(config, outputs=outputs)


def _reshaping(spec: TensorSpec) -> Convert | None:
    """An input in the shape that `reshape` says: what the steps get is that."""
    return None if spec.reshape is None else lambda array: to_backend(array, spec)


def _crossing(from_batching: bool, config: ModelConfig, name: str) -> Convert | None:
    spec = config.inputs.get(name)
    return None if spec is None else crossing(from_batching, config.max_batch_size > 0, spec.dims)


def crossing(from_batching: bool, to_batching: bool, dims: tuple[int, ...]) -> Convert | None:
    """How a tensor's shape changes between a model that batches and one that does not; None: it does not.

    Into one that batches, a tensor that has just its dims becomes a batch of one; out of one that batches, a batch of
    one loses that dimension unless it is among the dims. Everything else goes as it is, and is checked as a client's
    request would be."""
    if from_batching == to_batching:
        return None
    if to_batching:
        return lambda array: array[None] if fits(dims, array.shape) else array
    return lambda array: array[0] if array.ndim and array.shape[0] == 1 and not fits(dims, array.shape) else array


def _to_output(from_batching: bool, config: ModelConfig, name: str) -> Convert | None:
    spec = config.outputs[name]
    convert = crossing(from_batching, config.max_batch_size > 0, spec.dims if spec.reshape is None else spec.reshape)
    if spec.reshape is None or spec.dims.count(-1) > 1:
        return convert
    dims, leads = spec.dims, len(spec.shape) - len(spec.dims)

    def reshape(array: Array) -> Array:
        if convert is not None:
            array = convert(array)
        return array.reshape(array.shape[:leads] + dims)

    return reshape


def fits(dims: Sequence[int], shape: Sequence[int]) -> bool:
    """Equal but for wildcards."""
    return len(dims) == len(shape) and all(d in (s, -1) or s == -1 for d, s in zip(dims, shape, strict=True))
