"""The fusion decoder: nnU-Net's decoder, fusing the modalities scale by scale on its way up."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn

from nnunetv2_mgml.network.encoders import EncoderSpec
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, expand_mask
from nnunetv2_mgml.network.pointwise import make_pointwise
from nnunetv2_mgml.upstream.decoder import StepwiseDecoder


class Decoded(NamedTuple):
    """Result of `FusionDecoder`."""

    outputs: list[torch.Tensor]
    """Logits ``(B, R, *spatial_s)``, highest resolution first (one entry without deep supervision)."""
    auxiliary: list[torch.Tensor]
    """The design's auxiliary label logits."""
    loss: torch.Tensor
    """The sum of the design's own losses, scalar float32."""
    features: torch.Tensor
    """What the finest of these heads reads, ``(B, C, *spatial_s)``."""


class SubsetDecoder(Protocol):
    """What the network calls of its decoder: `FusionDecoder`, or `TrunkDecoder` of the early-fusion form."""

    deep_supervision: bool
    """The switch nnU-Net sets, read at every call."""

    @property
    def coarsest_output(self) -> int:
        """The scale of the last of the outputs; 0, full resolution, without deep supervision."""

    def __call__(
        self,
        features: list[torch.Tensor],
        mask: torch.Tensor,
        fusion: FusionDesign,
        images: torch.Tensor | None = None,
        available: torch.Tensor | None = None,
        finest: int = 0,
    ) -> Decoded:
        """See `FusionDecoder.forward`."""

    def decode_masks(
        self, features: list[torch.Tensor], masks: torch.Tensor, fusion: FusionDesign, voxels: int
    ) -> torch.Tensor:
        """See `FusionDecoder.decode_masks`."""


class FusionDecoder(StepwiseDecoder):
    """`UNetDecoder` (same layers, same state-dict keys) whose skips are fused just before they are used.

    ``deep_supervision`` is read at every call, as nnU-Net expects of ``network.decoder``.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        num_outputs: int,
        n_conv_per_stage: Any,
        deep_supervision: bool,
        nonlin_first: bool = False,
    ) -> None:
        super().__init__(spec, num_outputs, n_conv_per_stage, deep_supervision, nonlin_first=nonlin_first)
        for layer in self.seg_layers:
            make_pointwise(layer)

    @property
    def coarsest_output(self) -> int:
        """See `SubsetDecoder`."""
        return len(self.seg_layers) - 1 if self.deep_supervision else 0

    def forward(
        self,
        features: list[torch.Tensor],
        mask: torch.Tensor,
        fusion: FusionDesign,
        images: torch.Tensor | None = None,
        available: torch.Tensor | None = None,
        finest: int = 0,
    ) -> Decoded:
        """Fuse and decode.

        Args:
            features: per scale, full resolution first, ``(B, M, C_s, *spatial_s)``.
            mask: ``(B, M)`` bool, True = visible.
            fusion: the design.
            images: ``(B, M, *spatial)`` for the design's `image_loss`; None: no such loss.
            available: ``(B, M)`` bool, the modalities each case has, in the pass a training step learns from; needed
                with ``images``.
            finest: the scale at which to end, with the first of the outputs; 0: full resolution.
        """
        state = fusion.begin() if available is None else fusion.begin_training(available)
        auxiliary: list[torch.Tensor] = []
        loss = features[0].new_zeros((), dtype=torch.float32)
        outputs: list[torch.Tensor] = []
        context: torch.Tensor | None = None
        fused_scales: list[torch.Tensor] = []
        for scale in reversed(range(finest, len(features))):
            fused, context = self._level(scale, features[scale], mask, context, fusion, state)
            if fused.auxiliary is not None:
                auxiliary.append(fused.auxiliary)
            if fused.loss is not None:
                loss = loss + fused.loss
            if images is not None:
                fused_scales.append(fused.fused)
            if scale == finest or (self.deep_supervision and scale < len(features) - 1):
                outputs.append(self.logits(scale, context))
        if images is not None:
            assert available is not None  # comes with the images
            loss = loss + fusion.image_loss(fused_scales[::-1], images, available)
        assert context is not None  # there is at least the bottleneck
        return Decoded(outputs[::-1], auxiliary, loss, context)

    def decode_masks(
        self, features: list[torch.Tensor], masks: torch.Tensor, fusion: FusionDesign, voxels: int
    ) -> torch.Tensor:
        """Predict one sample from many subsets.

        What does not depend on the mask is computed once (`FusionDesign.share`). Subsets go through a scale together as
        long as their voxels there are at most ``voxels``: all of them at the deep scales, a few or one at the finest.

        Args:
            features: per scale, full resolution first, ``(1, M, C_s, *spatial_s)``.
            masks: ``(S, M)`` bool.
            fusion: the design.
            voxels: at least one subset is decoded at a time, however large.

        Returns:
            Logits ``(S, R, *spatial)`` at full resolution.
        """
        shared = fusion.share(features)
        # a design with a state of its own keeps something from scale to scale, for the subsets it began with
        scales = range(len(features)) if type(fusion).begin is FusionDesign.begin else (0,)
        at_once = {s: max(1, voxels // math.prod(features[s].shape[3:])) for s in scales}

        def decode(scale: int, masks: torch.Tensor, context: torch.Tensor | None, state: Any) -> torch.Tensor:
            most = at_once.get(scale, len(masks))
            if len(masks) > most:
                contexts = [None] * len(masks) if context is None else context.split(most)
                return torch.cat(
                    [decode(scale, *part, state) for part in zip(masks.split(most), contexts, strict=False)]
                )
            own = features[scale].expand(len(masks), *features[scale].shape[1:])
            _, context = self._level(scale, own, masks, context, fusion, state)
            return decode(scale - 1, masks, context, state) if scale else self.logits(0, context)

        deepest = len(features) - 1
        together = masks.split(len(masks) if len(scales) > 1 else at_once[0])
        return torch.cat([decode(deepest, some, None, fusion.begin(shared)) for some in together])

    def _level(
        self,
        scale: int,
        features: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor | None,
        fusion: FusionDesign,
        state: Any,
    ) -> tuple[FusedScale, torch.Tensor]:
        """Return what was fused at a scale, and the decoder's features there: the context of the next finer one."""
        raised = None
        if context is not None and fusion.reads_context(scale):
            raised = self.raised(scale, context)
        if not fusion.hides_absent:
            features = torch.where(expand_mask(mask, features), features, 0)
        fused = fusion.fuse_scale(scale, features, mask, raised, state)
        if context is None:
            return fused, fused.fused
        return fused, self.merged(scale, context, fused.fused, raised)


def modality_decoder(
    spec: EncoderSpec, num_classes: int, n_conv_per_stage: Any, nonlin_first: bool = False
) -> UNetDecoder:
    """Build the decoder shared by all modalities: label logits from one modality's features, at the finest it is given.

    Its lower-resolution heads are dropped: nothing trains them, and DDP refuses parameters without gradient.

    Args:
        spec: of the scales it is given (`EncoderSpec.from_scale`).
        num_classes: ``K``.
        n_conv_per_stage: one number, or one per stage, deepest first.
        nonlin_first: as in nnU-Net's decoder.
    """
    decoder = UNetDecoder(spec, num_classes, n_conv_per_stage, deep_supervision=False, nonlin_first=nonlin_first)
    heads = len(decoder.seg_layers)
    decoder.seg_layers = nn.ModuleList([*(nn.Identity() for _ in range(heads - 1)), decoder.seg_layers[-1]])
    make_pointwise(decoder.seg_layers[-1])
    return decoder
