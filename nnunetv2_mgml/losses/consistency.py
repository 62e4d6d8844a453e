"""Consistency regularisation L_CR (eq. 9): the incomplete view learns from the complete one, same weights.

Differs from the text in the factor tau^2, which keeps the gradient independent of the temperature, and in skipping
samples whose student already saw everything. The published code feeds softmax outputs as logits (the divergence is
then at most 0.007 per voxel) and sums over voxels, which ties the term's weight to the patch size.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from nnunetv2_mgml.losses.tensors import at_least_float32, no_autocast, voxel_mean, weighted_mean


def divergence_map(student: torch.Tensor, teacher: torch.Tensor, temperature: float, regions: bool) -> torch.Tensor:
    """KL(teacher || student) at a temperature, voxel by voxel.

    Args:
        student: logits ``(B, R, *spatial)``.
        teacher: logits ``(B, R, *spatial)``; detached here.
        temperature: tau.
        regions: sum of ``R`` Bernoulli divergences instead of one over ``R`` exclusive classes.

    Returns:
        ``(B, *spatial)``, at least float32, without the factor tau^2.
    """
    with no_autocast(student):
        student = at_least_float32(student) / temperature
        teacher = at_least_float32(teacher.detach()) / temperature
        if regions:
            probability = teacher.sigmoid()
            return (probability * (teacher - student) + F.softplus(student) - F.softplus(teacher)).sum(1)
        log_target = teacher.log_softmax(1)
        return (log_target.exp() * (log_target - student.log_softmax(1))).sum(1)


def consistency_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, available: torch.Tensor,
                     temperature: float, regions: bool, valid: torch.Tensor | None = None) -> torch.Tensor:
    """``tau^2 KL(teacher || student)``, averaged over voxels and over the samples whose student misses something.

    Args:
        student: fused logits from the sampled subset, ``(B, R, *spatial)``.
        teacher: fused logits from all that exists, ``(B, R, *spatial)``.
        mask: ``(B, M)`` bool, what the student saw.
        available: ``(B, M)`` bool, what the teacher saw.
        temperature: tau.
        regions: Bernoulli divergences (sigmoid heads) instead of softmax.
        valid: ``(B, *spatial)`` bool, voxels without the ignore label; None: all.

    Returns:
        Scalar, at least float32; 0, still attached to the graph, when no sample is left.
    """
    with no_autocast(student):
        divergence = divergence_map(student, teacher, temperature, regions)
        incomplete = (mask != available).any(1)
        return temperature ** 2 * weighted_mean(voxel_mean(divergence, valid), incomplete)
