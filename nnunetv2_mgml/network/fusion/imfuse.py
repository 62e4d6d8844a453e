"""IM-Fuse (Pipoli et al., MICCAI 2025): a Mamba scan over the interleaved modalities, read out by learned tokens.

Voxels in row-major order, per voxel the modalities and then a read-out token, whose output is the fused feature.
Differences from the published code: one learned vector plus a position code instead of a token per voxel (any patch
size; 22.5 M numbers less), absent modalities leave the sequence instead of passing through as zeros, state size 16,
and no intra-modal transformers. Used at the bottleneck and at scales with at most ``max_voxels`` voxels; skip fusion
elsewhere.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.attention import to_tokens
from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    can_be_read,
    register,
)
from nnunetv2_mgml.network.fusion.mamba import MambaBlock
from nnunetv2_mgml.network.fusion.positions import PositionCode
from nnunetv2_mgml.network.fusion.pyramid import PyramidHeads, published_scales
from nnunetv2_mgml.network.fusion.skip import skip_fusion
from nnunetv2_mgml.network.layers import layers


def interleave(tokens: torch.Tensor, read_out: torch.Tensor) -> torch.Tensor:
    """Place tokens ``(B, M, V, C)`` and read-outs ``(V, C)`` voxel by voxel: ``(B, V*(M+1), C)``, read-out last."""
    last = read_out.expand(tokens.shape[0], 1, *read_out.shape)
    return torch.cat((tokens, last), 1).transpose(1, 2).flatten(1, 2)


def present_first(mask: torch.Tensor, voxels: int) -> torch.Tensor:
    """Return the order ``(B, V*(M+1))`` int64 that moves absent tokens behind all others and keeps the rest as it is.

    A causal layer run in this order cannot see absent tokens, so masking is the same as removing, convolution included.
    """
    is_read_out = mask.new_zeros(mask.shape[0], 1)
    absent = torch.cat((~mask, is_read_out), 1)[:, None].expand(-1, voxels, -1).flatten(1)
    return absent.to(torch.uint8).argsort(dim=1, stable=True)


def _take(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``out[b, i] = tokens[b, index[b, i]]`` for tokens ``(B, L, C)`` and index ``(B, K)``."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[2]))


class InterleavedMamba(nn.Module):
    """I-MFB: features ``(B, M, C, *spatial) -> (B, C, *spatial)`` float32."""

    def __init__(self, size: tuple[int, ...], width: int, d_state: int) -> None:
        super().__init__()
        self.read_out = nn.Parameter(0.02 * torch.randn(width))
        self.positions = PositionCode(size, width)
        self.block = MambaBlock(width, d_state)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Args: features ``(B, M, C, *spatial)``; mask ``(B, M)`` bool."""
        if self.training or torch.is_grad_enabled() or not can_be_read(mask):
            return self._scanned(features, mask, mask.shape[1])
        counts = mask.sum(1)
        alike = [(int(count), (counts == count).nonzero()[:, 0]) for count in counts.unique()]
        if len(alike) == 1:
            return self._scanned(features, mask, alike[0][0])
        fused = features.new_empty(len(mask), *features.shape[2:])
        for count, samples in alike:
            fused[samples] = self._scanned(features[samples], mask[samples], count)
        return fused

    def _scanned(self, features: torch.Tensor, mask: torch.Tensor, most: int) -> torch.Tensor:
        """Scan sequences as long as those of ``most`` modalities: what comes behind cannot be seen."""
        size = features.shape[3:]
        tokens = interleave(to_tokens(features), self.read_out + self.positions(size))
        order = present_first(mask, math.prod(size))[:, : math.prod(size) * (most + 1)]
        scanned = self.block(_take(tokens, order))
        count = mask.sum(1, keepdim=True)
        read_outs = torch.arange(math.prod(size), device=mask.device) * (count + 1) + count
        fused: torch.Tensor = _take(scanned, read_outs).transpose(1, 2).unflatten(2, size)
        return fused


@register
class ImFuseFusion(FusionDesign):
    """Interleaved Mamba at the deep scales, each followed by the skip fusion's convolutions."""

    name = "imfuse"
    summary = "Mamba scan over interleaved modalities at the deep scales, skip fusion elsewhere (IM-Fuse, MICCAI 2025)"
    publication = "IM-Fuse, MICCAI 2025"
    trainer = "IMFuse"
    published_options: ClassVar[dict[str, Any]] = {
        "fusion_options": {"pyramid_heads": True},
        "modality_decoder_weight": 4.0,
        "auxiliary_weight": 4.0,
    }
    differences: ClassVar[tuple[str, ...]] = (
        (
            "one learned read-out vector and a position code instead of a token per voxel, drawn with a spread of "
            "0.02 instead of 1"
        ),
        "absent tokens leave the sequence; there zero vectors pass through the scan",
        "state size 16 at every width, published min(C, 256), and at the bottleneck the plan's width instead of 512",
        "no transformers within modalities and none after the scan",
        "skip fusion in the plan's order (norm after convolution), padded with zeros",
        "the scan at scales up to `max_voxels` voxels, skip fusion elsewhere",
        (
            "pyramid heads read the decoder's feature where it enters the next scale, and are compared at that "
            "scale's size"
        ),
    )
    default_options: ClassVar[dict[str, Any]] = {"d_state": 16, "max_voxels": 4096, "pyramid_heads": False}
    weights_depend_on_modality = True
    order_matters = True
    hides_absent = True
    conditions_norms = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        scanned = [
            s
            for s in range(spec.num_scales)
            if s == spec.num_scales - 1 or math.prod(spec.feature_size(s)) <= self.options["max_voxels"]
        ]
        self.mamba = nn.ModuleDict(
            {str(s): InterleavedMamba(spec.feature_size(s), spec.channels[s], self.options["d_state"]) for s in scanned}
        )
        self.scales = layers(skip_fusion(spec, s, inputs=1 if s in scanned else None) for s in range(spec.num_scales))
        self.pyramid = PyramidHeads(spec, published_scales(spec) if self.options["pyramid_heads"] else ())

    def share(self, features: list[torch.Tensor]) -> list[torch.Tensor | None]:
        """See `FusionDesign.share`; nothing where the scan reads the features."""
        return [None if str(s) in self.mamba else self.scales[s].share(f) for s, f in enumerate(features)]

    def reads_context(self, scale: int) -> bool:
        """For a training's heads alone; see `FusionDesign.reads_context`."""
        return self.pyramid.reads_context(scale)

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        if str(scale) not in self.mamba:
            fused = self.scales[scale].fuse(features, mask, state and state[scale])
            return self.pyramid.add(scale, FusedScale(fused), context)
        with torch.autocast(features.device.type, enabled=False):
            scanned = self.mamba[str(scale)](at_least_float32(features), mask)
        return self.pyramid.add(scale, FusedScale(self.scales[scale](scanned.to(features.dtype))), context)
