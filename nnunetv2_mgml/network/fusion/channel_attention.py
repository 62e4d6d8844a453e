"""Channel cross-attention of M2FTrans (Shi et al., JBHI 2024): fused channels attend to all modalities' channels."""

from __future__ import annotations

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusionSpec


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, *spatial)``."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Args: ``(B, C, *spatial)``."""
        return super().forward(tensor.movedim(1, -1)).movedim(-1, 1)


def _depthwise(spec: FusionSpec, scale: int, channels: int) -> nn.Module:
    kernel = spec.kernel_sizes[scale]
    return spec.conv_op(channels, channels, kernel, padding=tuple(k // 2 for k in kernel), groups=channels)


def _depthwise_block(spec: FusionSpec, scale: int) -> nn.Sequential:
    """1x1, depthwise with the plan's kernel, 1x1, each normed over channels: ``(B, C, *spatial)`` to the same."""
    width = spec.channels[scale]
    return nn.Sequential(spec.conv_op(width, width, 1), ChannelNorm(width), nn.GELU(),
                         _depthwise(spec, scale, width), ChannelNorm(width), nn.GELU(),
                         spec.conv_op(width, width, 1), ChannelNorm(width))


class ChannelAttentionLayer(nn.Module):
    """Scores ``(C, M*C)`` over voxels, absent modalities' columns closed; then a depthwise feed-forward."""

    def __init__(self, spec: FusionSpec, scale: int) -> None:
        super().__init__()
        width = spec.channels[scale]
        self.query = _depthwise_block(spec, scale)
        self.keys = nn.ModuleList(_depthwise_block(spec, scale) for _ in range(spec.num_modalities))
        self.values = nn.ModuleList(_depthwise_block(spec, scale) for _ in range(spec.num_modalities))
        self.out = _depthwise_block(spec, scale)
        self.feed_forward = nn.Sequential(spec.conv_op(width, 4 * width, 1), nn.GELU(),
                                          _depthwise(spec, scale, 4 * width), nn.GELU(),
                                          spec.conv_op(4 * width, width, 1))

    def forward(self, query: torch.Tensor, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: query ``(B, C, *spatial)``; features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        keys = torch.cat([block(features[:, m]) for m, block in enumerate(self.keys)], 1)
        values = torch.cat([block(features[:, m]) for m, block in enumerate(self.values)], 1)
        queries = self.query(query)
        closed = ~mask.repeat_interleave(query.shape[1], 1)[:, None]
        with torch.autocast(query.device.type, enabled=False):  # sums over all voxels: too long for half precision
            scale = queries[0, 0].numel() ** -0.5
            scores = scale * torch.einsum("bcv,bkv->bck", queries.float().flatten(2), keys.float().flatten(2))
            weights = scores.masked_fill(closed, -torch.inf).softmax(2).to(values.dtype)
        attended = torch.einsum("bck,bkv->bcv", weights, values.flatten(2)).reshape(query.shape)
        query = query + self.out(attended)
        return query + self.feed_forward(query)


class ChannelAttention(nn.Module):
    """Two layers in a row."""

    def __init__(self, spec: FusionSpec, scale: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChannelAttentionLayer(spec, scale) for _ in range(2))

    def forward(self, query: torch.Tensor, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: query ``(B, C, *spatial)``; features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        for layer in self.layers:
            query = layer(query, features, mask)
        return query
