"""What all loss terms share."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class SharedOptions(OptionGroup):
    """What several terms read."""

    segmentation_weight: float = option(1.0, "lambda1 of eq. 10", low=0)
    temperature: float = option(6.0, "tau of eq. 9, also of the soft label", low=0.1)
    teaching: str = option(
        "everywhere",
        "everywhere (the paper); better: only voxels where the soft label or the "
        "teacher gives the true class more probability than the student",
        choices=("everywhere", "better"),
    )
    ramp_up_fraction: float = option(
        0.1, "share of the epochs over which these terms grow linearly to full weight", low=0, high=1
    )
