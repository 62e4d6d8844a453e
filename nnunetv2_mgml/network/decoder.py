"""The fusion decoder: nnU-Net's decoder, fusing the modalities scale by scale on its way up."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

from nnunetv2_mgml.network.encoders import EncoderSpec
from nnunetv2_mgml.network.fusion.base import FusionDesign, masked


class Decoded(NamedTuple):
    """Result of `FusionDecoder`."""

    outputs: list[torch.Tensor]
    """Logits ``(B, R, *spatial_s)``, highest resolution first (one entry without deep supervision)."""
    auxiliary: list[torch.Tensor]
    """The design's auxiliary label logits."""
    loss: torch.Tensor
    """The sum of the design's own losses, scalar float32."""
    features: torch.Tensor
    """What the full-resolution head reads, ``(B, C, *spatial)``."""


class FusionDecoder(UNetDecoder):
    """`UNetDecoder` (same layers, same state-dict keys) whose skips are fused just before they are used.

    ``deep_supervision`` is read at every call, as nnU-Net expects of ``network.decoder``.
    """

    def __init__(self, spec: EncoderSpec, num_outputs: int, n_conv_per_stage: Any, deep_supervision: bool,
                 nonlin_first: bool = False) -> None:
        super().__init__(spec, num_outputs, n_conv_per_stage, deep_supervision, nonlin_first=nonlin_first)

    def forward(self, features: list[torch.Tensor], mask: torch.Tensor, fusion: FusionDesign,
                images: torch.Tensor | None = None, available: torch.Tensor | None = None) -> Decoded:
        """Fuse and decode.

        Args:
            features: per scale, full resolution first, ``(B, M, C_s, *spatial_s)``.
            mask: ``(B, M)`` bool, True = present.
            fusion: the design.
            images: ``(B, M, *spatial)`` for the design's `image_loss`; None: no such loss.
            available: ``(B, M)`` bool, the modalities each case has; with ``images``.
        """
        state = fusion.begin()
        auxiliary: list[torch.Tensor] = []
        loss = features[0].new_zeros((), dtype=torch.float32)
        outputs: list[torch.Tensor] = []
        context: torch.Tensor | None = None
        fused_scales: list[torch.Tensor] = []
        for scale in reversed(range(len(features))):
            stage = len(features) - 2 - scale
            if stage >= 0:
                context = self.transpconvs[stage](context)
            present = masked(mask, features[scale]).bool()
            fused = fusion.fuse_scale(scale, torch.where(present, features[scale], 0), mask, context, state)
            if fused.auxiliary is not None:
                auxiliary.append(fused.auxiliary)
            if fused.loss is not None:
                loss = loss + fused.loss
            if images is not None:
                fused_scales.append(fused.fused)
            if stage < 0:
                context = fused.fused
                continue
            context = self.stages[stage](torch.cat((context, fused.fused), 1))
            if self.deep_supervision or scale == 0:
                outputs.append(self.seg_layers[stage](context))
        if images is not None:
            loss = loss + fusion.image_loss(fused_scales[::-1], images, available)
        return Decoded(outputs[::-1], auxiliary, loss, context)


def modality_decoder(spec: EncoderSpec, num_classes: int, n_conv_per_stage: Any, nonlin_first: bool = False
                     ) -> UNetDecoder:
    """Build the decoder shared by all modalities: full-resolution label logits from one modality's features.

    Its lower-resolution heads are dropped: nothing trains them, and DDP refuses parameters without gradient.
    """
    decoder = UNetDecoder(spec, num_classes, n_conv_per_stage, deep_supervision=False, nonlin_first=nonlin_first)
    heads = len(decoder.seg_layers)
    decoder.seg_layers = nn.ModuleList([*(nn.Identity() for _ in range(heads - 1)), decoder.seg_layers[-1]])
    return decoder
