"""L_SL and L_CR as the published code computes them, for reproduction only (``reading=reference``).

Written from an analysis of worldlikerr/MGML @ 51de28e (no licence, no code taken), with guards so that nothing becomes
NaN; ``docs/method.md`` lists how it differs from the text. Weights stay those of the options; published are tau 8,
hence L_SL 0.3 tau^2 / 10 = 1.92, L_CR 0.01. The whole published total, its criteria (`criteria`) and sums included, is
``mgml plan --preset reference-losses``.
"""

from __future__ import annotations

import math

import torch

from nnunetv2_mgml.objective.base import TermSpec, TermValue, register
from nnunetv2_mgml.objective.consistency import divergence_map
from nnunetv2_mgml.objective.meta_network import MetaParameters
from nnunetv2_mgml.objective.published.criteria import CLAMP, at_full_size, label_criterion
from nnunetv2_mgml.objective.published.fusion import class_weights, raw_fusion
from nnunetv2_mgml.objective.published.paper import PaperConsistency, PaperSoftLabel
from nnunetv2_mgml.objective.reading import ReadingOptions
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, weighted_mean
from nnunetv2_mgml.objective.terms.modality_decoder import ModalityDecoder
from nnunetv2_mgml.objective.terms.segmentation import Segmentation


def _everyone(step: Step) -> torch.Tensor:
    """The published code teaches and fuses all modalities, whatever the case has."""
    return torch.ones_like(step.available)


def _criterion_is_published(spec: TermSpec) -> bool:
    return spec.options.objective[ReadingOptions].criterion == "published"


@register
class ReferenceSegmentation(Segmentation):
    """With ``criterion=published`` the published losses of the fused prediction and of the fusion design's heads."""

    reading = "reference"
    summary = "the published code's, with criterion=published: fused labels at full resolution, the sum over all heads"

    def prediction_loss(self, step: Step) -> torch.Tensor:
        """See `Segmentation.prediction_loss`; regions, which the code does not have, keep nnU-Net's loss."""
        if self.spec.regions or not _criterion_is_published(self.spec):
            return super().prediction_loss(step)
        loss = label_criterion(step.student[:, None], step.labels, step.valid).sum()
        for lower in step.output.student[1:]:  # nothing of them: DDP refuses parameters without gradient
            loss = loss + lower.flatten()[:0].sum()
        return loss

    def auxiliary_loss(self, step: Step) -> torch.Tensor:
        """See `Segmentation.auxiliary_loss`."""
        if not _criterion_is_published(self.spec):
            return super().auxiliary_loss(step)
        losses = [
            label_criterion(at_full_size(head, step.labels.shape[1:])[:, None], step.labels, step.valid, softmax=False)
            for head in step.output.auxiliary
        ]
        return torch.cat(losses).sum()


@register
class ReferenceModalityDecoder(ModalityDecoder):
    """The shared decoder's loss over all modalities."""

    reading = "reference"
    summary = "the published code's: all modalities, whatever the case has"
    in_every_step = True

    def present(self, step: Step) -> torch.Tensor:
        """All pairs."""
        return _everyone(step)

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`; the published criterion is a sum over modalities."""
        if not _criterion_is_published(self.spec):
            return super().forward(step)
        loss = label_criterion(step.modality_logits, step.modality_labels, step.modality_valid).sum()
        return TermValue(self.weight * loss, {"modality": loss})


@register
class ReferenceSoftLabel(PaperSoftLabel):
    """The published code's L_SL."""

    reading = "reference"
    summary = "the published code's"
    in_every_step = True

    def present(self, step: Step) -> torch.Tensor:
        """All pairs."""
        return _everyone(step)

    def published_loss(self, step: Step, parameters: MetaParameters) -> torch.Tensor:
        """Return L_SL, unweighted."""
        logits, ratio, keep = step.modality_logits, self.options.mask_ratio, None
        if self.options.mask_mode == "published":
            keep = published_keep_map(logits, ratio)
        return reference_soft_label_loss(logits, parameters, self.temperature, ratio, step.modality_valid, keep)


@register
class ReferenceConsistency(PaperConsistency):
    """The published code's L_CR."""

    reading = "reference"
    summary = "the published code's"

    def published_loss(self, step: Step) -> torch.Tensor:
        """Return L_CR, unweighted."""
        return reference_consistency_loss(step.student, step.teacher, self.temperature, self.spec.regions, step.valid)


def published_keep_map(logits: torch.Tensor, ratio: float) -> torch.Tensor:
    """Draw the voxels that are kept as the published code does: ``floor(ratio * N)`` draws with replacement go.

    Args:
        logits: ``(B, M, K, *spatial)`` of ``N`` voxels; only its shape and device count.
        ratio: the code's mask ratio.

    Returns:
        ``(B, M, N)`` bool, True = kept; each modality has a map of its own.
    """
    batch, modalities = logits.shape[:2]
    voxels = math.prod(logits.shape[3:])
    drawn = torch.randint(voxels, (batch, modalities, int(ratio * voxels)), device=logits.device)
    keep = torch.ones(batch, modalities, voxels, dtype=torch.bool, device=logits.device)
    return keep.scatter_(2, drawn, value=False)


def reference_soft_label_loss(
    logits: torch.Tensor,
    parameters: MetaParameters,
    temperature: float,
    ratio: float,
    valid: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
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
        keep: ``(B, M, N)`` bool, see `published_keep_map`; None: every voxel is kept with the chance ``exp(-ratio)``.

    Returns:
        Scalar.
    """
    with no_autocast(logits):
        everyone = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
        fused = (raw_fusion(logits, everyone, parameters) / temperature).softmax(1).flatten(2)[:, None]
        logits = at_least_float32(logits).flatten(3)
        if keep is None:
            keep = torch.rand(logits[:, :, 0].shape, device=logits.device) < math.exp(-ratio)
        keep = keep[:, :, None]
        keep = keep if valid is None else keep & valid.flatten(1)[:, None, None]
        target = fused * keep
        log_student = (logits * keep).clamp(*CLAMP).log()
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
