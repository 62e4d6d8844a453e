"""L_complete: nnU-Net's loss on the prediction from all modalities a case has.

Not in the paper, whose teacher learns only when it is drawn as a student.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.objective.base import SharedOptions, Term, TermSpec, TermValue, register
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.plans.options import OptionGroup, Options, option


@dataclass(frozen=True)
class CompleteViewOptions(OptionGroup):
    """Of `CompleteView`."""

    complete_view_weight: float = option(
        1.0,
        "weight of nnU-Net's loss on the teacher's own prediction, from all modalities the case has. Not in the "
        "paper, whose teacher learns only when it is drawn as a student; 0: off; off as well with "
        "mask_sampling=fixed. On phantoms, at equal steps, it added 2.1 to 2.6 Dice points to the network "
        "of then; it makes a step longer (docs/results.md)",
        low=0,
    )


@register
class CompleteView(Term):
    """Trains the encoders and the fused path in a pass of its own."""

    name = "complete_view"
    order = 20
    summary = "nnU-Net's loss of the prediction from all modalities a case has"
    option_group = CompleteViewOptions

    def __init__(self, spec: TermSpec) -> None:
        super().__init__(spec)
        self.segmentation_weight = spec.options.objective[SharedOptions].segmentation_weight
        self.weight = spec.options.objective[CompleteViewOptions].complete_view_weight

    @classmethod
    def active(cls, options: Options) -> bool:
        """With a weight, unless nothing is ever hidden: then it would be `Segmentation` again."""
        return (
            options.objective[CompleteViewOptions].complete_view_weight > 0
            and options.sampling.mask_sampling != "fixed"
        )

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """See `Term.needs`."""
        return Needs("learns", teacher_scale=options.objective[SharedOptions].teacher_scale)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        loss = step.segmentation_loss(step.complete)
        return TermValue(self.segmentation_weight * (self.weight * loss), {"complete": loss})
