"""Which instances a model's groups ask for, and what changes when the groups do. Starts none; knows no library."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from doorstep import proto as messages
from doorstep.backends.base import InstanceContext
from doorstep.config.host_policy import ANYWHERE, HostPolicy

# The policies of groups that name none (tritonserver's --host-policy).
_POLICY_NAMES = {"KIND_CPU": "cpu", "KIND_GPU": "gpu_{}", "KIND_MODEL": "model"}


@dataclass(frozen=True, slots=True)
class Instance:
    """One that there is or is to be. Of two with equal signatures one is as good as the other (Triton's
    InstanceConfigSignature, and the device)."""

    context: InstanceContext
    limits: Any  # its group's rate_limiter, an inference.ModelRateLimiter message
    signature: tuple[bytes, int]

    @property
    def name(self) -> str:
        return self.context.instance_name


def instances_of(
    context: InstanceContext, groups: Sequence[Any], host_policies: Mapping[str, HostPolicy]
) -> list[Instance]:
    """All that the groups ask for, named as Triton names them: <group>_<number>."""
    threads = max(len(os.sched_getaffinity(0)) // max(sum(group.count for group in groups), 1), 1)
    instances = []
    for group in groups:
        kind = _kind_name(group)
        settings = _settings(group)
        for number in range(group.count):
            device_id = group.gpus[number % len(group.gpus)] if group.gpus else 0
            policy = host_policies.get(group.host_policy or _POLICY_NAMES[kind].format(device_id), ANYWHERE)
            one = replace(
                context,
                instance_name=f"{group.name}_{number}",
                kind=kind,
                device_id=device_id,
                threads=min(threads, len(policy.cores)) if policy.cores else threads,
                host_policy=policy,
            )
            instances.append(Instance(one, group.rate_limiter, (settings, device_id)))
    return instances


def difference(running: Iterable[Instance], wanted: Iterable[Instance]) -> tuple[list[Instance], list[Instance]]:
    """(those to start, those that are no longer needed). What can stay stays, first of all under its own name."""
    spare = list(running)
    unnamed = []
    for instance in wanted:
        same = next((i for i in spare if i.name == instance.name and i.signature == instance.signature), None)
        if same is None:
            unnamed.append(instance)
        else:
            spare.remove(same)
    lacking = []
    for instance in unnamed:
        like = next((i for i in spare if i.signature == instance.signature), None)
        if like is None:
            lacking.append(instance)
        else:
            spare.remove(like)
    return lacking, spare


def _settings(group: Any) -> bytes:
    """All that an instance can tell of its group: not the group's name, nor how many there are."""
    settings = messages.ModelInstanceGroup()
    settings.CopyFrom(group)
    settings.ClearField("name")
    settings.ClearField("count")
    return bytes(settings.SerializeToString(deterministic=True))


def _kind_name(group: Any) -> str:
    name: str = group.Kind.Name(group.kind)
    return "KIND_CPU" if name == "KIND_AUTO" else name
