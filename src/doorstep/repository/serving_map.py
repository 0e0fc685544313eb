"""The published table: which object answers for a model's name and version. Knows no disk, no loading, no draining."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Generic, TypeVar

from doorstep.errors import InvalidArgument, NotFound, Unavailable
from doorstep.repository.base import Servable
from doorstep.repository.dependencies import SEPARATOR

S = TypeVar("S", bound=Servable)
_INT64_MAX = 2**63 - 1


class ServingMap(Generic[S]):
    """Written only from the event loop, always by replacing: whoever holds a servable keeps it."""

    __slots__ = ("_identities", "_known", "_serving")

    def __init__(
        self,
        known: Callable[[str], Collection[int] | None] = lambda name: None,
        identities: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        """`known(name)`: the versions there have ever been of a model, None for an unknown one; only to word errors.
        `identities(name)`: the models that are called so, where there are namespaces."""
        self._identities = identities
        self._serving: dict[tuple[str, str], S] = {}  # (name, version); version "" is the newest that is ready
        self._known = known

    def find(self, name: str, version: str = "") -> S:
        """The servable that answers. Raises NotFound, Unavailable or InvalidArgument, in Triton's words."""
        found = self._serving.get((name, version))
        return found if found is not None else self._miss(name, version)

    def _miss(self, name: str, version: str) -> S:
        number = _version_number(version)
        if self._identities is not None and SEPARATOR not in name:
            return self.find(self._identity(name), version)
        known = self._known(name)
        if known is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if number is None:
            raise NotFound(f"Request for unknown model: '{name}' has no available versions")
        found = self._serving.get((name, str(number)))  # "007"
        if found is not None:
            return found
        if number in known:
            raise Unavailable(f"Request for unknown model: '{name}' version {number} is not at ready state")
        raise NotFound(f"Request for unknown model: '{name}' version {number} is not found")

    def _identity(self, name: str) -> str:
        """The one model of that name. Raises InvalidArgument for several, or none."""
        assert self._identities is not None
        found = self._identities(name)
        if not found:
            raise InvalidArgument(f"Request for unknown model: '{name}' is not found")
        if len(found) > 1:
            raise InvalidArgument(
                f"There are {len(found)} identifiers of model '{name}' in global map, model namespace must be provided "
                "to resolve ambiguity."
            )
        return found[0]

    def versions(self, name: str) -> list[str]:
        """The versions of a model that can be called, lowest first."""
        if self._identities is not None and SEPARATOR not in name:
            found = self._identities(name)
            name = found[0] if len(found) == 1 else name
        return sorted((v for n, v in self._serving if n == name and v), key=int)

    def all(self) -> list[S]:
        """Every servable once, by name and version."""
        rows = sorted((name, int(version)) for name, version in self._serving if version)
        return [self._serving[name, str(version)] for name, version in rows]

    def publish(self, name: str, versions: Mapping[int, S]) -> None:
        """From now on exactly these versions of `name` answer."""
        serving = {key: servable for key, servable in self._serving.items() if key[0] != name}
        for version, servable in versions.items():
            serving[name, str(version)] = servable
        if versions:
            serving[name, ""] = versions[max(versions)]
        self._serving = serving

    def __repr__(self) -> str:
        return f"<ServingMap {', '.join(f'{n}:{v}' for n, v in sorted(self._serving) if v) or 'empty'}>"


def _version_number(version: str) -> int | None:
    """The number in a version string, None for the empty one."""
    if not version:
        return None
    digits = version[1:] if version[0] in "+-" else version
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 19 or int(digits) > _INT64_MAX:
        raise InvalidArgument(
            f"failed to get model version from specified version string '{version}' "
            "(details: stol), version should be an integral value > 0"
        )
    if version[0] == "-" and int(digits):
        raise InvalidArgument(f"invalid model version specified '{version}' , version should be an integral value > 0")
    return int(digits)
