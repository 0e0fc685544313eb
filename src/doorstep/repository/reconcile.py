"""What to do next so that the versions of one model that should be served are. Pure; knows no loader and no disk.

The idea is TensorFlow Serving's aspired versions: the function keeps no state, looks at what is wanted and what is
there, and says one step; whoever took the step asks again, until there is nothing left to do. It preserves
availability: what is served stays until all that should replace it is loaded, and one version that fails keeps
everything as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

Stamp = str  # what a version was made from: equal stamps, equal files and config


@dataclass(frozen=True, slots=True)
class Load:
    """Load these versions, side by side; nothing that is served changes."""

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Abandon:
    """Throw away these versions, which were loaded but never served."""

    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Swap:
    """In one step, begin to serve the loaded versions `publish` and cease to serve `retire`."""

    publish: tuple[int, ...]
    retire: tuple[int, ...]


Action = Load | Abandon | Swap


def reconcile(
    wanted: Mapping[int, Stamp],
    serving: Mapping[int, Stamp],
    loaded: Mapping[int, Stamp],
    failed: Collection[int] = (),
) -> Action | None:
    """The next step, or None when there is none. `loaded` are ready but not served yet; `failed` could not be loaded.

    A version in both `loaded` and `serving` is a reload: the new one takes the old one's place.
    """
    if failed:
        return Abandon(tuple(loaded)) if loaded else None
    missing = [v for v, stamp in wanted.items() if stamp not in (serving.get(v), loaded.get(v))]
    if missing:
        return Load(tuple(sorted(missing, reverse=True)))
    retire = tuple(v for v in serving if v not in wanted or v in loaded)
    if loaded or retire:
        return Swap(tuple(loaded), retire)
    return None
