"""M2FTrans (Shi et al., JBHI 2024): fusion tokens gather the available modalities at the bottleneck.

Tokens of a modality attend to that modality only, fusion tokens to all present modalities and to themselves. The first
layer's attention, detached, also reweighs the modalities' features in space at the other scales. Differences from the
published code: the block mask is two attention calls instead of one masked ``(M+1)V x (M+1)V`` matrix, reweighting is
scaled to mean 1 whatever the number of heads and modalities, channel attention (``channel_attention``) is off by
default, the width of the MLP is 4 times the plan's bottleneck, and tokens follow the plan's grid.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.fusion.attention import SelfAttention, TransformerLayer, heads_for, to_tokens
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, register
from nnunetv2_mgml.network.fusion.channel_attention import ChannelAttention
from nnunetv2_mgml.network.fusion.positions import PositionCode, TokenTable
from nnunetv2_mgml.network.fusion.skip import skip_fusion


class BlockAttention(SelfAttention):
    """Attention over ``[modality 1, ..., modality M, fusion]``, V tokens each, under the block mask of M2FTrans."""

    def _keep(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Keys open to fusion tokens, ``(B, 1, 1, (M+1)V)`` bool."""
        groups = torch.cat((mask, mask.new_ones(mask.shape[0], 1)), 1)
        voxels = tokens.shape[1] // groups.shape[1]
        return groups[:, None, None, :, None].expand(-1, 1, 1, -1, voxels).flatten(3)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: tokens ``(B, (M+1)V, d)``; mask ``(B, M)`` bool."""
        query, key, value = self.split(tokens)
        modalities = mask.shape[1]
        border = tokens.shape[1] // (modalities + 1) * modalities
        own = [part[:, :, :border].unflatten(2, (modalities, -1)).flatten(1, 2) for part in (query, key, value)]
        own = F.scaled_dot_product_attention(*own).unflatten(1, (self.heads, modalities)).flatten(2, 3)
        fusion = F.scaled_dot_product_attention(query[:, :, border:], key, value, attn_mask=self._keep(tokens, mask))
        return self.join(torch.cat((own, fusion), 2))

    def received(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the attention each modality token gets from the fusion tokens, ``(B, M, V)`` float32, detached.

        Mean over heads, sum over fusion tokens, so the mean over all open keys is ``1 / (n + 1)``.
        """
        query, key, _ = self.split(tokens)
        modalities = mask.shape[1]
        border = tokens.shape[1] // (modalities + 1) * modalities
        scores = (query[:, :, border:] / math.sqrt(query.shape[3])) @ key.transpose(2, 3)
        weights = scores.float().masked_fill(~self._keep(tokens, mask), -torch.inf).softmax(3)
        return weights.mean(1).sum(1)[:, :border].unflatten(1, (modalities, -1)).detach()


class FusionTokenTransformer(nn.Module):
    """Features ``(B, M, C, *spatial) -> `` fused ``(B, C, *spatial)`` and spatial weights ``(B, M, *spatial)``."""

    def __init__(self, spec: FusionSpec, options: dict[str, Any]) -> None:
        super().__init__()
        width, size = spec.channels[-1], spec.feature_size(spec.num_scales - 1)
        heads = heads_for(width, options["heads"])
        self.positions = nn.ModuleList(PositionCode(size, width) for _ in range(spec.num_modalities))
        self.fusion_tokens = TokenTable(size, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, BlockAttention(width, heads), options["mlp_ratio"], options["dropout"])
            for _ in range(options["depth"])
        )

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Args: features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        batch, modalities = mask.shape
        size = features.shape[3:]
        own = to_tokens(features) + torch.stack([position(size) for position in self.positions])
        fusion = self.fusion_tokens(size).expand(batch, 1, -1, -1)
        tokens = torch.cat((own, fusion.to(own.dtype)), 1).flatten(1, 2)
        first = self.layers[0]
        received = first.attention.received(first.attention_norm(tokens), mask)
        weights = received * (mask.sum(1)[:, None, None] + 1)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        fused = tokens.unflatten(1, (modalities + 1, -1))[:, -1]
        return fused.transpose(1, 2).unflatten(2, size), weights.unflatten(2, size)


@register
class M2FTransFusion(FusionDesign):
    """Fusion tokens at the bottleneck, spatially reweighted skip fusion at the other scales."""

    name = "m2ftrans"
    summary = "masked fusion tokens at the bottleneck, spatially reweighted skip fusion (M2FTrans, JBHI 2024)"
    trainer = "M2FTrans"
    default_options: ClassVar[dict[str, Any]] = {
        "depth": 3,
        "heads": 8,
        "mlp_ratio": 4,
        "dropout": 0.1,
        "channel_attention": False,
    }
    weights_depend_on_modality = True
    hides_absent = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.transformer = FusionTokenTransformer(spec, self.options)
        self.scales = nn.ModuleList(skip_fusion(spec, s) for s in range(spec.num_scales - 1))
        deepest = range(max(0, spec.num_scales - 2), spec.num_scales) if self.options["channel_attention"] else ()
        self.channel = nn.ModuleDict({str(s): ChannelAttention(spec, s) for s in deepest})

    def begin(self, shared: None = None) -> dict[str, torch.Tensor]:
        """Return the state: the bottleneck leaves the spatial weights in it."""
        return {}

    def fuse_scale(
        self,
        scale: int,
        features: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor | None,
        state: dict[str, torch.Tensor],
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        if scale == self.spec.num_scales - 1:
            fused, state["weights"] = self.transformer(features, mask)
            fused = fused.to(features.dtype)
        else:
            weights = F.interpolate(state["weights"], size=features.shape[3:], mode="nearest")
            features = features * weights[:, :, None].to(features.dtype)
            fused = self.scales[scale](features.flatten(1, 2))
        if str(scale) in self.channel:
            query = fused if context is None else fused + context
            fused = self.channel[str(scale)](query, features, mask)
        return FusedScale(fused)
