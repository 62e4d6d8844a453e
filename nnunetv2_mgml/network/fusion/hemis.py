"""HeMIS (Havaei et al., MICCAI 2016) in its U-Net form: mean and variance over the modalities that exist.

Population variance (divided by n), so one modality alone gives zero. A 1x1 convolution maps the 2C moments to C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, masked, register

_MAX_VARIANCE = 1e4
"""A variance squares the features; far beyond this (features of +-100) float16 overflows after the convolution."""


def moments(features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and population variance over present modalities, both ``(B, C, *spatial)`` float32.

    Args:
        features: ``(B, M, C, *spatial)``.
        mask: ``(B, M)`` bool, True = present.
    """
    features = features.float()
    weight = masked(mask, features)
    count = weight.sum(1)
    mean = (features * weight).sum(1) / count
    deviation = (features - mean[:, None]) * weight
    return mean, deviation.square().sum(1) / count


@register
class HemisFusion(FusionDesign):
    """First two moments at every scale, then a 1x1 convolution ``2C -> C``."""

    name = "hemis"
    summary = "mean and variance over the available modalities at every scale (HeMIS, MICCAI 2016)"
    hides_absent = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.scales = nn.ModuleList(spec.conv_op(2 * width, width, 1) for width in spec.channels)

    def fuse_scale(self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None,
                   state: Any) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        mean, variance = moments(features, mask)
        stacked = torch.cat((mean, variance.clamp(max=_MAX_VARIANCE)), 1).to(features.dtype)
        return FusedScale(self.scales[scale](stacked))
