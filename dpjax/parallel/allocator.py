"""What the C library does with memory that programs on a CPU give back."""

import ctypes
from typing import Final

_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
"""Options of glibc's ``mallopt``."""
_MOST: Final = 2**31 - 1


def keep_freed_memory() -> None:
    """Let later allocations use what was freed, instead of memory fresh from the system.

    XLA allocates the temporaries of a program on a CPU anew for each call. By default glibc
    takes every block of more than 32 MiB from the system and returns it when it is freed, so
    that each call pays for clearing and mapping its pages one by one: a quarter of a small
    convolutional network's step. From this call on blocks up to 2 GiB stay with the process,
    which therefore holds on to its peak.

    For commands and scripts, of the whole process. Without glibc nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MOST)
        mallopt(_TRIM_THRESHOLD, _MOST)
