"""Fusion designs of other installed packages, found by their entry points.

A package names its designs in the entry point group `GROUP`, ``gated = "my_fusion:GatedFusion"``. They are imported
when the designs are first asked for. One that cannot be used is reported and left out; all others still work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnunetv2_mgml.plans.plugins import load_plugins

GROUP = "nnunetv2_mgml.fusion_designs"


def load_installed_designs(accept: Callable[[Any], Any], registry: dict[str, Any]) -> list[str]:
    """Hand each design to ``accept``, see `load_plugins`."""
    return load_plugins(GROUP, "Fusion design", accept, registry)
