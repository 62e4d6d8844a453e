"""Consistency."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class ConsistencyOptions(OptionGroup):
    """Of `Consistency`."""

    consistency_weight: float = option(
        0.03,
        "lambda3 of eq. 10, on a loss averaged over voxels and scaled by temperature^2; 0 switches the term off. "
        "Its gradient was 0.01 to 0.08 of the segmentation loss's (same run); 0.1 cost Dice in prototypes",
        low=0,
    )
    teacher_augmentation: bool = option(
        False, "the teacher sees its own, stronger intensity augmentation (a second encoder pass)"
    )
