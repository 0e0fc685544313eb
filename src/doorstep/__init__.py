"""Doorstep turns a folder of models into a service.

`doorstep.Model` is what a Python model derives from; everything else is reached through the command line, or by name
from the room it lives in (docs/design.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from doorstep._version import __version__

if TYPE_CHECKING:
    from doorstep.backends.python.api import Model

__all__ = ["Model", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Model":
        from doorstep.backends.python.api import Model

        return Model
    raise AttributeError(f"module 'doorstep' has no attribute {name!r}")
