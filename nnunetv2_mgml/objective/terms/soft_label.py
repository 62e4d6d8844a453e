"""Soft label."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class SoftLabelOptions(OptionGroup):
    """Of `SoftLabel`."""

    soft_label: str = option(
        "meta_amf",
        "meta_amf: eq. 1-5; fixed: smooth max and min with fixed parameters (the "
        "paper's FPSLD); mean: mean of log-probabilities; none: no soft label",
        choices=("meta_amf", "fixed", "mean", "none"),
    )
    soft_label_weight: float = option(
        0.5,
        "lambda2 of eq. 10, on a loss averaged over voxels and scaled by temperature^2 (the paper's 0.3 tau^2/10 "
        "is for a sum over voxels). At 1 its gradient was 0.18 to 0.54 of the modality loss's (ten BraTS cases, "
        "400 steps), so 0.5 keeps it at 0.1 to 0.3",
        low=0,
    )
    mask_ratio: float = option(
        0.2, "expected share of voxels dropped from the soft-label loss at w_f = 0.5 (eq. 6)", low=0, high=0.95
    )
    mask_mode: str = option(
        "confidence",
        "confidence: unsure voxels are dropped more often; uniform: all alike",
        choices=("confidence", "uniform"),
    )
    meta_objective: str = option(
        "ground_truth",
        "what trains the MetaNetwork. ground_truth: segmentation loss of the soft label; soft_label: "
        "L_SL as in the paper (w_f ran to 0 or 1 within 100 steps in prototypes)",
        choices=("ground_truth", "soft_label"),
    )
    meta_hidden: int = option(64, "width of the MetaNetwork's hidden layer", low=1)
    meta_lr: float = option(2e-4, "learning rate of the MetaNetwork's Adam, poly schedule", low=0)
    sharpness_min: float = option(0.5, "lower bound of beta and alpha (eq. 2)", low=1e-3)
    sharpness_max: float = option(
        20.0, "upper bound of beta and alpha; above 20 smooth max equals max to 1e-3", low=1e-3
    )
    fixed_sharpness: float = option(100.0, "beta = alpha of soft_label=fixed (the paper's Table 2)", low=1e-3)
    fixed_confidence: float = option(0.5, "w_f of soft_label=fixed", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpness_min >= self.sharpness_max:
            raise ValueError(
                f"sharpness_min ({self.sharpness_min}) must be below sharpness_max ({self.sharpness_max})."
            )

    @property
    def on(self) -> bool:
        """Whether modalities are taught by a soft label."""
        return self.soft_label != "none" and self.soft_label_weight > 0

    @property
    def has_meta_network(self) -> bool:
        """Whether the soft label's parameters are predicted by a MetaNetwork."""
        return self.on and self.soft_label == "meta_amf"
