"""L_SL and L_CR as published, for reproduction only: ``paper`` (the text) and ``reference`` (its code).

The two disagree with each other and neither trains well; ``docs/method.md`` lists the measured facts. Written from the
formulas and from an analysis of worldlikerr/MGML @ 51de28e (no licence, no code taken), with guards so that nothing
becomes NaN. Both fuse raw logits with a log-*sum*-exp and let gradients into the soft label and the MetaNetwork.
Weights stay those of the configuration; published are tau 6, L_SL 0.3 tau^2 / 10 = 1.08, L_CR 0.01 (text), and tau 8,
hence 1.92 (code).
"""

from __future__ import annotations

import math

import torch

from nnunetv2_mgml.objective.adaptive_fusion import smooth_max, smooth_min
from nnunetv2_mgml.objective.consistency import divergence_map
from nnunetv2_mgml.objective.meta_network import MetaParameters
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, per_sample, voxel_mean, weighted_mean
from nnunetv2_mgml.objective.voxel_masking import keep_map

_CLAMP = (0.005, 1.0)  # the published code's bounds of a "probability"


def raw_fusion(logits: torch.Tensor, available: torch.Tensor, parameters: MetaParameters) -> torch.Tensor:
    """Eq. 3-5 on raw logits with the sum over modalities, shifted so that it cannot overflow.

    Args:
        logits: ``(B, M, K, *spatial)``.
        available: ``(B, M)`` bool.
        parameters: one set per sample.

    Returns:
        ``(B, K, *spatial)``, differentiable in the logits and the parameters.
    """
    with no_autocast(logits):
        logits = at_least_float32(logits)
        log_count = available.sum(1).to(logits.dtype).log()
        high = smooth_max(logits, available, parameters.beta)
        low = smooth_min(logits, available, parameters.alpha)
        high = high + per_sample(log_count / parameters.beta, high)
        low = low - per_sample(log_count / parameters.alpha, low)
        return torch.lerp(low, high, per_sample(parameters.w_f, low))


def _class_weights(probabilities: torch.Tensor) -> torch.Tensor:
    """``1 - share of the class`` (below eq. 8), ``(..., K, N)`` -> ``(..., K)``."""
    mass = probabilities.sum(-1)
    return 1 - mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)


def paper_soft_label_loss(
    logits: torch.Tensor,
    available: torch.Tensor,
    parameters: MetaParameters,
    ratio: float,
    valid: torch.Tensor | None = None,
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

    Returns:
        Scalar; grows with the number of voxels.
    """
    with no_autocast(logits):
        log_fused = raw_fusion(logits, available, parameters).log_softmax(1)
        keep = keep_map(log_fused.detach().exp(), parameters.w_f, ratio, "confidence")
        keep = keep if valid is None else keep & valid[:, None]
        students = (at_least_float32(logits).softmax(2) * keep[:, None]).flatten(3)
        per_class = (students * log_fused.flatten(2)[:, None]).sum(-1)
        wce = -(_class_weights(students) * per_class).sum(-1)
        count = available.sum(1).clamp_min(1)
        return ((wce * available).sum(1) / count).mean()


def paper_consistency_loss(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, regions: bool, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 9 as printed: mean over voxels, no tau^2, every sample. Shapes as `consistency.consistency_loss`."""
    with no_autocast(student):
        return voxel_mean(divergence_map(student, teacher, temperature, regions), valid).mean()


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
        return -(_class_weights(target) * per_class).sum((1, 2)).mean()


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
