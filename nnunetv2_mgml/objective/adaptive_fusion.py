"""Adaptive modality fusion (AMF, eq. 3-5): the soft label every modality is taught.

Differs from the text, which puts raw logits into a log-*sum*-exp: here it is a log-*mean*-exp of log-probabilities.
With raw logits, constants that change no prediction changed the winning class in 44 % of voxels; with the sum, one
modality alone would not give itself back. Only the modalities that exist take part. Float32 throughout.
"""

from __future__ import annotations

import torch

from nnunetv2_mgml.objective.meta_network import MetaParameters
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, per_sample


def smooth_max(values: torch.Tensor, available: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """Smooth maximum over the modalities (eq. 3 with the mean): the mean for sharpness -> 0, the maximum for -> inf.

    Args:
        values: ``(B, M, K, *spatial)``, finite.
        available: ``(B, M)`` bool, at least one True per row.
        sharpness: beta, ``(B,)``, not 0.

    Returns:
        ``(B, K, *spatial)``, at least float32, differentiable in ``values`` and ``sharpness``.
    """
    with no_autocast(values):
        values = at_least_float32(values)
        scaled = (values * per_sample(sharpness, values)).masked_fill(_absent(available, values), -torch.inf)
        total = scaled.logsumexp(1)
        return (total - per_sample(available.sum(1), total).log()) / per_sample(sharpness, total)


def smooth_min(values: torch.Tensor, available: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """Smooth minimum over the modalities (eq. 4 with the mean): `smooth_max` at a negative sharpness."""
    return smooth_max(values, available, -sharpness)


def adaptive_fusion(
    logits: torch.Tensor, available: torch.Tensor, parameters: MetaParameters, *, normalised: bool = False
) -> torch.Tensor:
    """Fuse the modalities' predictions (eq. 5): ``S = w_f H + (1 - w_f) C``.

    The result is differentiable (once) in the meta-parameters and constant in the logits: students must not be able to
    move their target. As the parameters are a few numbers per sample, their derivatives are found on the way forward
    and nothing of the size of the logits is kept for backward.

    Args:
        logits: ``(B, M, K, *spatial)``, any floating dtype, finite; log-probabilities where ``normalised``.
        available: ``(B, M)`` bool, at least one True per row.
        parameters: one set per sample; `MetaParameters.fixed` gives the paper's FPSLD.
        normalised: skip the log-softmax.

    Returns:
        ``(B, K, *spatial)`` float32 log-scores; ``softmax(S / tau)`` is the soft label.
    """
    with no_autocast(logits):
        values = _log_probabilities(logits, normalised)
        optimistic = _smooth_max_of_constant(values, available, parameters.beta)
        conservative = _smooth_max_of_constant(values, available, -parameters.alpha)
        return torch.lerp(conservative, optimistic, per_sample(parameters.w_f, conservative))


def mean_fusion(logits: torch.Tensor, available: torch.Tensor, *, normalised: bool = False) -> torch.Tensor:
    """Mean of the log-probabilities of the modalities that exist, ``(B, K, *spatial)``; constant in the logits."""
    with no_autocast(logits), torch.no_grad():
        values = _log_probabilities(logits, normalised).masked_fill(_absent(available, logits), 0).sum(1)
        return values / per_sample(available.sum(1), values)


def _log_probabilities(logits: torch.Tensor, normalised: bool) -> torch.Tensor:
    values = at_least_float32(logits.detach())
    return values if normalised else values.log_softmax(2)


def _absent(available: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return ~available.reshape(*available.shape, *[1] * (like.ndim - 2))


def _smooth_max_of_constant(values: torch.Tensor, available: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """`smooth_max` of a constant, with ``dH/dbeta = (E[values] - H) / beta``, E under softmax(beta values)."""
    with torch.no_grad():
        weights = (values * per_sample(sharpness, values)).masked_fill_(_absent(available, values), -torch.inf)
        top = weights.amax(1, keepdim=True)
        weights.sub_(top).exp_()
        total = weights.sum(1)
        scale = per_sample(sharpness, total)
        fused = (top.squeeze(1) + total.log() - per_sample(available.sum(1), total).log()) / scale
        if not sharpness.requires_grad:
            return fused
        slope = (weights.mul_(values).sum(1) / total - fused) / scale
    return torch.addcmul(fused, slope, per_sample(sharpness - sharpness.detach(), fused))
