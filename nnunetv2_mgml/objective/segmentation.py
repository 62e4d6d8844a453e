"""Dice + cross-entropy of the label predictions beside the fused one (part of L_seg, eq. 10).

The fused output keeps nnU-Net's own loss. The decoder shared by all modalities and the fusion design's auxiliary heads
predict mutually exclusive labels, also where the fused output predicts overlapping regions, so their target is rebuilt
here. Dice is nnU-Net's (foreground classes, smooth 1e-5, negative), which keeps the logged terms comparable. Unlike
nnU-Net's, cross-entropy is averaged per sample before the batch, and batch Dice stays on one process under DDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, weighted_mean

_SMOOTH = 1e-5


def label_target(
    target: torch.Tensor, *, regions: bool, ignore_label: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the class index of every voxel and the voxels that count.

    Args:
        target: nnU-Net's target. Regions: ``(B, R, *spatial)`` bool or float, with the ignore mask as one more channel
            at the end where there is an ignore label. Labels: ``(B, 1, *spatial)``, any dtype.
        regions: which of the two.
        ignore_label: nnU-Net's ignore label, or None.

    Returns:
        Labels ``(B, *spatial)`` int64 (region ``i`` becomes class ``i + 1`` and overwrites earlier ones, as
        ``regions_class_order`` does; 0 where ignored), and the valid voxels ``(B, *spatial)`` bool, None for all.
    """
    if not regions:
        labels = target[:, 0].long()
        if ignore_label is None:
            return labels, None
        valid = labels != ignore_label
        return torch.where(valid, labels, 0), valid
    inside = target > 0.5 if target.is_floating_point() else target.bool()
    counted = None if ignore_label is None else ~inside[:, -1]
    labels = torch.zeros_like(inside[:, 0], dtype=torch.long)
    for region in range(inside.shape[1] - (ignore_label is not None)):
        labels = torch.where(inside[:, region], region + 1, labels)
    return (labels if counted is None else torch.where(counted, labels, 0)), counted


def class_mass(log_probabilities: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Sum the probability of every class over the voxels that count.

    Args:
        log_probabilities: ``(B, M, K, *spatial)``.
        valid: ``(B, *spatial)`` bool, or None for all.

    Returns:
        ``(B, M, K)``; the predicted volume in Dice, and the MetaNetwork's input (eq. 1) once divided by the voxels.
    """
    mass: torch.Tensor = _ClassMass.apply(log_probabilities, valid)
    return mass


class _ClassMass(torch.autograd.Function):
    """Keeps the log-probabilities, which others keep too, and not the probabilities beside them."""

    @staticmethod
    def forward(ctx: Any, log_probabilities: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(log_probabilities, valid)
        probabilities = log_probabilities.exp().flatten(3)
        if valid is not None:
            probabilities.mul_(valid.flatten(1)[:, None, None])
        return probabilities.sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probabilities, valid = ctx.saved_tensors
        own = log_probabilities.exp()
        own.mul_(gradient.reshape(*gradient.shape, *[1] * (own.ndim - gradient.ndim)))
        if valid is not None:
            own.mul_(valid[:, None, None])
        return own, None


def segmentation_of_log_probabilities(
    log_probabilities: torch.Tensor,
    mass: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor | None,
    present: torch.Tensor,
    batch_dice: bool,
    modality_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`modality_segmentation_loss` for log-probabilities ``(B, M, K, *spatial)`` whose `class_mass` is known.

    With ``modality_weights (M,)``: the weighted *sum* over the visible modalities, averaged over samples.
    """
    index = labels.flatten(1)[:, None, None].expand(-1, log_probabilities.shape[1], 1, -1)
    log_true = log_probabilities.flatten(3).gather(2, index).squeeze(2)
    with torch.no_grad():
        classes = torch.arange(1, log_probabilities.shape[2], device=labels.device)
        truth = (labels.flatten(1)[:, None] == classes[:, None]).to(log_true.dtype)
        counted = torch.ones_like(truth[:, 0]) if valid is None else valid.flatten(1).to(log_true.dtype)
        truth = truth if valid is None else truth * counted[:, None]
        weights = present.to(log_true.dtype)
        volume = weights[:, :, None] * truth.sum(-1)[:, None]
    cross_entropy = -(log_true * counted[:, None]).sum(-1) / counted.sum(-1).clamp_min(1)[:, None]
    # A voxel adds to the intersection of its own class only, so the gathered probabilities are all that is needed.
    intersection = weights[:, :, None] * torch.einsum("bmn,bkn->bmk", log_true.exp(), truth)
    predicted = weights[:, :, None] * mass[:, :, 1:]
    if batch_dice:
        intersection, predicted, volume = (x.sum(0, keepdim=True) for x in (intersection, predicted, volume))
    dice = (2 * intersection + _SMOOTH) / (predicted + volume + _SMOOTH).clamp_min(1e-8)
    if modality_weights is not None:
        return ((cross_entropy - dice.mean(-1)) * weights * modality_weights).sum() / len(weights)
    dice_weights = weights.amax(0, keepdim=True) if batch_dice else weights
    return weighted_mean(cross_entropy, weights) - weighted_mean(dice.mean(-1), dice_weights)


def modality_segmentation_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    valid: torch.Tensor | None,
    present: torch.Tensor,
    batch_dice: bool = False,
) -> torch.Tensor:
    """Dice + cross-entropy of each modality's own prediction, averaged over the present (sample, modality) pairs.

    Args:
        logits: ``(B, M, K, *spatial)``, finite.
        labels: ``(B, *spatial)`` int64 in ``[0, K)``.
        valid: ``(B, *spatial)`` bool, voxels that count; None: all.
        present: ``(B, M)`` bool; the other pairs have weight 0 and gradient exactly 0.
        batch_dice: Dice per modality over the batch instead of per sample.

    Returns:
        Scalar, at least float32, in ``[-1, inf)``; 0 where nothing is present.
    """
    with no_autocast(logits):
        log_probabilities = at_least_float32(logits).log_softmax(2)
        return segmentation_of_log_probabilities(
            log_probabilities, class_mass(log_probabilities, valid), labels, valid, present, batch_dice
        )


def auxiliary_loss(
    outputs: Sequence[torch.Tensor], labels: torch.Tensor, valid: torch.Tensor | None, batch_dice: bool = False
) -> torch.Tensor:
    """Dice + cross-entropy of auxiliary outputs at their own resolution, averaged over the outputs.

    RFNet adds its four heads up; the mean keeps ``auxiliary_weight`` independent of how many a design has.

    Args:
        outputs: label logits, each ``(B, K, *spatial_s)``; may be empty.
        labels: ``(B, *spatial)`` int64 at full resolution; brought to each output's by nnU-Net's nearest neighbour.
        valid: ``(B, *spatial)`` bool, or None.
        batch_dice: Dice over the batch instead of per sample.

    Returns:
        Scalar float32; 0 for no output.
    """
    if not outputs:
        return torch.zeros((), device=labels.device)
    total = torch.zeros((), device=labels.device)
    coded = (labels if valid is None else torch.where(valid, labels, -1))[:, None].float()
    for logits in outputs:
        small = coded
        if logits.shape[2:] != coded.shape[2:]:
            small = F.interpolate(coded, logits.shape[2:], mode="nearest-exact")
        small_valid = None if valid is None else small[:, 0] >= 0
        small_labels = small[:, 0].clamp_min(0).long()
        everyone = torch.ones(logits.shape[0], 1, dtype=torch.bool, device=logits.device)
        total = total + modality_segmentation_loss(logits[:, None], small_labels, small_valid, everyone, batch_dice)
    return total / len(outputs)
