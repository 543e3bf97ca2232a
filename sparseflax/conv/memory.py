"""Freed memory stays with the process, so that a network's large outputs are not mapped and faulted in anew at every call."""

from __future__ import annotations

import ctypes
import os

SWITCH = "SPARSEFLAX_KEEP_MEMORY"  # 0 in the environment leaves malloc as it is
KEEP = 2**31 - 1  # bytes of freed memory
MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8  # glibc's malloc.h


def keep_memory() -> bool:
    """Makes malloc, in all of this process, keep what is freed instead of giving it back to the system.

    glibc unmaps what lies beyond 32 MB at once, and less than that where it ends the heap: then the next call of a network
    faults its buffers in again, page by page. The price is that the process stays as large as it once was, and that one heap in
    which much was done is slow to search: XLA's dense network of the digits, not the packed one, takes 1.1 to 1.5 times as long
    on two threads of a Zen 4 after a training or a calibration, whose own steps take a tenth less. With an arena for each
    thread, glibc's default, it would not, and a batch of a dense ResNet-50 would fault 58,000 pages at every call.

    Called when sparseflax is imported, unless the environment says SPARSEFLAX_KEEP_MEMORY=0.

    Returns:
      False where malloc is not glibc's, or the environment forbids it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or os.environ.get(SWITCH) == "0":
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, KEEP) and mallopt(ARENA_MAX, 1))
