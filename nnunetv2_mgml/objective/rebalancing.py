"""PASSION's preference-aware self-distillation (Shi et al., ACM MM 2024): no modality may fall behind the others.

For training sets whose cases lack modalities at unequal rates. The fused prediction teaches the same fusion decoder run
on each modality alone, voxel by voxel and class by class; modalities further from the teacher than the others get more
weight. Formulas and what differs from text and published code: ``docs/rebalancing.md``.

``B`` batch, ``M`` modalities, ``K`` label classes with background, ``R`` fused heads, ``C`` channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from nnunetv2_mgml.network.interface import SingleModalities
from nnunetv2_mgml.objective.consistency import divergence_map
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, voxel_mean

_SMALLEST_NORM = 1e-5


class Balance(NamedTuple):
    """Weights of the modalities, constant within an epoch; each ``(M,)`` float."""

    beta: torch.Tensor
    """Balance weight, from the distances of the epochs before."""
    count: torch.Tensor  # type: ignore[assignment]  # a tuple's method count() is of no use here
    """``w_m``: training cases over those that have the modality."""

    @classmethod
    def even(cls, num_modalities: int, device: torch.device) -> Balance:
        """Return ones: nothing known yet, every case complete."""
        return cls(torch.ones(num_modalities, device=device), torch.ones(num_modalities, device=device))


class Rebalancing(NamedTuple):
    """Result of `rebalancing_terms`."""

    distillation: torch.Tensor
    """``sum_m beta_m w_m KL_m``, scalar."""
    prototype: torch.Tensor
    """``sum_m r_m w_m proto_m``, scalar."""
    switch: torch.Tensor
    """``r_m`` in {0, 1}, ``(M,)``: 1 for a modality further from the teacher than the others."""
    distance: torch.Tensor
    """``dist_m`` of each sample, ``(B, M)`` without gradient; 0 where absent."""


def rebalancing_terms(
    single: SingleModalities,
    labels: torch.Tensor,
    valid: Sequence[torch.Tensor | None],
    available: torch.Tensor,
    balance: Balance,
    *,
    num_classes: int,
    temperature: float,
    regions: bool,
) -> Rebalancing:
    """Compute both distillation terms and the relative preference.

    Args:
        single: predictions and features from each modality alone, and the teacher's.
        labels: ``(B, *spatial)`` int64 in ``[0, K)``.
        valid: per resolution, highest first, ``(B, *spatial_s)`` bool, voxels that count, or None for all.
        available: ``(B, M)`` bool; the other pairs have weight 0 and gradient exactly 0.
        balance: weights of the modalities.
        num_classes: ``K``.
        temperature: tau of the distillation.
        regions: Bernoulli divergences (sigmoid heads) instead of softmax.
    """
    with no_autocast(single.features):
        divergence = modality_divergence(single, valid, temperature, regions)
        squared, distance = prototype_distances(single, labels, valid[0], num_classes)
        distance = torch.where(available, distance.detach(), 0)
        switch = (relative_preference(distance, available).sum(0) > 0).to(distance.dtype)
        beta, count = (weights.to(distance.dtype) for weights in balance)
        return Rebalancing(
            weighted_sum(divergence, available, beta * count),
            weighted_sum(squared, available, switch * count),
            switch,
            distance,
        )


def weighted_sum(values: torch.Tensor, available: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return ``sum_m weights_m values_m`` as a mean over samples; ``(B, M)``, ``(B, M)`` bool, ``(M,)`` -> scalar."""
    return (torch.where(available, values, 0) * weights).sum() / len(values)


def modality_divergence(
    single: SingleModalities, valid: Sequence[torch.Tensor | None], temperature: float, regions: bool
) -> torch.Tensor:
    """Return ``KL_m = tau^2 sum_s 2^-s mean KL(teacher || student)`` over resolutions ``s``, ``(B, M)``.

    The lowest of several resolutions is left out: nnU-Net does not train that head.
    """
    resolutions = max(1, len(single.students) - 1)
    total = single.students[0].new_zeros((), dtype=torch.float32)
    for s in range(resolutions):
        students, teacher = single.students[s], single.teacher[s]
        per_modality = [
            voxel_mean(divergence_map(students[:, m], teacher, temperature, regions), valid[s])
            for m in range(students.shape[1])
        ]
        total = total + 2.0**-s * temperature**2 * torch.stack(per_modality, 1)
    return total


def prototype_distances(
    single: SingleModalities, labels: torch.Tensor, valid: torch.Tensor | None, num_classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare where student and teacher see each class.

    A class's prototype is the mean feature of its voxels; every voxel's cosine similarity to it makes a map. Classes
    without a voxel in a sample are left out there.

    Args:
        single: ``features (B, M, C, *spatial)`` of the students and ``teacher_features (B, C, *spatial)``.
        labels: ``(B, *spatial)`` int64 in ``[0, K)``.
        valid: ``(B, *spatial)`` bool, voxels that count, or None for all.
        num_classes: ``K``.

    Returns:
        Mean squared difference (``proto_m``) and mean absolute difference (``dist_m``) of the maps of student and
        teacher over classes and voxels, each ``(B, M)``; 0 for a sample with no voxel to count.
    """
    classes = torch.arange(num_classes, device=labels.device)
    members = labels.flatten(1)[:, None] == classes[:, None]
    if valid is not None:
        members = members & valid.flatten(1)[:, None]
    members = members.to(torch.promote_types(single.features.dtype, torch.float32))
    sizes = members.sum(2)
    counted = members.sum(1, keepdim=True)
    cells = (sizes > 0).to(members.dtype)[:, :, None] * counted
    total = cells.sum((1, 2)).clamp_min(1)
    teacher = similarity_maps(single.teacher_features.detach(), members, sizes)
    squared, absolute = [], []
    for m in range(single.features.shape[1]):
        difference = (similarity_maps(single.features[:, m], members, sizes) - teacher) * cells
        squared.append(difference.square().sum((1, 2)) / total)
        absolute.append(difference.detach().abs().sum((1, 2)) / total)
    return torch.stack(squared, 1), torch.stack(absolute, 1)


def similarity_maps(features: torch.Tensor, members: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every voxel's feature with every class's mean feature.

    Args:
        features: ``(B, C, *spatial)``.
        members: ``(B, K, N)`` float, 1 for the voxels of a class.
        sizes: ``(B, K)``, their number.

    Returns:
        ``(B, K, N)``.
    """
    features = at_least_float32(features).flatten(2)
    prototypes = torch.einsum("bcn,bkn->bkc", features, members) / sizes.clamp_min(1)[:, :, None]
    return torch.einsum(
        "bkc,bcn->bkn",
        F.normalize(prototypes, dim=2, eps=_SMALLEST_NORM),
        F.normalize(features, dim=1, eps=_SMALLEST_NORM),
    )


def relative_preference(distance: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Return ``rp_m = dist_m / mean over the sample's modalities - 1``, ``(B, M)``.

    Positive: further from the teacher than the sample's other modalities. 0 where absent and where all distances are 0.
    """
    mean = distance.sum(1, keepdim=True) / available.sum(1, keepdim=True).clamp_min(1)
    relative = distance / torch.where(mean > 0, mean, 1) - 1
    return torch.where(available & (mean > 0), relative, 0)
