"""mmFormer (Zhang et al., MICCAI 2022): transformers within and across modalities at the bottleneck, skip fusion.

Differences from the published code: the token grid is put back voxel by voxel (theirs views modality-major tokens as a
grid, which scrambles it), absent modalities are hidden from the attention instead of taking part as zero vectors, and
the width is the plan's bottleneck instead of 512. Positions follow the grid, so any patch size works.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.attention import to_grid, to_tokens, transformer_layers
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, float_mask, register
from nnunetv2_mgml.network.fusion.positions import PositionCode
from nnunetv2_mgml.network.fusion.pyramid import PyramidHeads, published_scales
from nnunetv2_mgml.network.fusion.skip import skip_fusion
from nnunetv2_mgml.network.layers import layers


class IntraModalTransformer(nn.Module):
    """Embedding and transformer of one modality: tokens ``(B, V, C) -> (B, V, C)``."""

    def __init__(self, width: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.layers = transformer_layers(width, options)

    def forward(self, tokens: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        """Args: tokens ``(B, V, C)``; code ``(V, C)``, added before every layer."""
        tokens = self.embed(tokens)
        for layer in self.layers:
            tokens = layer(tokens + code)
        return tokens


class MultimodalTransformer(nn.Module):
    """Intra-modal (`own_tokens`), then inter-modal attention: ``(B, M, C, *spatial)`` both, zero where absent."""

    def __init__(self, spec: FusionSpec, options: dict[str, Any]) -> None:
        super().__init__()
        width, size = spec.channels[-1], spec.feature_size(spec.num_scales - 1)
        self.positions = nn.ModuleList(PositionCode(size, width) for _ in range(spec.num_modalities))
        self.intra = nn.ModuleList(IntraModalTransformer(width, options) for _ in range(spec.num_modalities))
        self.inter = transformer_layers(width, options)

    def own_tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Return the intra-modal transformers' tokens ``(B, M, V, C)`` of features ``(B, M, C, *spatial)``."""
        tokens = to_tokens(features)
        own = [
            intra(tokens[:, m], position(features.shape[3:]))
            for m, (intra, position) in enumerate(zip(self.intra, self.positions, strict=True))
        ]
        return torch.stack(own, 1)

    def forward(self, features: torch.Tensor, mask: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """Args: features ``(B, M, C, *spatial)``; mask ``(B, M)``; their `own_tokens` (of B or 1 samples) or None."""
        size = features.shape[3:]
        tokens = self.own_tokens(features) if own is None else own.expand(len(features), *own.shape[1:])
        codes = torch.stack([position(size) for position in self.positions])
        present = float_mask(mask, tokens)
        keep = mask[:, :, None].expand(*tokens.shape[:3]).flatten(1)
        tokens = (tokens * present).flatten(1, 2)
        for layer in self.inter:
            tokens = layer(tokens + codes.flatten(0, 1), keep)
        tokens = tokens.unflatten(1, (mask.shape[1], -1)) * present
        return to_grid(tokens, size)


@register
class MmFormerFusion(FusionDesign):
    """Transformers at the bottleneck, then the skip fusion of every scale."""

    name = "mmformer"
    summary = "transformers within and across modalities at the bottleneck, skip fusion (mmFormer, MICCAI 2022)"
    publication = "mmFormer, MICCAI 2022"
    trainer = "mmFormer"
    published_options: ClassVar[dict[str, Any]] = {
        "fusion_options": {"mlp_ratio": 8, "pyramid_heads": True},
        "modality_decoder_weight": 4.0,
        "auxiliary_weight": 4.0,
    }
    differences: ClassVar[tuple[str, ...]] = (
        (
            "tokens return to their own voxel; the published code reads modality-major tokens as a grid, after "
            "which no voxel holds its own modalities"
        ),
        "absent modalities are hidden from the attention; there they take part as zero vectors",
        "width of the plan's bottleneck instead of 512, positions learned per axis",
        (
            "no dropout on attention weights and projections, no 1x1 convolution between transformer and skip fusion, "
            "which begins with one"
        ),
        "skip fusion in the plan's order (norm after convolution), padded with zeros",
        (
            "pyramid heads read the decoder's feature where it enters the next scale, and are compared at that "
            "scale's size"
        ),
    )
    default_options: ClassVar[dict[str, Any]] = {
        "depth": 1,
        "heads": 8,
        "mlp_ratio": 4,
        "dropout": 0.1,
        "pyramid_heads": False,
    }
    weights_depend_on_modality = True
    hides_absent = True
    conditions_norms = True
    joins_passes = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.transformer = MultimodalTransformer(spec, self.options)
        self.scales = layers(skip_fusion(spec, s) for s in range(spec.num_scales))
        self.pyramid = PyramidHeads(spec, published_scales(spec) if self.options["pyramid_heads"] else ())

    def share(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `FusionDesign.share`; at the bottleneck the intra-modal tokens."""
        skips = [skip.share(f) for skip, f in zip(self.scales[:-1], features[:-1], strict=True)]
        return [*skips, self.transformer.own_tokens(features[-1])]

    def reads_context(self, scale: int) -> bool:
        """For a training's heads alone; see `FusionDesign.reads_context`."""
        return self.pyramid.reads_context(scale)

    def joins(self, scale: int) -> bool:
        """Not at the bottleneck, whose transformers drop at random; see `FusionDesign.joins`."""
        return self.joins_passes and (scale < self.spec.num_scales - 1 or self.options["dropout"] == 0)

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        shared = state and state[scale]
        if scale == self.spec.num_scales - 1:
            features, shared = self.transformer(features, mask, shared).to(features.dtype), None
        return self.pyramid.add(scale, FusedScale(self.scales[scale].fuse(features, mask, shared)), context)
