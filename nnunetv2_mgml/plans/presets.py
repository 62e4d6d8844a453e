"""Presets of ``mgml plan``: sets of options under one name."""

from __future__ import annotations

from typing import Any

from nnunetv2_mgml.plans.options import Options

PAPER: dict[str, Any] = {
    "patch_size": [80, 80, 80],
    "batch_size": 1,
    "optimizer": "adam",
    "initial_lr": 2e-4,
    "weight_decay": 1e-4,
    "num_epochs": 900,
    "num_iterations_per_epoch": 150,
    "augmentation": "paper",
    "complete_view_weight": 0.0,
    "seed": 1024,
    "deterministic": True,
}
"""The training settings of the MGML paper (section 4.1)."""

PRESETS = ("nnunet", "paper")
"""``nnunet``: back to the plugin's defaults, which are nnU-Net's, in all that ``paper`` sets."""


def preset(name: str) -> dict[str, Any]:
    """Return what a preset sets: options of ours, and keys of nnU-Net's configurations.

    Args:
        name: one of `PRESETS`.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset '{name}'. Allowed: {', '.join(PRESETS)}.")
    if name == "paper":
        return dict(PAPER)
    defaults = Options()
    return {key: defaults.value(key) for key in PAPER if key in Options.names()}
