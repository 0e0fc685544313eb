"""Models whose loading waits for other models: model code may load others, and two must not wait for each other.

Knows no loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from doorstep.errors import InvalidArgument


class Waits:
    """Touched only from the event loop."""

    def __init__(self) -> None:
        self._for: dict[str, list[str]] = {}  # a model that is being loaded → those its own code waits for

    @contextmanager
    def noted(self, asker: str, name: str) -> Iterator[tuple[str, ...]]:
        """`asker`, whose code is being loaded, waits for `name` to be loaded or unloaded; "": nobody is.

        Gives all who wait then. Raises InvalidArgument where the wait would never end."""
        if not asker:
            yield ()
            return
        if asker in self._behind(name):
            raise InvalidArgument(
                f"model '{asker}' is being loaded, and cannot wait meanwhile for '{name}'"
                + ("" if name == asker else f", which waits for '{asker}'")
            )
        waiting = self._for.setdefault(asker, [])
        waiting.append(name)
        try:
            yield tuple(model for model in self._for if asker in self._behind(model))
        finally:
            waiting.remove(name)
            if not waiting:
                del self._for[asker]

    def _behind(self, name: str) -> set[str]:
        """`name`, and all that it waits for."""
        found = {name}
        left = [name]
        while left:
            new = set(self._for.get(left.pop(), ())) - found
            found |= new
            left += new
        return found
