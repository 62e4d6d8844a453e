"""How many threads are worth starting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nnunetv2_mgml.io import cpus


@pytest.mark.parametrize(
    ("bound", "asked", "quota", "expected"),
    [
        (8, None, None, 8),
        (8, "3", None, 3),
        (8, "4,2", "max 100000", 4),
        (8, "many", "250000 100000", 3),
        (2, "16", "800000 100000", 2),
        (8, "0", None, 1),
    ],
)
def test_the_smallest_limit_counts(
    bound: int, asked: str | None, quota: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(bound)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(cpus, "QUOTA", tmp_path / "cpu.max")
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota + "\n")
    assert cpus.usable_cpus() == expected


def test_where_processes_cannot_be_bound_the_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpus, "QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert cpus.usable_cpus() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpus.usable_cpus() == 1
