"""Tunes the host memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: a step takes the same large blocks as the one before, and fresh pages for them
    cost a CPU step about a tenth. Does nothing without glibc, or where MALLOC_* variables say otherwise."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt(M_MMAP_THRESHOLD, MOST)
    mallopt(M_TRIM_THRESHOLD, MOST)
