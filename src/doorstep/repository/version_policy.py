"""Which of a model's versions should be served. A pure function of the policy and of what is there; reads no disk.

config.pbtxt's `version_policy`: latest { num_versions }, all { }, specific { versions }; without one, the newest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Latest:
    """The `count` versions with the highest numbers."""

    count: int = 1


@dataclass(frozen=True, slots=True)
class All:
    """Every version there is."""


@dataclass(frozen=True, slots=True)
class Specific:
    """These versions, as far as they are there."""

    versions: tuple[int, ...]


VersionPolicy = Latest | All | Specific


def policy_of(config: Any) -> VersionPolicy:
    """The policy that an inference.ModelConfig message asks for."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "latest":
            return Latest(policy.latest.num_versions)
        case "all":
            return All()
        case "specific":
            return Specific(tuple(policy.specific.versions))
        case _:
            return Latest()


def choose(policy: VersionPolicy, available: Collection[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(versions to serve, versions asked for that are not there), both newest first."""
    match policy:
        case Latest(count):
            return tuple(sorted(available, reverse=True)[:count]), ()
        case All():
            return tuple(sorted(available, reverse=True)), ()
        case Specific(versions):
            asked = sorted(set(versions), reverse=True)
            return tuple(v for v in asked if v in available), tuple(v for v in asked if v not in available)
