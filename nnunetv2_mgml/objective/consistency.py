"""Consistency regularisation L_CR (eq. 9): the incomplete view learns from the complete one, same weights.

Differs from the text in the factor tau^2, which keeps the gradient independent of the temperature, and in skipping
samples whose student already saw everything. The published code feeds softmax outputs as logits (the divergence is
then at most 0.007 per voxel) and sums over voxels, which ties the term's weight to the patch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, voxel_mean, weighted_mean


def divergence_map(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, regions: bool, truth: torch.Tensor | None = None
) -> torch.Tensor:
    """KL(teacher || student) at a temperature, voxel by voxel.

    Args:
        student: logits ``(B, R, *spatial)``.
        teacher: logits ``(B, R, *spatial)``; detached here.
        temperature: tau.
        regions: sum of ``R`` Bernoulli divergences instead of one over ``R`` exclusive classes.
        truth: ``(B, R, *spatial)`` region maps, or ``(B, *spatial)`` labels; where given, divergences count only where
            the teacher is closer to it than the student.

    Returns:
        ``(B, *spatial)``, at least float32, without the factor tau^2.
    """
    with no_autocast(student):
        if regions:
            found: torch.Tensor = _OfRegions.apply(student, teacher.detach(), temperature, truth)
            return found
        student = at_least_float32(student) / temperature
        teacher = at_least_float32(teacher.detach()) / temperature
        log_target, log_student = teacher.log_softmax(1), student.log_softmax(1)
        divergence = (log_target.exp() * (log_target - log_student)).sum(1)
        if truth is None:
            return divergence
        return torch.where(gives_truth_more(log_target[:, None], log_student[:, None], truth)[:, 0], divergence, 0)


class _OfRegions(torch.autograd.Function):
    """Sum of Bernoulli divergences, region by region: keeps the logits, which others keep too, and nothing beside them.

    Their gradient is the difference of the two probabilities, divided by the temperature.
    """

    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, temperature: float, truth: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(student, teacher, truth)
        ctx.temperature = temperature
        dtype = torch.promote_types(student.dtype, torch.float32)
        total = student.new_zeros((len(student), *student.shape[2:]), dtype=dtype)
        for region, (own, target) in enumerate(_scaled(student, teacher, temperature)):
            divergence = target.sigmoid().mul_(target - own).add_(F.softplus(own)).sub_(F.softplus(target))
            if truth is not None:
                divergence = torch.where(_is_closer(own, target, truth[:, region]), divergence, 0)
            total += divergence
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        student, teacher, truth = ctx.saved_tensors
        back = torch.empty_like(student)
        for region, (own, target) in enumerate(_scaled(student, teacher, ctx.temperature)):
            slope = own.sigmoid().sub_(target.sigmoid()).mul_(gradient).div_(ctx.temperature)
            if truth is not None:
                slope = torch.where(_is_closer(own, target, truth[:, region]), slope, 0)
            back[:, region] = slope
        return back, None, None, None


def _scaled(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the logits of both at the temperature, ``(B, *spatial)`` in at least float32, region by region."""
    for own, target in zip(student.unbind(1), teacher.unbind(1), strict=True):
        yield at_least_float32(own) / temperature, at_least_float32(target) / temperature


def _is_closer(own: torch.Tensor, target: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return torch.where(truth > 0, target > own, target < own)


def gives_truth_more(teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return where the teacher gives the true class more than the student does.

    Args:
        teacher: log-probabilities ``(B, 1 or M, K, *spatial)``.
        student: ``(B, M, K, *spatial)``.
        labels: ``(B, *spatial)`` in ``[0, K)``.

    Returns:
        ``(B, M, *spatial)`` bool.
    """
    index = labels[:, None, None]

    def of_truth(log_probabilities: torch.Tensor) -> torch.Tensor:
        return log_probabilities.gather(2, index.expand(-1, log_probabilities.shape[1], *index.shape[2:]))[:, :, 0]

    return of_truth(teacher) > of_truth(student)


def consistency_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    mask: torch.Tensor,
    available: torch.Tensor,
    temperature: float,
    regions: bool,
    valid: torch.Tensor | None = None,
    truth: torch.Tensor | None = None,
) -> torch.Tensor:
    """``tau^2 KL(teacher || student)``, averaged over voxels and over the samples whose student misses something.

    Args:
        student: fused logits from the sampled subset, ``(B, R, *spatial)``.
        teacher: fused logits from all that exists, ``(B, R, *spatial)``.
        mask: ``(B, M)`` bool, what the student saw.
        available: ``(B, M)`` bool, what the teacher saw.
        temperature: tau.
        regions: Bernoulli divergences (sigmoid heads) instead of softmax.
        valid: ``(B, *spatial)`` bool, voxels without the ignore label; None: all.
        truth: see `divergence_map`.

    Returns:
        Scalar, at least float32; 0, still attached to the graph, when no sample is left.
    """
    with no_autocast(student):
        divergence = divergence_map(student, teacher, temperature, regions, truth)
        incomplete = (mask != available).any(1)
        return temperature**2 * weighted_mean(voxel_mean(divergence, valid), incomplete)
