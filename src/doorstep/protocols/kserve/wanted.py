"""What a client asked of its outputs beyond their names: binary or JSON, classified or whole. Knows no wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How one output is to be sent."""

    binary: bool = False
    classes: int = 0  # 0: the tensor itself; n: its n largest values as BYTES


@dataclass(frozen=True, slots=True)
class Wanted:
    """How all outputs are to be sent: `forms` by name, `default` for those not named."""

    default: OutputForm = OutputForm()
    forms: Mapping[str, OutputForm] = field(default_factory=dict)


AS_JSON = OutputForm()
AS_BINARY = OutputForm(binary=True)
ALL_JSON = Wanted(AS_JSON)
ALL_BINARY = Wanted(AS_BINARY)
