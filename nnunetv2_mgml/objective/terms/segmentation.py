"""L_seg of the fused output (part of eq. 10): nnU-Net's own loss, and the losses of the fusion design."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunetv2_mgml.objective.base import SharedOptions, Term, TermSpec, TermValue, register
from nnunetv2_mgml.objective.segmentation import auxiliary_loss
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.plans.options import OptionGroup, Options, option


@dataclass(frozen=True)
class SegmentationOptions(OptionGroup):
    """Of `Segmentation`."""

    auxiliary_weight: float = option(1.0, "weight of the fusion design's auxiliary losses", low=0)


@register
class Segmentation(Term):
    """Trains everything that takes part in the prediction; always on."""

    name = "segmentation"
    order = 10
    summary = "nnU-Net's loss of the prediction from the visible modalities, and the fusion design's own losses"
    option_group = SegmentationOptions

    def __init__(self, spec: TermSpec) -> None:
        super().__init__(spec)
        self.weight = spec.options.objective[SharedOptions].segmentation_weight
        self.auxiliary_weight = spec.options.objective[SegmentationOptions].auxiliary_weight

    @classmethod
    def active(cls, options: Options) -> bool:
        """Always."""
        return True

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        output = step.output
        parts = {"segmentation": self.prediction_loss(step)}
        total = parts["segmentation"]
        if output.auxiliary:
            parts["auxiliary"] = self.auxiliary_loss(step)
            total = total + self.auxiliary_weight * parts["auxiliary"]
        parts["fusion"] = output.fusion_loss
        total = total + self.auxiliary_weight * output.fusion_loss
        return TermValue(self.weight * total, parts)

    def prediction_loss(self, step: Step) -> torch.Tensor:
        """Return the loss of the fused prediction."""
        return step.segmentation_loss(step.output.student)

    def auxiliary_loss(self, step: Step) -> torch.Tensor:
        """Return the loss of the design's auxiliary label logits, of which there are some."""
        return auxiliary_loss(step.output.auxiliary, step.labels, step.valid, self.spec.batch_dice)
