"""What a client asked of its outputs beyond their names: binary or JSON, classified or whole. Knows no wire format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from doorstep.client_memory import Place


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How one output is to be sent."""

    binary: bool = False
    classes: int = 0  # 0: the tensor itself; n: its n largest values as BYTES
    place: Place | None = None  # in shared memory of the client's; the answer holds no data then


@dataclass(frozen=True, slots=True)
class Wanted:
    """How all outputs are to be sent: `forms` by name, `default` for those not named."""

    default: OutputForm = OutputForm()
    forms: Mapping[str, OutputForm] = field(default_factory=dict)


AS_JSON = OutputForm()
AS_BINARY = OutputForm(binary=True)
ALL_JSON = Wanted(AS_JSON)
ALL_BINARY = Wanted(AS_BINARY)
