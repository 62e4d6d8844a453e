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
    "complete_every": 1,
    "network_form": "multi_encoder",
    "modality_decoder_scale": 0,
    "conditional_norms": False,
    "seed": 1024,
    "deterministic": True,
}
"""The training settings of the MGML paper (section 4.1), and of its losses and network what is otherwise by default."""

_PUBLISHED_LOSSES: dict[str, Any] = {
    "modality_decoder_scale": 0,
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
    "complete_every": 1,
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
    "modality_decoder_scale": None,
    "conditional_norms": None,
    "network_form": "early_fusion",
    "fusion": "concat",
    "fusion_options": {},
    "width_factor": 1.0,
    "decoder_width_ratio": 1.0,
    "soft_label": "none",
    "consistency_weight": 0.0,
    "complete_view_weight": 0.0,
    "modality_decoder_weight": 0.0,
    "rebalancing": "none",
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
_APART = (("paper-losses", "reference-losses"), ("nnunet", "paper"))
_LOSS_OF_PAPER = (
    "complete_view_weight",
    "complete_every",
    "network_form",
    "modality_decoder_scale",
    "conditional_norms",
)
"""What ``paper`` sets that are no training settings."""
_MARKS_OF_OTHERS = {"network_form": ("early_fusion",), "reading": ("paper", "reference")}
"""Values by which plans are known to have one of the others."""


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


def presets(names: Sequence[str], before: Options | None = None) -> dict[str, Any]:
    """Return what several presets set together; where two set the same, the later one counts, and never ``nnunet``.

    Args:
        names: of `PRESETS`.
        before: the options of the plans they are for. ``nnunet`` brings the loss on the complete view, the scale of
            what modalities alone are taught, form, norms and ``complete_every`` back only where it was ``paper`` that
            changed them.

    Raises:
        ValueError: no such preset, or two that contradict each other.
    """
    for pair in _APART:
        if set(pair) <= set(names):
            raise ValueError(f"Choose one of the presets {' and '.join(pair)}; they set the same options.")
    back_first = sorted(names, key=lambda name: name != "nnunet")
    changes = {key: value for name in back_first for key, value in preset(name).items()}
    if "nnunet" in names and before is not None:
        others = {key for name in names if name != "nnunet" for key in preset(name)}
        has_paper_loss = _has_paper_loss(before)
        for key in _LOSS_OF_PAPER:
            if key not in others and not (has_paper_loss and before.value(key) == PAPER[key]):
                del changes[key]
    return changes


def _has_paper_loss(options: Options) -> bool:
    """Whether plans have no complete view, training settings of ``paper``, and nothing else it may be off by."""
    if options.value("complete_view_weight") != PAPER["complete_view_weight"]:
        return False
    settings = (key for key in PAPER if key in Options.names() and key not in _LOSS_OF_PAPER)
    others = any(options.value(mark) in values for mark, values in _MARKS_OF_OTHERS.items())
    return not others and any(options.value(key) == PAPER[key] for key in settings)
