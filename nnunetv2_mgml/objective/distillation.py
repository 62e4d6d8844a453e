"""Soft-label distillation L_SL (eq. 7-8): every modality alone learns from the fusion of all.

Differs from the text and its code (which disagree with each other): KL(soft label || modality) of proper distributions,
temperature on both sides and squared in front, mean over kept voxels, no class weights. The published form, raw logits
inside a log with weights from the soft label, has its minimum where everything is background.
"""

from __future__ import annotations

import torch

from nnunetv2_mgml.objective.consistency import gives_truth_more
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, voxel_mean, weighted_mean


def soft_label_loss(
    logits: torch.Tensor,
    fused: torch.Tensor,
    available: torch.Tensor,
    keep: torch.Tensor,
    temperature: float,
    valid: torch.Tensor | None = None,
    train_target: bool = False,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """``tau^2 KL(softmax(S / tau) || softmax(L_m / tau))``, averaged over kept voxels and present (sample, modality).

    Args:
        logits: the students ``(B, M, K, *spatial)``; log-probabilities do as well.
        fused: ``S``, log-scores ``(B, K, *spatial)`` of an adaptive fusion.
        available: ``(B, M)`` bool; absent pairs have weight 0 and gradient exactly 0.
        keep: ``(B, 1, *spatial)`` bool.
        temperature: tau.
        valid: ``(B, *spatial)`` bool, voxels without the ignore label; None: all.
        labels: ``(B, *spatial)`` in ``[0, K)``; where given, a modality learns only where the soft label gives the true
            class more probability than it does itself.
        train_target: let gradients through the soft label (to the MetaNetwork: the paper's objective).

    Returns:
        Scalar, at least float32, non-negative up to rounding.
    """
    with no_autocast(logits):
        target = (at_least_float32(fused if train_target else fused.detach()) / temperature).log_softmax(1)
        students = (at_least_float32(logits) / temperature).log_softmax(2)
        count = available.sum(1, keepdim=True)
        share = (available / count.clamp_min(1)).to(students.dtype)
        kept = keep[:, 0] if valid is None else keep[:, 0] & valid
        if labels is not None:
            divergence = (target.exp()[:, None] * (target[:, None] - students)).sum(2)
            taught = gives_truth_more(target[:, None], students, labels).to(divergence.dtype) * share.reshape(
                *share.shape, *[1] * (divergence.ndim - 2)
            )
            return temperature**2 * weighted_mean(voxel_mean((taught * divergence).sum(1), kept), count[:, 0])
        # The target is the same for all modalities, so only the mean of their log-probabilities enters.
        students = (students * share.reshape(*share.shape, *[1] * (students.ndim - 2))).sum(1)
        divergence = (target.exp() * (target - students)).sum(1)
        return temperature**2 * weighted_mean(voxel_mean(divergence, kept), count[:, 0])
