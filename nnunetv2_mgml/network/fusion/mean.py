"""Masked mean of the features: the floor every other design must beat. No parameters, any number of modalities."""

from __future__ import annotations

from typing import Any

import torch

from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, register


@register
class MeanFusion(FusionDesign):
    """``sum_m a_m x_m / sum_m a_m``."""

    name = "mean"
    summary = "masked mean of the features, no parameters"
    hides_absent = True
    joins_passes = True
    uses_context = False

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        weights = mask.to(features.dtype) / mask.sum(1, keepdim=True)
        return FusedScale(torch.einsum("bm,bm...->b...", weights, features))
