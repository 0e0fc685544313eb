"""Binds threads to cores and to a NUMA node's memory (host policies, tritonserver's --host-policy). Knows no model.

Linux keeps both per thread, and whatever a thread starts, threads and processes, begins with what it has. So an
instance is loaded on a thread that is pinned for as long, and the thread that runs it stays pinned.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

from doorstep.config.host_policy import MOST_NODES, HostPolicy
from doorstep.errors import BackendError

_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # the system call's number
_MPOL_DEFAULT = 0
_MPOL_BIND = 2


def pin(policy: HostPolicy) -> None:
    """Binds the calling thread, and all it will start. Raises BackendError where the system does not let it."""
    try:
        if policy.cores:
            os.sched_setaffinity(0, policy.cores)
        if policy.numa_node >= 0:
            _set_memory_policy(_MPOL_BIND, 1 << policy.numa_node)
    except (OSError, AttributeError) as error:
        what = error.strerror if isinstance(error, OSError) else "this system has no thread affinity"
        raise BackendError(f"the host policy ({_described(policy)}) cannot be applied: {what}") from None


@contextmanager
def pinned(policy: HostPolicy) -> Iterator[None]:
    """The calling thread is bound inside, and as it was afterwards."""
    if not policy:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        pin(policy)
        yield
    finally:
        os.sched_setaffinity(0, before)
        if policy.numa_node >= 0:
            _set_memory_policy(_MPOL_DEFAULT, 0)


def _set_memory_policy(mode: int, nodes: int) -> None:
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        raise OSError(0, f"memory of a NUMA node cannot be chosen on {platform.machine()}")
    mask = ctypes.c_ulong(nodes)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, mode, ctypes.byref(mask) if nodes else None, MOST_NODES + 1 if nodes else 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _described(policy: HostPolicy) -> str:
    said = []
    if policy.cores:
        said.append(f"cpu-cores {','.join(map(str, sorted(policy.cores)))}")
    if policy.numa_node >= 0:
        said.append(f"numa-node {policy.numa_node}")
    return ", ".join(said)
