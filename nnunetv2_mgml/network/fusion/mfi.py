"""Modality-adaptive feature interaction of UNet-MFI (Zhao et al., MICCAI 2022).

Pooled features of every pair (target i, source j) decide, channel by channel, how much of j is added to i. Three things
differ from the published code: absent sources get no softmax mass; one MLP is built, instead of four of which one is
used; its last bias is left out because it cancels in the softmax over the sources. The original keeps one U-Net per
modality; here the targets are averaged, over those that exist.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    float_mask,
    register,
)


class PairWeights(nn.Module):
    """One MLP for all pairs: pooled features ``(B, M, C) -> `` weights ``(B, target, source, C)``, one per source."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(4 * channels, 2 * channels), nn.LeakyReLU(0.01), nn.Linear(2 * channels, channels, bias=False)
        )

    def forward(self, pooled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: pooled ``(B, M, C)`` float32; mask ``(B, M)`` bool."""
        batch, modalities, channels = pooled.shape
        pairs = (batch, modalities, modalities, channels)
        source = pooled[:, None].expand(pairs)
        target = pooled[:, :, None].expand(pairs)
        available = mask[:, None, :, None].expand(batch, modalities, modalities, 2 * channels).to(pooled.dtype)
        scores: torch.Tensor = self.mlp(torch.cat((source, target, available), 3))
        return scores.masked_fill(~mask[:, None, :, None], -torch.inf).softmax(2)


@register
class FeatureInteractionFusion(FusionDesign):
    """``mean_i (x_i + sum_j w_ij x_j)`` over present targets i and sources j, at every scale."""

    name = "mfi"
    summary = "channel-wise attention between pairs of modalities from pooled features (UNet-MFI, MICCAI 2022)"
    publication = "UNet-MFI, MICCAI 2022"
    trainer = "UNetMFI"
    differences: ClassVar[tuple[str, ...]] = (
        (
            "the fused feature is the mean over present targets; the published network keeps one U-Net per "
            "modality and links them with five such blocks"
        ),
        (
            "heads per modality, and one over all of them, are not here; the shared decoder on each modality alone, "
            "with the plans' weight, is the nearest there is"
        ),
        "absent sources have no part in the softmax; there they keep theirs",
        "the last bias, which cancels in the softmax, is left out",
    )
    hides_absent = True
    joins_passes = True
    uses_context = False

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.scales = nn.ModuleList(PairWeights(width) for width in spec.channels)

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        with torch.autocast(features.device.type, enabled=False):
            pooled = at_least_float32(features).flatten(3).mean(3)
            share = float_mask(mask, pooled) / mask.sum(1)[:, None, None]
            pairs = self.scales[scale](pooled, mask)
            # The mean over targets acts on the weights, so no (B, M, M, C, *spatial) tensor is needed.
            weights = share + (share[:, :, None] * pairs).sum(1)
        weights = weights.to(features.dtype)
        return FusedScale((features * weights.reshape(*weights.shape, *[1] * self.spec.dimension)).sum(1))
