"""The segmentation losses of the published code: cross-entropy weighted by what a class is not, and batch Dice.

Written from an analysis of worldlikerr/MGML @ 51de28e (no licence, no code taken). Everything is computed on
probabilities: those below 0.005 are clipped, which ends their gradient from the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from nnunetv2_mgml.objective.published.fusion import class_weights
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast

CLAMP = (0.005, 1.0)
"""The published code's bounds of a probability inside a logarithm."""
_SMOOTH = 1e-7
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def label_criterion(
    predictions: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor | None = None, softmax: bool = True
) -> torch.Tensor:
    """Weighted cross-entropy plus Dice of several predictions of the same labels.

    Args:
        predictions: ``(B, H, K, *spatial)``, logits of ``H`` heads.
        labels: ``(B, *spatial)`` int64 in ``[0, K)``.
        valid: ``(B, *spatial)`` bool, voxels that count; None: all.
        softmax: whether ``predictions`` are logits; else they are probabilities already.

    Returns:
        ``(H,)``, at least float32.
    """
    with no_autocast(predictions):
        predictions = at_least_float32(predictions)
        probabilities = (predictions.softmax(2) if softmax else predictions).flatten(3)
        truth = one_hot(labels, probabilities.shape[2], valid).to(probabilities.dtype)
        return weighted_cross_entropy(probabilities, truth, class_weights(truth)) + dice_loss(
            probabilities, truth, valid
        )


def one_hot(labels: torch.Tensor, classes: int, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``(B, K, N)`` bool for labels ``(B, *spatial)``; nothing is True in a voxel that does not count."""
    labels = labels.flatten(1)[:, None]
    truth = labels == torch.arange(classes, device=labels.device)[:, None]
    return truth if valid is None else truth & valid.flatten(1)[:, None]


def weighted_cross_entropy(probabilities: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return ``-mean of w_k t log p`` over samples and voxels, ``(H,)``.

    Args:
        probabilities: ``(B, H, K, N)``.
        truth: ``(B, K, N)``, one-hot; all zero in a voxel that does not count.
        weights: ``(B, K)``; published are `class_weights` of the truth.
    """
    of_class = (truth[:, None] * probabilities.clamp(*CLAMP).log()).sum(3)
    counted = truth.sum((1, 2)).clamp_min(1)
    return -((of_class * weights[:, None]).sum(2) / counted[:, None]).mean(0)


def dice_loss(probabilities: torch.Tensor, truth: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``1 - Dice`` over the whole batch, averaged over all classes with the background, ``(H,)``.

    Args:
        probabilities: ``(B, H, K, N)``.
        truth: ``(B, K, N)``, one-hot.
        valid: ``(B, *spatial)`` bool, voxels that count; None: all.
    """
    if valid is not None:
        probabilities = probabilities * valid.flatten(1)[:, None, None]
    common = (probabilities * truth[:, None]).sum((0, 3))
    sizes = probabilities.sum((0, 3)) + truth.sum((0, 2))
    return 1 - (2 * common / (sizes + _SMOOTH)).mean(1)


def at_full_size(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the probabilities of label logits ``(B, K, *spatial_s)``, interpolated linearly to ``(B, K, *size)``."""
    with no_autocast(logits):
        probabilities = at_least_float32(logits).softmax(1)
        if probabilities.shape[2:] == torch.Size(size):
            return probabilities
        return F.interpolate(probabilities, tuple(size), mode=_MODES[len(size)], align_corners=True)
