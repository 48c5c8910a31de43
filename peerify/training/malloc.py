"""What the C library does with memory that a training step frees."""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST_BLOCK = 32 * 2**20  # bytes; glibc takes no larger value for blocks to be cut from its heap


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed instead of giving it back; False where that cannot be, or the user has chosen.

    By default it returns large blocks to the system at once, which clears each page when the next step asks for it
    again: up to a quarter of a step on a CPU (docs/results.md). The process then holds the most it ever used, as it
    would have to anyway at the same point of the next step.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or chosen:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(M_TRIM_THRESHOLD, -1))


def return_freed_memory() -> None:
    """Have glibc give back what is free, whatever `keep_freed_memory` told it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
