"""Host policies as options say them: which cores, and whose memory, instances use. Binds nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from doorstep.errors import InvalidArgument

CORES = "cpu-cores"
NUMA_NODE = "numa-node"
MOST_NODES = 64


@dataclass(frozen=True, slots=True)
class HostPolicy:
    cores: frozenset[int] = frozenset()  # empty: any
    numa_node: int = -1  # -1: any

    def __bool__(self) -> bool:
        return bool(self.cores) or self.numa_node >= 0


ANYWHERE = HostPolicy()


def parse_host_policy(settings: Mapping[str, str]) -> HostPolicy:
    """From `cpu-cores` (0-3,8-11) and `numa-node`. Raises InvalidArgument, in Triton's words where it has some."""
    cores: set[int] = set()
    for span in filter(None, settings.get(CORES, "").split(",")):
        lower, dash, upper = span.partition("-")
        if not dash:
            raise InvalidArgument(
                f"host policy setting 'cpu-cores' format is '<lower_cpu_core_id>-<upper_cpu_core_id>'. Got {span}"
            )
        cores.update(range(_number(CORES, lower), _number(CORES, upper) + 1))
    node = _number(NUMA_NODE, settings[NUMA_NODE]) if NUMA_NODE in settings else -1
    if node >= MOST_NODES:
        raise InvalidArgument(f"host policy setting 'numa-node' is {node}; there are at most {MOST_NODES} nodes")
    return HostPolicy(frozenset(cores), node)


def _number(setting: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 6:
        raise InvalidArgument(f"host policy setting '{setting}': expected a whole number, got '{text}'")
    return int(text)
