"""Soft-label distillation L_SL (eq. 7-8): every modality alone learns from the fusion of all.

Differs from the text and its code (which disagree with each other): KL(soft label || modality) of proper distributions,
temperature on both sides and squared in front, mean over kept voxels, no class weights. The published form, raw logits
inside a log with weights from the soft label, has its minimum where everything is background.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nnunetv2_mgml.objective.consistency import gives_truth_more
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, per_sample, voxel_mean, weighted_mean


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
        count = available.sum(1, keepdim=True)
        share = (available / count.clamp_min(1)).to(target.dtype)
        kept = keep[:, 0] if valid is None else keep[:, 0] & valid
        if labels is not None:
            students = (at_least_float32(logits) / temperature).log_softmax(2)
            divergence = (target.exp()[:, None] * (target[:, None] - students)).sum(2)
            taught = gives_truth_more(target[:, None], students, labels).to(divergence.dtype) * share.reshape(
                *share.shape, *[1] * (divergence.ndim - 2)
            )
            return temperature**2 * weighted_mean(voxel_mean((taught * divergence).sum(1), kept), count[:, 0])
        # The target is the same for all modalities, so only the mean of their log-probabilities enters.
        mean: torch.Tensor = _MeanLogSoftmax.apply(at_least_float32(logits), share, temperature)
        divergence = (target.exp() * (target - mean)).sum(1)
        return temperature**2 * weighted_mean(voxel_mean(divergence, kept), count[:, 0])


class _MeanLogSoftmax(torch.autograd.Function):
    """Mean of ``log_softmax(L_m / tau)`` over modalities, one after another; keeps the students and nothing of theirs.

    Maps logits ``(B, M, K, *spatial)`` and each modality's share ``(B, M)`` to ``(B, K, *spatial)``.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, share: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(logits, share)
        ctx.temperature = temperature
        parts = (
            (one / temperature).log_softmax(1).mul_(per_sample(part, one))
            for one, part in zip(logits.unbind(1), share.unbind(1), strict=True)
        )
        mean = next(parts)
        for part in parts:
            mean += part
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, share = ctx.saved_tensors
        own = torch.empty_like(logits)
        whole = gradient.sum(1, keepdim=True)
        for one, part, result in zip(logits.unbind(1), share.unbind(1), own.unbind(1), strict=True):
            moved = (one / ctx.temperature).softmax(1).mul_(whole)
            torch.sub(gradient, moved, out=result).mul_(per_sample(part / ctx.temperature, one))
        return own, None, None
