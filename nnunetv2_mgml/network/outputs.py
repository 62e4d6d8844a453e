"""What the network hands to the losses in a training step."""

from __future__ import annotations

from typing import NamedTuple

import torch


class SingleModalities(NamedTuple):
    """The fusion decoder run on each modality alone, and the prediction that teaches it; ``C`` decoder channels."""

    students: list[torch.Tensor]
    """Fused heads from one modality, each ``(B, M, R, *spatial_s)``, highest resolution first."""
    features: torch.Tensor
    """What the full-resolution head of a student reads, ``(B, M, C, *spatial)``."""
    teacher: list[torch.Tensor]
    """Fused heads from all modalities the sample has, each ``(B, R, *spatial_s)``, without gradient."""
    teacher_features: torch.Tensor
    """``(B, C, *spatial)``, without gradient."""


class TrainingOutput(NamedTuple):
    """Result of ``MultiEncoderUNet.forward(..., return_aux=True)``.

    ``B`` batch, ``M`` modalities, ``R`` fused heads (regions, or labels with background), ``K`` label classes with
    background. All are raw logits.
    """

    student: list[torch.Tensor]
    """Fused prediction from the sampled subset, each ``(B, R, *spatial_s)``, highest resolution first."""
    modality: torch.Tensor | None
    """Shared decoder's prediction from each modality alone, ``(B, M, K, *spatial)``; None when no loss needs it."""
    teacher: torch.Tensor | None
    """Fused prediction from all modalities that exist, ``(B, R, *spatial)``; taught from without gradient."""
    auxiliary: list[torch.Tensor]
    """The fusion design's own label logits, each ``(B, K, *spatial_s)`` at its own resolution; may be empty."""
    fusion_loss: torch.Tensor
    """Sum of the loss terms the fusion design computes itself (a KL divergence, ...), scalar float32; often 0."""
    single: SingleModalities | None = None
    """What rebalancing compares; None when not asked."""
    complete: list[torch.Tensor] | None = None
    """The teacher's prediction with gradient, at all resolutions, shaped as ``student``; None when not asked."""
