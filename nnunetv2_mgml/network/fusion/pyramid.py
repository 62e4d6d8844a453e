"""Pyramid heads: label logits from the bottleneck and from the decoder's features, each with a loss of its own.

mmFormer, IM-Fuse and M2FTrans put 1x1 convolutions on the decoder. A design sees the decoder's features where they
enter a scale, brought to its size; that is where the heads are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusedScale, FusionSpec
from nnunetv2_mgml.network.pointwise import pointwise


def published_scales(spec: FusionSpec) -> list[int]:
    """Return where mmFormer and IM-Fuse have heads: the bottleneck, and the decoder's features at all scales but the
    finest, each read where it enters the next finer scale.
    """
    return [*range(spec.num_scales - 2), spec.num_scales - 1]


class PyramidHeads(nn.Module):
    """A 1x1 convolution to the label classes at each of some scales; they act in training only.

    Args:
        spec: of the design.
        scales: where a feature ``(B, C_s, *spatial_s)`` is read.
    """

    def __init__(self, spec: FusionSpec, scales: Iterable[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {str(s): pointwise(spec.conv_op)(spec.channels[s], spec.num_classes, 1) for s in scales}
        )

    def reads_context(self, scale: int) -> bool:
        """Whether `add` reads the decoder's feature at a scale."""
        return self.training and str(scale) in self.heads

    def add(self, scale: int, result: FusedScale, context: torch.Tensor | None) -> FusedScale:
        """Return a result with label logits of the decoder's feature, at the bottleneck of the fused one, if wanted.

        Args:
            scale: of the result.
            result: of `FusionDesign.fuse_scale`.
            context: decoder feature ``(B, C_s, *spatial_s)``; None at the bottleneck, or not needed.
        """
        if not self.reads_context(scale):
            return result
        return result._replace(auxiliary=self.heads[str(scale)](result.fused if context is None else context))
