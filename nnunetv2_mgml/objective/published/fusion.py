"""What both published forms of the soft label share: a log-*sum*-exp of raw logits, and class weights."""

from __future__ import annotations

import torch

from nnunetv2_mgml.objective.adaptive_fusion import smooth_max, smooth_min
from nnunetv2_mgml.objective.meta_network import MetaNetwork, MetaParameters
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast, per_sample

REFERENCE_SHARPNESS = (1.0, 100.0)
"""Range of beta and alpha in the published code."""
REFERENCE_START = 98.02
"""Where beta and alpha start in the published code."""


def published_meta_network(
    num_modalities: int, num_classes: int, hidden: int, published_start: bool = False
) -> MetaNetwork:
    """Return a MetaNetwork with the published layers and start values.

    Args:
        num_modalities: ``M``.
        num_classes: ``K``, background included.
        hidden: width of the hidden layer.
        published_start: see `MetaNetwork`; without it the start values hold for every input.
    """
    return MetaNetwork(
        num_modalities,
        num_classes,
        hidden,
        REFERENCE_SHARPNESS,
        REFERENCE_START,
        availability_bits=False,
        published_start=published_start,
    )


def raw_fusion(logits: torch.Tensor, available: torch.Tensor, parameters: MetaParameters) -> torch.Tensor:
    """Eq. 3-5 on raw logits with the sum over modalities, shifted so that it cannot overflow.

    Args:
        logits: ``(B, M, K, *spatial)``.
        available: ``(B, M)`` bool.
        parameters: one set per sample.

    Returns:
        ``(B, K, *spatial)``, differentiable in the logits and the parameters.
    """
    with no_autocast(logits):
        logits = at_least_float32(logits)
        log_count = available.sum(1).to(logits.dtype).log()
        high = smooth_max(logits, available, parameters.beta)
        low = smooth_min(logits, available, parameters.alpha)
        high = high + per_sample(log_count / parameters.beta, high)
        low = low - per_sample(log_count / parameters.alpha, low)
        return torch.lerp(low, high, per_sample(parameters.w_f, low))


def class_weights(probabilities: torch.Tensor) -> torch.Tensor:
    """``1 - share of the class`` (below eq. 8), ``(..., K, N)`` -> ``(..., K)``."""
    mass = probabilities.sum(-1)
    return 1 - mass / mass.sum(-1, keepdim=True).clamp_min(1e-12)
