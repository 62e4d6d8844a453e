"""Masked concatenation and three convolutions: the "skip fusion" of mmFormer (Zhang et al., MICCAI 2022)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, conv_block, register


def skip_fusion(spec: FusionSpec, scale: int, out_channels: int | None = None,
                inputs: int | None = None) -> nn.Sequential:
    """``(B, inputs*C, *spatial) -> (B, out_channels or C, *spatial)``: 1x1, plan's kernel, 1x1; inputs: M if None."""
    width = spec.channels[scale]
    return nn.Sequential(conv_block(spec, (inputs or spec.num_modalities) * width, width),
                         conv_block(spec, width, width, spec.kernel_sizes[scale]),
                         conv_block(spec, width, out_channels or width))


@register
class ConcatFusion(FusionDesign):
    """At every scale: masked features concatenated, then 1x1, 3x3 and 1x1 convolutions."""

    name = "concat"
    summary = "masked features concatenated, 1x1-3x3-1x1 convolutions (skip fusion of mmFormer, MICCAI 2022)"
    weights_depend_on_modality = True
    reads_zeros = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.scales = nn.ModuleList(skip_fusion(spec, s) for s in range(spec.num_scales))

    def fuse_scale(self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None,
                   state: Any) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        return FusedScale(self.scales[scale](features.flatten(1, 2)))
