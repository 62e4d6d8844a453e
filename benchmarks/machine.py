"""What a benchmark ran on: the processor, and the state of this checkout (imports no torch)."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
_RESULTS = ("results", "ablation/results")


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of this checkout; empty where it is no repository."""
    return output_of("git", "-C", str(FOLDER), "rev-parse", "HEAD")


def code_changed() -> bool:
    """Return whether package or benchmarks, results aside, differ from the commit."""
    places = ("../nnunetv2_mgml", ".", *(f":!{folder}" for folder in _RESULTS))
    return bool(output_of("git", "-C", str(FOLDER), "status", "--porcelain", "--", *places))


def short_commit() -> str:
    """Return the first digits of the commit, with a star where `code_changed`."""
    return commit()[:7] + ("*" if code_changed() else "")


def output_of(*command: str) -> str:
    """Return what a command prints; empty where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
