"""L_SL and L_CR as the paper's text has them, for reproduction only (``reading=paper``).

Text and code disagree with each other and neither trains well; ``docs/method.md`` lists the measured facts. Written
from the formulas, with guards so that nothing becomes NaN. Raw logits are fused with a log-*sum*-exp, and gradients
reach the soft label and the MetaNetwork. Weights stay those of the options; published are tau 6, L_SL
0.3 tau^2 / 10 = 1.08, L_CR 0.01: ``mgml plan --preset paper-losses``.
"""

from __future__ import annotations

import torch

from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.objective.base import TermValue, register
from nnunetv2_mgml.objective.consistency import divergence_map
from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters
from nnunetv2_mgml.objective.published.fusion import class_weights, published_meta_network, raw_fusion
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, voxel_mean
from nnunetv2_mgml.objective.terms.consistency import Consistency, ConsistencyOptions
from nnunetv2_mgml.objective.terms.soft_label import Fused, SoftLabel
from nnunetv2_mgml.objective.voxel_masking import keep_map
from nnunetv2_mgml.plans.options import Options


@register
class PaperSoftLabel(SoftLabel):
    """L_SL of eq. 6-8 as printed; it trains the MetaNetwork."""

    reading = "paper"
    summary = "eq. 1-8 as printed"

    def build_meta_network(self) -> MetaNetwork:
        """Return a MetaNetwork with the published layers and start values."""
        return published_meta_network(
            self.spec.num_modalities, self.spec.num_classes, self.options.meta_hidden, self.options.published_meta
        )

    def meta_input(self, means: torch.Tensor) -> torch.Tensor:
        """The text stops no gradient."""
        return means

    def fuse(self, step: Step) -> Fused:
        """Return the fusion of the raw logits."""
        parameters = self.parameters_of(step)
        return Fused(raw_fusion(step.modality_logits, self.present(step), parameters), parameters.w_f, parameters)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        with no_autocast(step.modality_logits):
            parameters = self.parameters_of(step)
            loss = self.published_loss(step, parameters)
            return TermValue(self.weighted(loss, step), {"soft_label": loss}, self.noted(parameters))

    def published_loss(self, step: Step, parameters: MetaParameters) -> torch.Tensor:
        """Return L_SL, unweighted."""
        return paper_soft_label_loss(
            step.modality_logits,
            self.present(step),
            parameters,
            self.options.mask_ratio,
            step.modality_valid,
            self.options.mask_mode,
        )


@register
class PaperConsistency(Consistency):
    """L_CR of eq. 9 as printed."""

    reading = "paper"
    summary = "eq. 9 as printed"

    @classmethod
    def active(cls, options: Options) -> bool:
        """With a weight: samples count whose student sees everything, too."""
        return options.objective[ConsistencyOptions].consistency_weight > 0

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """As published, at full resolution."""
        return super().needs(options)._replace(teacher_scale=0)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        loss = self.published_loss(step)
        return TermValue(step.ramp * self.weight * loss, {"consistency": loss})

    def published_loss(self, step: Step) -> torch.Tensor:
        """Return L_CR, unweighted."""
        return paper_consistency_loss(step.student, step.teacher, self.temperature, self.spec.regions, step.valid)


def paper_soft_label_loss(
    logits: torch.Tensor,
    available: torch.Tensor,
    parameters: MetaParameters,
    ratio: float,
    valid: torch.Tensor | None = None,
    mode: str = "confidence",
) -> torch.Tensor:
    """Eq. 6-8 as printed: ``-w_c p log S`` summed over voxels, with ``p`` the student and S inside the log.

    S and p are read as softmax of what the equations call logits, which the log needs. The text has no temperature and
    no stop-gradient here, so this trains the soft label towards the students as much as the reverse.

    Args:
        logits: ``(B, M, K, *spatial)``.
        available: ``(B, M)`` bool.
        parameters: one set per sample.
        ratio: mask ratio at ``w_f = 0.5``.
        valid: ``(B, *spatial)`` bool, or None.
        mode: of `keep_map`; eq. 6 is ``confidence``.

    Returns:
        Scalar; grows with the number of voxels.
    """
    with no_autocast(logits):
        log_fused = raw_fusion(logits, available, parameters).log_softmax(1)
        keep = keep_map(log_fused.detach().exp(), parameters.w_f, ratio, mode, valid=valid)
        keep = keep if valid is None else keep & valid[:, None]
        students = (at_least_float32(logits).softmax(2) * keep[:, None]).flatten(3)
        per_class = (students * log_fused.flatten(2)[:, None]).sum(-1)
        wce = -(class_weights(students) * per_class).sum(-1)
        count = available.sum(1).clamp_min(1)
        return ((wce * available).sum(1) / count).mean()


def paper_consistency_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, regions: bool, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 9 as printed: mean over voxels, no tau^2, every sample. Shapes as `consistency.consistency_loss`."""
    with no_autocast(student):
        return voxel_mean(divergence_map(student, teacher, temperature, regions), valid).mean()
