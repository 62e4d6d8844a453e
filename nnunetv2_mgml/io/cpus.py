"""How many CPUs this process may use: fewer than the machine has, in a job, a container or beside others."""

from __future__ import annotations

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""In a container that was given part of the machine: microseconds of CPU time, and per how many."""


def usable_cpus() -> int:
    """Return how many threads are worth starting, at least 1.

    The smallest of ``OMP_NUM_THREADS``, the CPUs this process is bound to (SLURM, taskset) and a container's share
    (``docker run --cpus``). More threads than that wait for each other.
    """
    try:
        limits = [len(os.sched_getaffinity(0))]
    except AttributeError:  # macOS, Windows
        limits = [os.cpu_count() or 1]
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal():
        limits.append(int(asked))
    try:
        quota, period = QUOTA.read_text().split()
        limits.append(-(-int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or "max"
        pass
    return max(1, min(limits))
