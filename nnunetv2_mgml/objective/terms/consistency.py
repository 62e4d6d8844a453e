"""L_CR (eq. 9): the prediction from what is visible learns from that from all a case has. The loss: `consistency`."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.objective.base import SharedOptions, Term, TermSpec, TermValue, register
from nnunetv2_mgml.objective.consistency import consistency_loss
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.plans.options import OptionGroup, Options, option


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
        False,
        "the teacher sees its own, stronger intensity augmentation (a second encoder pass); only where this term is "
        "on. complete_view_weight trains on that view too; the teacher of rebalancing stays as it is",
    )
    teacher_dropout: bool = option(
        False, "random layers act in the teacher's pass too, as in the published code; as above"
    )


@register
class Consistency(Term):
    """Trains the encoders and the fused path of the student; the teacher gets no gradient."""

    name = "consistency"
    order = 60
    summary = "distillation from the prediction from all modalities a case has (eq. 9)"
    option_group = ConsistencyOptions

    def __init__(self, spec: TermSpec) -> None:
        super().__init__(spec)
        shared = spec.options.objective[SharedOptions]
        self.weight = spec.options.objective[ConsistencyOptions].consistency_weight
        self.temperature = shared.temperature
        self.only_where_better = shared.teaching == "better"

    @classmethod
    def active(cls, options: Options) -> bool:
        """With a weight, unless nothing is ever hidden: then the student sees all the teacher sees."""
        return (
            options.objective[ConsistencyOptions].consistency_weight > 0 and options.sampling.mask_sampling != "fixed"
        )

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """See `Term.needs`."""
        own = options.objective[ConsistencyOptions]
        scale = options.objective[SharedOptions].teacher_scale
        return Needs("target", own_view=own.teacher_augmentation, noisy=own.teacher_dropout, teacher_scale=scale)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        output = step.teacher_output
        loss = consistency_loss(
            step.output.student[output],
            step.teacher,
            step.visible,
            step.available,
            self.temperature,
            self.spec.regions,
            step.valid_at(output),
            step.truth_at(output) if self.only_where_better else None,
        )
        return TermValue(step.ramp * self.weight * loss, {"consistency": loss})
