"""Small tensor helpers shared by the losses: the float32 island, broadcasting, and averages over voxels."""

from __future__ import annotations

import torch


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32, or unchanged where it is wider (float64 keeps gradient checks possible)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: torch.Tensor) -> torch.autocast:
    """Return a context in which mixed precision is off for the device of ``x``.

    A KL divergence at temperature 6 lies below float16's resolution, and smooth min overflows there (a spread of
    logits of 655 times a sharpness of 100), so no loss term of ours is left to autocast.
    """
    return torch.autocast(device_type=x.device.type, enabled=False)


def per_sample(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape ``(B,)`` so that it broadcasts against ``like`` ``(B, ...)``.

    Multiplying without this silently pairs samples with voxels where the sizes happen to agree.
    """
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype)


def voxel_mean(values: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Average over voxels, sample by sample.

    Args:
        values: ``(B, *spatial)``.
        counted: ``(B, *spatial)`` bool, the voxels that take part; None: all.

    Returns:
        ``(B,)``; 0 for a sample with no voxel to count.
    """
    values = values.flatten(1)
    if counted is None:
        return values.mean(1)
    counted = counted.flatten(1).to(values.dtype)
    return (values * counted).sum(1) / counted.sum(1).clamp_min(1)


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return ``sum(values * weights) / sum(weights)`` as a scalar; 0, still attached to the graph, without weight."""
    weights = weights.to(values.dtype)
    total = weights.sum()
    return (values * weights).sum() / torch.where(total > 0, total, 1)
