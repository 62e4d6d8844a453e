"""M2FTrans (Shi et al., JBHI 2024): fusion tokens gather the available modalities at the bottleneck.

Tokens of a modality attend to that modality only, fusion tokens to all visible modalities and to themselves. The first
layer's attention, detached, also reweighs the modalities' features in space at the other scales. With
``channel_attention`` the two deepest scales are fused by channel cross-attention instead: at the bottleneck the fusion
tokens ask, the transformer's own output of the modalities, reweighed, answers, and convolutions join both; at the scale
above the decoder's feature asks and the reweighed features answer. ``channel_wiring=added`` is what the option was
before: raw encoder features at the bottleneck, and the skip fusion added to the query. The block mask is two attention
calls instead of one masked ``(M+1)V x (M+1)V`` matrix, with the same result, and reweighting is scaled to mean 1
whatever the number of heads and modalities (``reweighting=published``: the plain sum over heads and fusion tokens).
What differs: `M2FTransFusion.differences`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.fusion.attention import AttentionHeads, TransformerLayer, heads_for, to_grid, to_tokens
from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    conv_block,
    register,
)
from nnunetv2_mgml.network.fusion.channel_attention import EPSILON, ChannelAttention
from nnunetv2_mgml.network.fusion.positions import PositionCode, TokenTable
from nnunetv2_mgml.network.fusion.pyramid import PyramidHeads
from nnunetv2_mgml.network.fusion.skip import SkipFusion, skip_fusion
from nnunetv2_mgml.network.layers import layers


class BlockAttention(AttentionHeads):
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
        weights = at_least_float32(scores).masked_fill(~self._keep(tokens, mask), -torch.inf).softmax(3)
        received: torch.Tensor = weights.mean(1).sum(1)[:, :border].unflatten(1, (modalities, -1)).detach()
        return received


class Gathered(NamedTuple):
    """What the transformer makes of the bottleneck."""

    fused: torch.Tensor
    """The fusion tokens, ``(B, C, *spatial)``."""
    modalities: torch.Tensor
    """The modalities' tokens, ``(B, M, C, *spatial)``; those of absent modalities too."""
    received: torch.Tensor
    """`BlockAttention.received` of the first layer, ``(B, M, *spatial)`` float32."""


class FusionTokenTransformer(nn.Module):
    """Features ``(B, M, C, *spatial) -> `` `Gathered`."""

    def __init__(self, spec: FusionSpec, options: dict[str, Any]) -> None:
        super().__init__()
        width, size = spec.channels[-1], spec.feature_size(spec.num_scales - 1)
        self.heads = heads_for(width, options["heads"])
        self.positions = nn.ModuleList(PositionCode(size, width) for _ in range(spec.num_modalities))
        self.fusion_tokens = TokenTable(size, width)
        self.layers = layers(
            TransformerLayer(width, BlockAttention(width, self.heads), options["mlp_ratio"], options["dropout"])
            for _ in range(options["depth"])
        )

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> Gathered:
        """Args: features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        batch, modalities = mask.shape
        size = features.shape[3:]
        own = to_tokens(features) + torch.stack([position(size) for position in self.positions])
        fusion = self.fusion_tokens(size).expand(batch, 1, -1, -1)
        tokens = torch.cat((own, fusion.to(own.dtype)), 1).flatten(1, 2)
        first = self.layers[0]
        attention = cast(BlockAttention, first.attention)
        received = attention.received(first.attention_norm(tokens), mask)
        for layer in self.layers:
            tokens = layer(tokens, mask)
        grids = to_grid(tokens.unflatten(1, (modalities + 1, -1)), size)
        return Gathered(grids[:, -1], grids[:, :-1], received.unflatten(2, size))


@register
class M2FTransFusion(FusionDesign):
    """Fusion tokens at the bottleneck, spatially reweighted skip fusion at the other scales."""

    name = "m2ftrans"
    summary = "masked fusion tokens at the bottleneck, spatially reweighted skip fusion (M2FTrans, JBHI 2024)"
    publication = "M2FTrans, JBHI 2024"
    trainer = "M2FTrans"
    published_options: ClassVar[dict[str, Any]] = {
        "fusion_options": {
            "mlp_ratio": 32,
            "channel_attention": True,
            "pyramid_heads": True,
            "reweighting": "published",
        },
        "modality_decoder_weight": 4.0,
        "auxiliary_weight": 5.0,
    }
    differences: ClassVar[tuple[str, ...]] = (
        "positions learned per axis and interpolated on other grids",
        "no dropout on attention weights and projections and in the channel attention",
        "convolutions pad with zeros, not by mirroring; the decoder upsamples by transposed convolutions",
        (
            "a pyramid head is one 1x1 convolution, published two with 8 channels between, and is compared at its own "
            "scale's size"
        ),
    )
    default_options: ClassVar[dict[str, Any]] = {
        "depth": 3,
        "heads": 8,
        "mlp_ratio": 4,
        "dropout": 0.1,
        "reweighting": "mean_one",
        "channel_attention": False,
        "channel_wiring": "published",
        "pyramid_heads": False,
    }
    defaults_before: ClassVar[dict[int, dict[str, Any]]] = {1: {"channel_wiring": "added"}}
    option_choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "reweighting": ("mean_one", "published"),
        "channel_wiring": ("published", "added"),
    }
    weights_depend_on_modality = True
    hides_absent = True
    conditions_norms = True

    @classmethod
    def acting(cls, options: dict[str, Any]) -> dict[str, Any]:
        """See `FusionDesign.acting`: the wiring is of the channel attention."""
        return options if options["channel_attention"] else {**options, "channel_wiring": None}

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        options, bottleneck = self.options, spec.num_scales - 1
        self.transformer = FusionTokenTransformer(spec, options)
        self.replaces = options["channel_attention"] and options["channel_wiring"] == "published"
        deepest = range(max(0, bottleneck - 1), bottleneck + 1) if options["channel_attention"] else ()
        self.scales = nn.ModuleList(
            nn.Identity() if self.replaces and s in deepest else skip_fusion(spec, s) for s in range(bottleneck)
        )
        epsilon = EPSILON if self.replaces else 1e-5
        self.channel = nn.ModuleDict({str(s): ChannelAttention(spec, s, epsilon) for s in deepest})
        self.join = None
        if self.replaces:
            width = spec.channels[-1]
            self.join = nn.Sequential(
                conv_block(spec, 2 * width, width, spec.kernel_sizes[-1]), conv_block(spec, width, width)
            )
        scales = range(spec.num_scales) if options["pyramid_heads"] else ()
        self.pyramid = PyramidHeads(spec, scales)

    def share(self, features: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `FusionDesign.share`: what the modalities add to the skip fusions, which need not be weighted before."""
        skips = {scale: skip for scale, skip in enumerate(self.scales) if isinstance(skip, SkipFusion)}
        return {str(scale): skip.share(features[scale]) for scale, skip in skips.items()}

    def begin(self, shared: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return the state: what is shared by scale, beside which the bottleneck leaves the spatial weights."""
        return dict(shared or {})

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
            return self._bottleneck(features, mask, state)
        weights = F.interpolate(state["weights"], size=features.shape[3:], mode="nearest")
        skip = cast(SkipFusion, self.scales[scale])
        if str(scale) not in self.channel:
            fused = skip.fuse(features, mask, state.get(str(scale)), weights)
            return self.pyramid.add(scale, FusedScale(fused), context)
        assert context is not None  # only the bottleneck has none
        query = context if self.replaces else skip.fuse(features, mask, state.get(str(scale)), weights) + context
        features = features * weights[:, :, None].to(features.dtype)
        fused = self.channel[str(scale)](query, features, mask)
        return self.pyramid.add(scale, FusedScale(fused), context)

    def _bottleneck(self, features: torch.Tensor, mask: torch.Tensor, state: dict[str, torch.Tensor]) -> FusedScale:
        scale = str(self.spec.num_scales - 1)
        fused, modalities, received = self.transformer(features, mask)
        fused = fused.to(features.dtype)
        if self.options["reweighting"] == "published":
            state["weights"] = received * self.transformer.heads
        else:
            state["weights"] = received * (mask.sum(1).reshape(-1, *[1] * (received.ndim - 1)) + 1)
        result = self.pyramid.add(int(scale), FusedScale(fused), None)
        if not self.channel:
            return result
        if self.join is None:
            return result._replace(fused=self.channel[scale](fused, features, mask))
        read = modalities * state["weights"][:, :, None].to(modalities.dtype)
        attended = self.channel[scale](fused, read.to(features.dtype), mask)
        return result._replace(fused=self.join(torch.cat((attended, fused), 1)))
