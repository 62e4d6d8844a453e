"""SFusion (Liu et al., MICCAI 2023): a transformer over the tokens of the available modalities scores every voxel.

Tokens are pooled features (at most 8 per axis); absent modalities are hidden by key padding, which equals removing
them. The tokens, brought back to the grid, are scores per voxel and channel; a softmax over the available modalities
turns them into weights. Used at every scale; the parameters do not depend on the number of modalities.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.fusion.attention import to_grid, to_tokens, transformer_layers
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, beside, register
from nnunetv2_mgml.network.fusion.positions import PositionCode, resize_linear

_POOL = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class ScoreTransformer(nn.Module):
    """Features ``(B, M, C, *spatial) -> `` scores of the same shape."""

    def __init__(self, spec: FusionSpec, scale: int, options: dict[str, Any]) -> None:
        super().__init__()
        width = spec.channels[scale]
        self.grid = options["grid"]
        self.positions = PositionCode(self.pooled_size(spec.feature_size(scale)), width)
        self.layers = transformer_layers(width, options)
        # A bias here would be added to all modalities alike and cancel in the softmax over them.
        self.norm = nn.LayerNorm(width, bias=False)

    def pooled_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token grid of features of ``size`` voxels."""
        return tuple(min(self.grid, n) for n in size)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        batch, modalities = features.shape[:2]
        size = tuple(features.shape[3:])
        grid = self.pooled_size(size)
        pooled = _POOL[len(size)](features.flatten(0, 1), grid).unflatten(0, (batch, modalities))
        tokens = to_tokens(pooled) + self.positions(grid).to(features.dtype)
        keep = mask[:, :, None].expand(*tokens.shape[:3]).flatten(1)
        tokens = tokens.flatten(1, 2)
        for layer in self.layers:
            tokens = layer(tokens, keep)
        scores = to_grid(self.norm(tokens).unflatten(1, (modalities, -1)), grid).to(features.dtype)
        return resize_linear(scores.flatten(0, 1), size).unflatten(0, (batch, modalities))


@register
class SelfAttentionFusion(FusionDesign):
    """Weighted sum of the modalities with one weight per voxel and channel, at every scale."""

    name = "sfusion"
    summary = "transformer over the available modalities weighs them per voxel and channel (SFusion, MICCAI 2023)"
    trainer = "SFusion"
    default_options: ClassVar[dict[str, Any]] = {"grid": 8, "depth": 8, "heads": 8, "mlp_ratio": 4, "dropout": 0.1}
    hides_absent = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.scales = nn.ModuleList(ScoreTransformer(spec, s, self.options) for s in range(spec.num_scales))

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        scores = self.scales[scale](features, mask)
        with torch.autocast(features.device.type, enabled=False):  # keeps the softmax in the features' memory format
            weights = scores.masked_fill(~beside(mask, scores), -torch.inf).softmax(1)
        return FusedScale((features * weights).sum(1))
