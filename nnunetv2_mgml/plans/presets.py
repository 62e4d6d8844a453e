"""Presets of ``mgml plan``: sets of options under one name."""

from __future__ import annotations

from collections.abc import Sequence
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

_PUBLISHED_LOSSES: dict[str, Any] = {
    "segmentation_weight": 1.0,
    "auxiliary_weight": 1.0,
    "modality_decoder_weight": 0.7,
    "complete_view_weight": 0.0,
    "ramp_up_fraction": 0.0,
    "soft_label": "meta_amf",
    "soft_label_weight": None,
    "mask_ratio": 0.2,
    "consistency_weight": 0.01,
    "teaching": "everywhere",
    "rebalancing": "none",
    "meta_hidden": 64,
    "meta_lr": 2e-4,
}
"""What text and code of MGML have in common; lambda2 follows tau."""

PAPER_LOSSES: dict[str, Any] = {
    **_PUBLISHED_LOSSES,
    "reading": "paper",
    "criterion": "nnunet",
    "temperature": 6.0,
    "mask_mode": "confidence",
    "meta_form": "ours",
    "teacher_augmentation": True,
    "teacher_dropout": False,
}
"""The total of the MGML paper's text (eq. 10, section 4.1)."""

REFERENCE_LOSSES: dict[str, Any] = {
    **_PUBLISHED_LOSSES,
    "reading": "reference",
    "criterion": "published",
    "temperature": 8.0,
    "mask_mode": "published",
    "meta_form": "published",
    "teacher_augmentation": False,
    "teacher_dropout": True,
}
"""The total of the published code (worldlikerr/MGML @ 51de28e)."""

EARLY_FUSION: dict[str, Any] = {
    "network_form": "early_fusion",
    "fusion": "concat",
    "width_factor": 1.0,
    "decoder_width_ratio": 1.0,
    "soft_label": "none",
    "consistency_weight": 0.0,
    "complete_view_weight": 0.0,
    "modality_decoder_weight": 0.0,
}
"""A stem per modality, fused once, and one U-Net of the plan's widths, one pass a step."""

_SETTINGS = {
    "paper": PAPER,
    "paper-losses": PAPER_LOSSES,
    "reference-losses": REFERENCE_LOSSES,
    "early-fusion": EARLY_FUSION,
}
PRESETS = ("nnunet", *_SETTINGS)
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
    if name in _SETTINGS:
        return dict(_SETTINGS[name])
    defaults = Options()
    return {key: defaults.value(key) for key in PAPER if key in Options.names()}


def presets(names: Sequence[str]) -> dict[str, Any]:
    """Return what several presets set together; where two set the same, the later one counts.

    Args:
        names: of `PRESETS`.

    Raises:
        ValueError: no such preset, or both sets of losses.
    """
    if {"paper-losses", "reference-losses"} <= set(names):
        raise ValueError("Choose one of the presets paper-losses and reference-losses; they set the same options.")
    return {key: value for name in names for key, value in preset(name).items()}
