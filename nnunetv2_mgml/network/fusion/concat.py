"""Masked concatenation and three convolutions: the "skip fusion" of mmFormer (Zhang et al., MICCAI 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, register
from nnunetv2_mgml.network.fusion.skip import skip_fusion
from nnunetv2_mgml.network.layers import layers


@register
class ConcatFusion(FusionDesign):
    """At every scale: masked features concatenated, then 1x1, 3x3 and 1x1 convolutions."""

    name = "concat"
    summary = "masked features concatenated, 1x1-3x3-1x1 convolutions (skip fusion of mmFormer, MICCAI 2022)"
    publication = "mmFormer, MICCAI 2022 (skip fusion)"
    differences: ClassVar[tuple[str, ...]] = (
        "mmFormer norms before each convolution, here the plan's order is kept",
        "convolutions pad with zeros, not by mirroring",
        "one part of a published network, without its transformers",
    )
    weights_depend_on_modality = True
    hides_absent = True
    conditions_norms = True
    joins_passes = True
    uses_context = False

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.scales = layers(skip_fusion(spec, s) for s in range(spec.num_scales))

    def share(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `FusionDesign.share`."""
        return [skip.share(f) for skip, f in zip(self.scales, features, strict=True)]

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        return FusedScale(self.scales[scale].fuse(features, mask, state and state[scale]))
