"""Scoring needs neither torch nor nnU-Net, in none of its modules."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import nnunetv2_mgml.scoring

MODULES = sorted(m.name for m in pkgutil.walk_packages(nnunetv2_mgml.scoring.__path__, "nnunetv2_mgml.scoring."))


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (MODULES, ("torch", "nnunetv2")),
        (["nnunetv2_mgml.inference.subset_quality"], ("torch", "nnunetv2", "pandas", "scipy")),
        (
            [f"nnunetv2_mgml.commands.{name}" for name in ("evaluate", "compare", "report")],
            ("torch", "nnunetv2"),
        ),
        (["nnunetv2_mgml.commands.evaluate", "nnunetv2_mgml.commands.compare"], ("matplotlib",)),
    ],
    ids=["scoring", "quality quoted by predictions", "commands", "commands without figures"],
)
def test_imports_nothing_heavy(modules: list[str], heavy: tuple[str, ...]) -> None:
    assert modules
    code = f"import sys, {', '.join(modules)}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == []
