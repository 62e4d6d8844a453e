"""Rebalancing."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class RebalancingOptions(OptionGroup):
    """Of `Rebalancing`."""

    rebalancing: str = option(
        "none",
        "passion: modalities that lag behind the fused prediction learn more from it (M "
        "more passes of the fusion decoder in training); none: off",
        choices=("none", "passion"),
    )
    rebalancing_temperature: float = option(4.0, "tau of its distillation", low=0.1)
    rebalancing_distillation_weight: float = option(
        0.125, "weight of its distillation, a sum over classes (published: 0.5 on the mean over 4 classes)", low=0
    )
    rebalancing_prototype_weight: float = option(0.1, "weight of its prototype term", low=0)
    rebalancing_rate: float = option(
        0.01,
        "step of the balance weights per epoch (eta), times 1.5 from the start and "
        "again after each third of the training",
        low=0,
    )
