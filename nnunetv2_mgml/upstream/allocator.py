"""Memory that is freed while a network predicts stays with the process, on Linux.

The C library gives freed memory back to the system at once where it was much, and every layer of a network frees much
and wants as much: the system then hands it out page by page, each of them zeroed.

Bends: two limits of glibc's allocator (``mallopt``), for a while; not where the environment sets any
    (``MALLOC_TRIM_THRESHOLD_`` and its like, ``GLIBC_TUNABLES``), nor elsewhere than on Linux with glibc.
Why: see above; PyTorch has no pool of its own on a CPU, and a prediction from patches of 128^3 voxels takes up to
    a fifth less time.
Guarded by: tests/upstream/test_allocator.py
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER, _LARGEST = -1, 2**30
"""Bytes; what is larger than the largest still comes from the system and goes back."""
_USUAL = 32 * 2**20
"""Where glibc itself ends up in a process that frees arrays of this size or more; it trims at twice that."""


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Keep what is freed for what comes next; afterwards all of it goes back.

    Yields:
        Whether that is so. Not thread-safe: the limits are the process's.
    """
    libc = None if _is_set_elsewhere() else ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has none
        yield False
        return
    assert libc is not None
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield True
    finally:
        libc.mallopt(_MMAP_THRESHOLD, _USUAL)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _USUAL)
        libc.malloc_trim(0)


def _is_set_elsewhere() -> bool:
    return sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
