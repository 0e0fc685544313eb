"""What can be wrong with an ensemble as configured, its data flow included. Knows no scheduler and no other model.

Texts are Triton's (model_config_utils.cc, ValidateEnsembleSchedulingConfig).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from doorstep.errors import Problem

_NOT_ALLOWED = (
    ("instance_group", "instance group should not be specified for ensemble '{}'"),
    ("optimization", "optimization should not be specified for ensemble '{}'"),
    ("model_warmup", "model_warmup can not be specified for ensemble '{}'"),
)


def check_ensemble(proto: Any) -> Iterator[Problem]:
    name = proto.name
    is_ensemble = proto.HasField("ensemble_scheduling")
    if proto.platform == "ensemble":
        if proto.backend:
            what = f"Ensemble model '{name}' must have platform type 'ensemble' and empty backend type"
            yield Problem("backend", what, "take it out")
        if not is_ensemble:
            what = f"ensemble scheduling must be set for ensemble {name} whose platform is ensemble"
            yield Problem("platform", what)
    elif is_ensemble:
        what = f"ensemble scheduling cannot be set for model '{name}' whose platform is not ensemble"
        yield Problem("ensemble_scheduling", what, 'write platform: "ensemble"')
    if not is_ensemble:
        return
    given = {field.name for field, _ in proto.ListFields()}
    for field, what in _NOT_ALLOWED:
        if field in given:
            yield Problem(field, what.format(name), "it belongs to the models of the steps")
    if not proto.ensemble_scheduling.step:
        yield Problem("ensemble_scheduling", f"must specify 'step' for ensemble '{name}'")
        return
    problems = list(_check_steps(proto))
    yield from problems
    if not problems:
        yield from _check_flow(proto)


def _check_steps(proto: Any) -> Iterator[Problem]:
    written: set[str] = set()
    for i, step in enumerate(proto.ensemble_scheduling.step):
        where = f"ensemble_scheduling.step[{i}]"
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield Problem(where, f"must specify '{field}' in step {i} of ensemble '{proto.name}'")
        for tensor in step.output_map.values():
            if tensor in written:
                what = (
                    f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{proto.name}' "
                    f"step {i}"
                )
                yield Problem(f"{where}.output_map", what)
            written.add(tensor)


def _check_flow(proto: Any) -> Iterator[Problem]:
    """Every ensemble tensor must be reachable from the inputs, and be used."""
    steps = proto.ensemble_scheduling.step
    sources = {
        t: set(s.input_map.values()) for s in steps for t in s.output_map.values()
    }  # tensor → what it is made of
    used = {t for s in steps for t in s.input_map.values()}
    known = used | set(sources)
    ready = {io.name for io in proto.input} & known
    grown = True
    while grown:
        fresh = {t for t, needs in sources.items() if t not in ready and needs <= ready}
        grown = bool(fresh)
        ready |= fresh
    for i, io in enumerate(proto.input):
        if io.name not in known:
            yield Problem(f"input[{i}]", f"ensemble input '{io.name}' for ensemble {proto.name} is not used")
    outputs = set()
    for i, io in enumerate(proto.output):
        outputs.add(io.name)
        if io.name not in known:
            yield Problem(f"output[{i}]", f"ensemble output '{io.name}' for ensemble {proto.name} is not used")
        elif io.name not in ready:
            what = f"output '{io.name}' for ensemble '{proto.name}' is not written"
            culprit = _not_connected(io.name, sources, ready)
            if culprit != io.name:
                what += f": at least one of its depending tensors, '{culprit}', is not connected"
            yield Problem(f"output[{i}]", what)
    for tensor in sorted(known - outputs):
        if tensor not in ready or tensor not in used:
            yield Problem("ensemble_scheduling", f"ensemble tensor '{tensor}' is unused in ensemble '{proto.name}'")


def _not_connected(tensor: str, sources: dict[str, set[str]], ready: set[str]) -> str:
    """The tensor that is missing at the far end of what `tensor` is made of; the steps may run in a circle."""
    seen = {tensor}
    while True:
        missing = sorted(sources.get(tensor, set()) - ready - seen)
        if not missing:
            return tensor
        tensor = missing[0]
        seen.add(tensor)
