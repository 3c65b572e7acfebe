"""How much memory there is for each device."""

import functools
import os
import resource
from pathlib import Path
from typing import Final

import jax

_CGROUP: Final = Path("/sys/fs/cgroup/memory.max")
_STATM: Final = Path("/proc/self/statm")


def device_memory() -> float:
    """Return the bytes that one device of this process may hold.

    What the device says. CPU devices, which do not, share what the machine, its control
    group and the limits of the process leave.
    """
    devices = jax.local_devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return float(limit)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        found += [] if soft == resource.RLIM_INFINITY else [soft - _taken()[kind]]
    if _CGROUP.exists() and (text := _CGROUP.read_text().strip()) != "max":
        found.append(int(text))
    return min(found) / len(devices)


@functools.cache
def _taken() -> dict[int, int]:
    """Return the bytes that libraries and threads took before anything was placed."""
    if not _STATM.exists():
        return {resource.RLIMIT_AS: 0, resource.RLIMIT_DATA: 0}
    pages = [int(count) for count in _STATM.read_text().split()]
    size = os.sysconf("SC_PAGE_SIZE")
    return {resource.RLIMIT_AS: pages[0] * size, resource.RLIMIT_DATA: pages[5] * size}
