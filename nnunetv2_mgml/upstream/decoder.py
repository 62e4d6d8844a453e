"""nnU-Net's decoder, one scale at a time.

Bends: ``UNetDecoder.forward``, of which these are the steps, and the layers it goes through (``transpconvs``,
    ``stages``, ``seg_layers``).
Why: it takes all skips at once, but what fuses a skip needs the decoder's features of the coarser scale.
Guarded by: tests/upstream/test_upstream_drift.py
"""

from __future__ import annotations

from typing import cast

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder


class StepwiseDecoder(UNetDecoder):  # type: ignore[misc]  # untyped
    """`UNetDecoder` (same layers, same state-dict keys) whose steps can be taken one by one.

    Scales are counted from full resolution, 0, to the bottleneck, ``len(self.stages)``.
    """

    def raised(self, scale: int, context: torch.Tensor) -> torch.Tensor:
        """Bring the decoder's features ``(B, C, *spatial)`` of the next coarser scale to the size of this one."""
        return cast(torch.Tensor, self.transpconvs[len(self.stages) - 1 - scale](context))

    def merged(self, scale: int, context: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Return the decoder's features at a scale from raised ones and the skip, both ``(B, C_s, *spatial_s)``."""
        return cast(torch.Tensor, self.stages[len(self.stages) - 1 - scale](torch.cat((context, skip), 1)))

    def logits(self, scale: int, features: torch.Tensor) -> torch.Tensor:
        """Return the logits ``(B, K, *spatial_s)`` of a scale's segmentation layer."""
        return cast(torch.Tensor, self.seg_layers[-1 - scale](features))
