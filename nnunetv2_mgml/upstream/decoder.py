"""nnU-Net's decoder, one scale at a time.

Bends: ``UNetDecoder.forward``, of which these are the steps, and the layers it goes through (``transpconvs``,
    ``stages`` and in them ``convs`` and ``all_modules``, ``seg_layers``).
Why: it takes all skips at once, but what fuses a skip needs the decoder's features of the coarser scale.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from typing import cast

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder

from nnunetv2_mgml.upstream.raised_convolution import raised_convolution


class StepwiseDecoder(UNetDecoder):  # type: ignore[misc]  # untyped
    """`UNetDecoder` (same layers, same state-dict keys) whose steps can be taken one by one.

    Scales are counted from full resolution, 0, to the bottleneck, ``len(self.stages)``.
    """

    def raised(self, scale: int, context: torch.Tensor) -> torch.Tensor:
        """Bring the decoder's features ``(B, C, *spatial)`` of the next coarser scale to the size of this one."""
        return cast(torch.Tensor, self.transpconvs[len(self.stages) - 1 - scale](context))

    def merged(
        self, scale: int, context: torch.Tensor, skip: torch.Tensor, raised: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the decoder's features ``(B, C_s, *spatial_s)`` at a scale.

        Args:
            scale: of the skip.
            context: the features of the next coarser scale.
            skip: ``(B, C_s, *spatial_s)``.
            raised: what `raised` makes of the context, where that is at hand.
        """
        index = len(self.stages) - 1 - scale
        stage, raise_ = self.stages[index], self.transpconvs[index]
        first, *others = stage.convs
        convolution, *rest = first.all_modules
        passed = (stage, stage.convs, first, first.all_modules, convolution, raise_)
        joined = None
        if not any(module._forward_hooks or module._forward_pre_hooks for module in passed):
            joined = raised_convolution(raise_, convolution, context, skip)
        if joined is None:
            stacked = torch.cat((self.raised(scale, context) if raised is None else raised, skip), 1)
            return cast(torch.Tensor, stage(stacked))
        for layer in (*rest, *others):
            joined = layer(joined)
        return cast(torch.Tensor, joined)

    def logits(self, scale: int, features: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(B, K, *spatial_s)`` of a scale's segmentation layer."""
        return cast(torch.Tensor, self.seg_layers[-1 - scale](features))
