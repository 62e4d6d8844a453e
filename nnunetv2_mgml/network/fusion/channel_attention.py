"""Channel cross-attention of M2FTrans (Shi et al., JBHI 2024): fused channels attend to all modalities' channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusionSpec, at_least_float32
from nnunetv2_mgml.network.pointwise import pointwise


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, *spatial)``."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Args: ``(B, C, *spatial)``."""
        return super().forward(tensor.movedim(1, -1)).movedim(-1, 1)


EPSILON = 1e-6
"""Of the published norms."""


def _grouped_block(spec: FusionSpec, scale: int, epsilon: float, expand: int = 1) -> nn.Sequential:
    """1x1, C groups of ``expand`` channels with the plan's kernel, 1x1, each normed over channels.

    Maps ``(B, C, *spatial)`` to the same; with ``expand=1`` the convolution in the middle is depthwise.
    """
    width, kernel, one_by_one = spec.channels[scale], spec.kernel_sizes[scale], pointwise(spec.conv_op)
    inner = expand * width
    return nn.Sequential(
        one_by_one(width, inner, 1),
        ChannelNorm(inner, eps=epsilon),
        nn.GELU(),
        spec.conv_op(inner, inner, kernel, padding=tuple(k // 2 for k in kernel), groups=width),
        ChannelNorm(inner, eps=epsilon),
        nn.GELU(),
        one_by_one(inner, width, 1),
        ChannelNorm(width, eps=epsilon),
    )


class FeedForward(nn.Module):
    """A grouped block four times as wide inside, a residual, and a GELU: ``(B, C, *spatial)`` to the same."""

    def __init__(self, spec: FusionSpec, scale: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.block = _grouped_block(spec, scale, epsilon, expand=4)

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Args: ``(B, C, *spatial)``, any float dtype."""
        return F.gelu(tensor + self.block(tensor))


class ChannelAttentionLayer(nn.Module):
    """Scores ``(C, M*C)`` over voxels, absent modalities' columns closed; then a grouped feed-forward.

    Args:
        spec: of the design.
        scale: whose width ``C`` and kernel count.
        refine: also put every modality's features through a feed-forward (one for all), for the layer that follows.
        epsilon: of the norms.
    """

    def __init__(self, spec: FusionSpec, scale: int, refine: bool, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.query = _grouped_block(spec, scale, epsilon)
        self.keys = nn.ModuleList(_grouped_block(spec, scale, epsilon) for _ in range(spec.num_modalities))
        self.values = nn.ModuleList(_grouped_block(spec, scale, epsilon) for _ in range(spec.num_modalities))
        self.out = _grouped_block(spec, scale, epsilon)
        self.feed_forward = FeedForward(spec, scale, epsilon)
        self.refine = FeedForward(spec, scale, epsilon) if refine else None

    def forward(
        self, query: torch.Tensor, features: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: query ``(B, C, *spatial)``, features ``(B, M, C, *spatial)``, mask ``(B, M)`` bool. Both anew."""
        keys = torch.cat([block(features[:, m]) for m, block in enumerate(self.keys)], 1)
        values = torch.cat([block(features[:, m]) for m, block in enumerate(self.values)], 1)
        queries = self.query(query)
        closed = ~mask.repeat_interleave(query.shape[1], 1)[:, None]
        with torch.autocast(query.device.type, enabled=False):  # sums over all voxels: too long for half precision
            scale = queries[0, 0].numel() ** -0.5
            wide_queries, wide_keys = at_least_float32(queries).flatten(2), at_least_float32(keys).flatten(2)
            scores = scale * torch.einsum("bcv,bkv->bck", wide_queries, wide_keys)
            weights = scores.masked_fill(closed, -torch.inf).softmax(2).to(values.dtype)
        attended = torch.einsum("bck,bkv->bcv", weights, values.flatten(2)).reshape(query.shape)
        query = self.feed_forward(query + self.out(attended))
        if self.refine is not None:
            features = self.refine(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return query, features


class ChannelAttention(nn.Module):
    """Two layers in a row."""

    def __init__(self, spec: FusionSpec, scale: int, epsilon: float = EPSILON) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ChannelAttentionLayer(spec, scale, refine, epsilon) for refine in (True, False))

    def forward(self, query: torch.Tensor, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: query ``(B, C, *spatial)``; features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        for layer in self.layers:
            query, features = layer(query, features, mask)
        return query
