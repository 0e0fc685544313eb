"""What can be wrong with how a config batches: dynamic, sequence, ensemble. Knows no scheduler. Texts are Triton's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from doorstep.config.sequence import CORRELATION_TYPES, check_states
from doorstep.errors import Problem

_CONTROL_VALUES = ("int32_false_true", "fp32_false_true", "bool_false_true")


def check_batching(proto: Any, *, partial: bool) -> Iterator[Problem]:
    """`partial`: max_batch_size may still come from the model's file."""
    name = proto.name
    if proto.max_batch_size < 0:
        yield Problem(
            "max_batch_size", f"'max_batch_size' must be non-negative value for {name}", "0 means no batching"
        )
    if proto.HasField("dynamic_batching"):
        unknown = partial and proto.max_batch_size == 0 and not (proto.input and proto.output)
        yield from _preferred(proto, "dynamic_batching", "dynamic batching preferred size", unknown=unknown)
        yield from _priorities(proto.dynamic_batching, name)
    if proto.HasField("sequence_batching"):
        yield from _sequence(proto.sequence_batching, proto)
        yield from _preferred(
            proto, "sequence_batching.oldest", "sequence batching preferred batch size", unknown=partial
        )


def _preferred(proto: Any, where: str, what: str, *, unknown: bool) -> Iterator[Problem]:
    """`unknown`: what max_batch_size will be is not known yet."""
    batching = proto.sequence_batching.oldest if where.startswith("sequence") else proto.dynamic_batching
    for i, size in enumerate(batching.preferred_batch_size):
        path = f"{where}.preferred_batch_size[{i}]"
        if size <= 0:
            yield Problem(path, f"{what} must be positive for {proto.name}", f"it is {size}")
        elif size > proto.max_batch_size and not unknown:
            fix = f"{size} is more than max_batch_size, which is {proto.max_batch_size}"
            yield Problem(path, f"{what} must be <= max batch size for {proto.name}", fix)


def _priorities(batching: Any, name: str) -> Iterator[Problem]:
    levels = batching.priority_levels
    if levels:
        if not 1 <= batching.default_priority_level <= levels:
            what = f"default priority level must be in range [1, {levels}] for {name}"
            yield Problem("dynamic_batching.default_priority_level", what, "1 is the highest priority")
        for level in batching.priority_queue_policy:
            if not 1 <= level <= levels:
                what = f"priority queue policy must have priority level in range [1, {levels}] for {name}"
                yield Problem(f'dynamic_batching.priority_queue_policy["{level}"]', what)
    if batching.preserve_ordering:
        if levels > 1:
            what = f"Only one priority level is allowed when 'preserve_ordering' is true for {name}"
            yield Problem("dynamic_batching.preserve_ordering", what, "take out one of the two")
        policies = {"default_queue_policy": batching.default_queue_policy}
        policies |= {f'priority_queue_policy["{k}"]': p for k, p in batching.priority_queue_policy.items()}
        for path, policy in policies.items():
            if policy.default_timeout_microseconds and policy.timeout_action == policy.DELAY:
                what = f"Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for {name}"
                yield Problem(f"dynamic_batching.{path}", what, "use REJECT, or take out preserve_ordering")


def _sequence(batching: Any, proto: Any) -> Iterator[Problem]:
    name = proto.name
    if proto.response_cache.enable:
        what = (
            f"Response Cache does not currently support model {name} with sequence batching scheduler. "
            "Please disable the response cache."
        )
        yield Problem("response_cache", what)
    if batching.HasField("direct") and not 0.0 <= batching.direct.minimum_slot_utilization <= 1.0:
        what = f"sequence batching minimum slot utilization must be in range (0.0, 1.0] for {name}"
        yield Problem("sequence_batching.direct.minimum_slot_utilization", what)
    yield from check_states(proto)
    tensors: set[str] = set()
    kinds: set[int] = set()
    for i, control_input in enumerate(batching.control_input):
        where = f"sequence_batching.control_input[{i}]"
        if not control_input.name:
            yield Problem(where, f"sequence batching control tensor must have a name for {name}")
        elif control_input.name in tensors:
            what = (
                f"sequence batching control tensor '{control_input.name}' is specified for multiple control kinds "
                f"for {name}"
            )
            yield Problem(where, what)
        tensors.add(control_input.name)
        for c, control in enumerate(control_input.control):
            kind = control.Kind.Name(control.kind)
            if control.kind in kinds:
                what = f"sequence batching specifies multiple {kind} tensors for {name}"
                yield Problem(f"{where}.control[{c}]", what)
            kinds.add(control.kind)
            yield from _control(control, kind, f"{where}.control[{c}]", name)


def _control(control: Any, kind: str, where: str, name: str) -> Iterator[Problem]:
    given = [values for values in _CONTROL_VALUES if getattr(control, values)]
    if kind == "CONTROL_SEQUENCE_CORRID":
        if given:
            what = (
                "sequence batching must not specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' "
                f"for {kind} for {name}"
            )
            yield Problem(where, what, "it has a data_type instead")
        data_type = control.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number.get(control.data_type)
        if data_type is None or data_type.name not in CORRELATION_TYPES:
            allowed = ", ".join(CORRELATION_TYPES[:-1]) + " and " + CORRELATION_TYPES[-1]
            what = f"unexpected data type for control {kind} for {name}. Allowed data types are {allowed}"
            yield Problem(f"{where}.data_type", what)
    elif not given:
        what = (
            "sequence batching must specify either 'int32_false_true', 'fp32_false_true' or 'bool_false_true' "
            f"for {kind} for {name}"
        )
        yield Problem(where, what, "for example int32_false_true: [ 0, 1 ]")
    elif len(given) > 1:
        what = (
            "sequence batching specifies more than one from 'int32_false_true', 'fp32_false_true' and "
            f"'bool_false_true' for {kind} for {name}"
        )
        yield Problem(where, what)
    elif len(getattr(control, given[0])) != 2:
        what = f"sequence batching control '{given[0]}' must have exactly 2 entries for {kind} for {name}"
        yield Problem(f"{where}.{given[0]}", what, "the value for false, then the value for true")
