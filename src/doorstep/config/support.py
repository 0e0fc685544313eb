"""The fields of a config that have no meaning here, for the log. Knows no file and no backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from doorstep.config.metrics_options import unknown_families
from doorstep.proto import is_repeated


@dataclass(frozen=True, slots=True)
class Missing:
    """A field that is set, or for numbers greater than `above`. In `path`, lists are looked at item by item."""

    path: str
    why: str
    above: int = 0


# These change how fast a model answers, or on what, never what it answers.
WITHOUT_EFFECT = (
    Missing("sequence_batching.state.use_same_buffer_for_input_output", "states are handed on, not copied, anyway"),
    Missing("sequence_batching.state.use_growable_memory", "a state takes the memory its size needs"),
    Missing("optimization.priority", "instances have no priorities"),
    Missing("optimization.cuda", "CUDA graphs are not used"),
    Missing("optimization.gather_kernel_buffer_threshold", "inputs are gathered on the CPU"),
    Missing("optimization.eager_batching", "batches are gathered when they run"),
    Missing("instance_group.secondary_devices", "there are no secondary devices"),
    Missing("instance_group.passive", "there are no passive instances; this one serves"),
    Missing("instance_group.profile", "profiles belong to TensorRT"),
    Missing("cc_model_filenames", "default_model_filename is used on every GPU"),
    Missing("input.format", "the layout is the client's and the model's business; nothing is transposed"),
)


def fields_without_meaning(proto: Any) -> list[str]:
    """One line for the log per field that the user set and this version does not act upon. `proto` as written."""
    lines = [
        f"{path} has no effect: {missing.why}" for missing in WITHOUT_EFFECT for path in _set_paths(proto, missing)
    ]
    lines += [f"model_metrics has no effect on '{family}': it has no buckets" for family in unknown_families(proto)]
    return lines


def _set_paths(proto: Any, missing: Missing) -> Iterator[str]:
    first, _, rest = missing.path.partition(".")
    yield from _walk(proto, first, rest, "", missing.above)


def _walk(message: Any, name: str, rest: str, prefix: str, above: int) -> Iterator[str]:
    field = message.DESCRIPTOR.fields_by_name[name]
    value = getattr(message, name)
    path = f"{prefix}{name}"
    if not rest:
        is_set = bool(value) if is_repeated(field) else _is_set(message, name, value, above)
        if is_set:
            yield path
        return
    first, _, rest = rest.partition(".")
    if is_repeated(field):
        for i, item in enumerate(value):
            yield from _walk(item, first, rest, f"{path}[{i}].", above)
    elif message.HasField(name):
        yield from _walk(value, first, rest, f"{path}.", above)


def _is_set(message: Any, name: str, value: Any, above: int) -> bool:
    if isinstance(value, Message):
        # `response_cache { enable: false }` asks for nothing; `sequence_batching {}` does
        return bool(message.HasField(name)) and not (name == "response_cache" and not value.enable)
    return value > above if isinstance(value, int) else bool(value)
