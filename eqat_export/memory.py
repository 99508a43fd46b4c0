"""Freed memory is kept for what comes next.

By default glibc gives large blocks back to the system when they are freed. Converting allocates and frees some tens of
megabytes for every layer, and each page of them would be faulted in and cleared anew, which takes longer than encoding.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory", "return_freed_memory"]

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, for the whole process and in one arena for all threads.

    Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_MMAP_MAX, 0)
    mallopt(_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Gives what ``keep_freed_memory`` kept back to the system."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
