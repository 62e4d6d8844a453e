"""Fusion designs of other installed packages, found by their entry points.

A package names its designs in the entry point group `GROUP`, ``gated = "my_fusion:GatedFusion"``. They are imported
when the designs are first asked for. One that cannot be used is reported and left out; all others still work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

GROUP = "nnunetv2_mgml.fusion_designs"
_log = logging.getLogger(__name__)


def load_installed_designs(accept: Callable[[Any], Any], registry: dict[str, Any]) -> list[str]:
    """Hand to ``accept``, which may raise, what each entry point names.

    Args:
        accept: puts a design into the registry.
        registry: designs by name; what a package put there before it turned out to be broken is taken out again.

    Returns:
        What is wrong, one sentence per entry point that could not be used; also logged as warnings.
    """
    problems = [problem for point in entry_points(group=GROUP) if (problem := _load(point, accept, registry))]
    for problem in problems:
        _log.warning(problem)
    return problems


def _load(point: EntryPoint, accept: Callable[[Any], Any], registry: dict[str, Any]) -> str | None:
    before = dict(registry)
    try:
        accept(point.load())
    except Exception as error:  # other people's code: anything may be raised
        registry.clear()
        registry.update(before)
        package = "an unknown package" if point.dist is None else point.dist.name
        return (
            f"Fusion design '{point.name}' of {package} cannot be used: {type(error).__name__}: {error}. Mend or "
            f"uninstall {package} (entry point {point.value} in group {GROUP})."
        )
    return None
