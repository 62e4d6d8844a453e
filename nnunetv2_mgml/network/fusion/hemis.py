"""HeMIS (Havaei et al., MICCAI 2016) in its U-Net form: mean and variance over the modalities that exist.

Population variance (divided by n), so one modality alone gives zero. A 1x1 convolution maps the 2C moments to C.
"""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    float_mask,
    register,
    sum_present,
)
from nnunetv2_mgml.network.pointwise import pointwise

_MAX_VARIANCE = 1e4
"""A variance squares the features; far beyond this (features of +-100) float16 overflows after the convolution."""


def moments(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and population variance over visible modalities, both ``(B, C, *spatial)`` float32.

    Args:
        features: ``(B, M, C, *spatial)``.
        mask: ``(B, M)`` bool, True = visible.
    """
    features = at_least_float32(features)
    weight = float_mask(mask, features)
    count = weight.sum(1)
    mean = (features * weight).sum(1) / count
    deviation = (features - mean[:, None]) * weight
    return mean, deviation.square().sum(1) / count


class Shared(NamedTuple):
    """What the moments of every subset can be read from, float32."""

    features: torch.Tensor
    """``(B, M, C, *spatial)``."""
    distances: torch.Tensor
    """Squared difference of every pair of modalities (`_pairs`), ``(B, M (M - 1) / 2, C, *spatial)``."""

    def moments(self, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `moments` does for a mask ``(B, M)``, of the same batch or for one sample and all masks.

        The variance is half the mean squared difference over all ordered pairs of visible modalities: exact beside any
        mean, never negative, and absent modalities have no part in it, not even in the rounding.
        """
        count = mask.sum(1).reshape(-1, *[1] * (self.features.ndim - 2))
        first, second = _pairs(mask.shape[1])
        both = _members(mask, first) & _members(mask, second)
        return sum_present(self.features, mask) / count, sum_present(self.distances, both) / count**2


def _pairs(modalities: int) -> tuple[list[int], list[int]]:
    """Return the first and second members of all pairs of modalities."""
    first, second = zip(*itertools.combinations(range(modalities), 2), strict=True)
    return list(first), list(second)


def _members(values: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Return ``values[:, places]``; an index made of a list would be copied to a GPU, and the copy waited for."""
    return torch.stack([values[:, place] for place in places], 1)


@register
class HemisFusion(FusionDesign):
    """First two moments at every scale, then a 1x1 convolution ``2C -> C``."""

    name = "hemis"
    summary = "mean and variance over the available modalities at every scale (HeMIS, MICCAI 2016)"
    publication = "HeMIS, MICCAI 2016"
    trainer = "HeMIS"
    published_options: ClassVar[dict[str, Any]] = {"mask_sampling": "uniform_count"}
    published_alone: ClassVar[dict[str, Any]] = {"modality_decoder_weight": 0.0}
    differences: ClassVar[tuple[str, ...]] = (
        "a 1x1 convolution maps the 2C moments to C; the original's decoder reads 2C channels",
        "population variance, 0 for one modality, as in the U-Net form of the U-HVED code",
        "variances are cut at 1e4, beyond which float16 overflows",
    )
    hides_absent = True
    joins_passes = True
    uses_context = False

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.scales = nn.ModuleList(pointwise(spec.conv_op)(2 * width, width, 1) for width in spec.channels)

    def share(self, features: list[torch.Tensor]) -> list[Shared]:
        """See `FusionDesign.share`."""
        first, second = _pairs(self.spec.num_modalities)
        return [
            Shared(f.float(), (_members(f, first).float() - _members(f, second).float()).square()) for f in features
        ]

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        mean, variance = moments(features, mask) if state is None else state[scale].moments(mask)
        stacked = torch.cat((mean, variance.clamp(max=_MAX_VARIANCE)), 1).to(features.dtype)
        return FusedScale(self.scales[scale](stacked))
