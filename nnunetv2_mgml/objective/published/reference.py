"""L_SL and L_CR as the published code computes them, for reproduction only (``reading=reference``).

Written from an analysis of worldlikerr/MGML @ 51de28e (no licence, no code taken), with guards so that nothing becomes
NaN; ``docs/method.md`` lists how it differs from the text. Weights stay those of the options; published are tau 8,
hence L_SL 0.3 tau^2 / 10 = 1.92, L_CR 0.01.
"""

from __future__ import annotations

import math

import torch

from nnunetv2_mgml.objective.base import register
from nnunetv2_mgml.objective.consistency import divergence_map
from nnunetv2_mgml.objective.meta_network import MetaParameters
from nnunetv2_mgml.objective.published.fusion import class_weights, raw_fusion
from nnunetv2_mgml.objective.published.paper import PaperConsistency, PaperSoftLabel
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, weighted_mean
from nnunetv2_mgml.objective.terms.modality_decoder import ModalityDecoder

_CLAMP = (0.005, 1.0)  # the published code's bounds of a "probability"


def _everyone(step: Step) -> torch.Tensor:
    """The published code teaches and fuses all modalities, whatever the case has."""
    return torch.ones_like(step.available)


@register
class ReferenceModalityDecoder(ModalityDecoder):
    """The shared decoder's loss over all modalities."""

    reading = "reference"
    summary = "the published code's: all modalities, whatever the case has"

    def present(self, step: Step) -> torch.Tensor:
        """All pairs."""
        return _everyone(step)


@register
class ReferenceSoftLabel(PaperSoftLabel):
    """The published code's L_SL."""

    reading = "reference"
    summary = "the published code's"

    def present(self, step: Step) -> torch.Tensor:
        """All pairs."""
        return _everyone(step)

    def published_loss(self, step: Step, parameters: MetaParameters) -> torch.Tensor:
        """Return L_SL, unweighted."""
        return reference_soft_label_loss(
            step.modality_logits, parameters, self.temperature, self.options.mask_ratio, step.valid
        )


@register
class ReferenceConsistency(PaperConsistency):
    """The published code's L_CR."""

    reading = "reference"
    summary = "the published code's"

    def published_loss(self, step: Step) -> torch.Tensor:
        """Return L_CR, unweighted."""
        return reference_consistency_loss(step.student, step.teacher, self.temperature, self.spec.regions, step.valid)


def reference_soft_label_loss(
    logits: torch.Tensor,
    parameters: MetaParameters,
    temperature: float,
    ratio: float,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """The published code's L_SL: ``-w_c S log(clamp(L_m))``, mean over voxels, *summed* over all modalities.

    Raw logits clamped to [0.005, 1] stand for the student's probabilities, tau divides S only, weights come from the
    masked S, and each modality has a uniform mask of its own. The code draws ``ratio * N`` voxels with replacement,
    which zeroes a share of ``1 - exp(-ratio)`` (18.1 % at 0.2); they stay in the denominator.

    Args:
        logits: ``(B, M, K, *spatial)``; all modalities take part, whether the case has them or not.
        parameters: one set per sample.
        temperature: tau.
        ratio: the code's mask ratio.
        valid: ``(B, *spatial)`` bool, or None.

    Returns:
        Scalar.
    """
    with no_autocast(logits):
        everyone = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        fused = (raw_fusion(logits, everyone, parameters) / temperature).softmax(1).flatten(2)[:, None]
        logits = at_least_float32(logits).flatten(3)
        keep = torch.rand(logits[:, :, :1].shape, device=logits.device) < math.exp(-ratio)
        keep = keep if valid is None else keep & valid.flatten(1)[:, None, None]
        target = fused * keep
        log_student = (logits * keep).clamp(*_CLAMP).log()
        per_class = (target * log_student).mean(-1)
        return -(class_weights(target) * per_class).sum((1, 2)).mean()


def reference_consistency_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, regions: bool, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The published code's L_CR: softmax outputs passed as logits, *summed* over voxels, divided by the batch size.

    Shapes as `consistency.consistency_loss`; sigmoid takes softmax's place for regions, which the code does not have.
    """
    with no_autocast(student):
        student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
        twice = [x.sigmoid() if regions else x.softmax(1) for x in (student, teacher)]
        divergence = divergence_map(twice[0], twice[1], temperature, regions).flatten(1)
        if valid is not None:
            divergence = divergence * valid.flatten(1)
        return weighted_mean(divergence.sum(1), torch.ones_like(divergence[:, 0]))
