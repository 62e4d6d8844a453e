"""Confidence-guided random masking (eq. 6): which voxels the soft label teaches in this iteration.

The published code drops voxels uniformly and separately for each modality. Here, as in the text, there is one map for
all modalities and the soft label, unsure voxels are dropped more often, and a confident fusion (high w_f) drops fewer.
Dropped voxels leave the mean instead of being compared as zeros.
"""

from __future__ import annotations

import torch

from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, per_sample

MODES = ("confidence", "uniform")
_HIGHEST_CHANCE = 0.9  # even the least sure voxel is seen now and then
_HIGHEST_SHARE = 0.95


def drop_chance(
    soft_label: torch.Tensor, w_f: torch.Tensor, ratio: float, mode: str, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Return every voxel's chance to be dropped.

    It is proportional to ``1 - max_k soft_label``, and its mean over the voxels that are taught is
    ``2 ratio (1 - w_f)`` (at most 0.95). Where few voxels carry all the doubt, proportionality would ask for chances
    above 0.9: those are cut there, and what is missing is spread over the patch, so that the mean holds.

    Args:
        soft_label: ``(B, K, *spatial)`` probabilities.
        w_f: ``(B,)`` in [0, 1].
        ratio: expected dropped share at ``w_f = 0.5``.
        mode: ``confidence``, or ``uniform`` for the same chance everywhere.
        valid: ``(B, *spatial)`` bool, False where voxels are ignored; None: nowhere. Their chances mean nothing.

    Returns:
        ``(B, 1, *spatial)`` float32 in [0, 1], without gradient.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"Unknown mask mode '{mode}'. Allowed: {', '.join(MODES)}.")
    with no_autocast(soft_label), torch.no_grad():
        doubt = 1 - at_least_float32(soft_label).amax(1, keepdim=True)
        share = per_sample((2 * ratio * (1 - w_f.detach())).clamp(0, _HIGHEST_SHARE), doubt)
        if mode == "uniform":
            return share.expand_as(doubt)
        chance = (doubt * (share / _mean(doubt, valid).clamp_min(1e-12))).clamp(0, _HIGHEST_CHANCE)
        average = _mean(chance, valid)
        return torch.lerp(chance, torch.ones_like(chance), ((share - average) / (1 - average)).clamp_min(0))


def _mean(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of ``(B, 1, *spatial)`` over the valid voxels of each sample, 0 where there is none."""
    axes = tuple(range(1, values.ndim))
    if valid is None:
        return values.mean(axes, keepdim=True)
    taught = valid[:, None]
    return (values * taught).sum(axes, keepdim=True) / taught.sum(axes, keepdim=True).clamp_min(1)


def keep_map(
    soft_label: torch.Tensor,
    w_f: torch.Tensor,
    ratio: float,
    mode: str,
    generator: torch.Generator | None = None,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draw the voxels that are kept.

    Args:
        soft_label: ``(B, K, *spatial)`` probabilities.
        w_f: ``(B,)`` in [0, 1].
        ratio: expected dropped share at ``w_f = 0.5``; 0 keeps all.
        mode: ``confidence`` or ``uniform``.
        generator: source of randomness, on the device of ``soft_label``; None: PyTorch's own.
        valid: see `drop_chance`.

    Returns:
        ``(B, 1, *spatial)`` bool, True = kept.
    """
    chance = drop_chance(soft_label, w_f, ratio, mode, valid)
    return torch.rand(chance.shape, generator=generator, device=chance.device) >= chance
