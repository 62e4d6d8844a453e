"""The fusion decoder: nnU-Net's decoder, fusing the modalities scale by scale on its way up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_mgml.network.conditional_norms import Told
from nnunetv2_mgml.network.encoders import EncoderSpec
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, expand_mask
from nnunetv2_mgml.network.pointwise import make_pointwise
from nnunetv2_mgml.network.silence import silence
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


@dataclass
class _Climb:
    """A pass, or two as one batch, on the way from the bottleneck to full resolution."""

    mask: torch.Tensor
    state: Any
    """What the design's `begin` returned."""
    context: torch.Tensor | None = None
    """The decoder's features of the scale that was reached."""
    outputs: list[torch.Tensor] = field(default_factory=list)
    auxiliary: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    fused: list[torch.Tensor] | None = None
    """What the design returned, where somebody wants to see it."""

    def add(self, fused: FusedScale, context: torch.Tensor, output: torch.Tensor | None) -> None:
        """Take a step up."""
        self.context = context
        if self.fused is not None:
            self.fused.append(fused.fused)
        self.auxiliary += [] if fused.auxiliary is None else [fused.auxiliary]
        self.losses += [] if fused.loss is None else [fused.loss]
        self.outputs += [] if output is None else [output]

    def half(self, which: int, state: Any) -> _Climb:
        """Return one of two passes, to go on alone; 0: the first, whose auxiliary logits and losses these are."""
        assert self.context is not None  # there is at least the bottleneck
        mask, context = self.mask.chunk(2)[which], self.context.chunk(2)[which]
        outputs = [output.chunk(2)[which] for output in self.outputs]
        if which:
            return _Climb(mask, state, context, outputs)
        return _Climb(mask, state, context, outputs, [a[: len(mask)] for a in self.auxiliary], [*self.losses])

    def decoded(self) -> Decoded:
        """Return the result."""
        assert self.context is not None
        none = self.context.new_zeros((), dtype=torch.float32)
        return Decoded(self.outputs[::-1], self.auxiliary, sum(self.losses, none), self.context)


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

    Attributes:
        told: what conditional norms here and in the fusion design are told; None: there are none.
    """

    told: Told | None = None

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
        climb = _Climb(mask, fusion.begin() if available is None else fusion.begin_training(available))
        climb.fused = None if images is None else []
        with self._telling(mask):
            self._climb(climb, range(finest, len(features)), features, fusion)
        decoded = climb.decoded()
        if images is None or climb.fused is None:
            return decoded
        assert available is not None  # comes with the images
        return decoded._replace(loss=decoded.loss + fusion.image_loss(climb.fused[::-1], images, available))

    def both(
        self,
        features: list[torch.Tensor],
        visible: torch.Tensor,
        available: torch.Tensor,
        fusion: FusionDesign,
        *,
        finest: int = 0,
        apart: int = 0,
        again: bool = False,
    ) -> tuple[Decoded, Decoded]:
        """Predict from what is visible and from all that a case has, at the coarse scales as one batch.

        Small tensors gain from going through a layer together. The results are those of `forward` for either mask, the
        second in `silence`, up to rounding.

        Args:
            features: as for `forward`.
            visible: ``(B, M)`` bool.
            available: ``(B, M)`` bool.
            fusion: the design; the two are one batch where it `joins` them.
            finest: the scale at which the prediction from ``available`` ends.
            apart: finer scales than this are decoded one after the other: a batch would gain little and take memory.
            again: whether those of ``available`` keep nothing and are computed again for the backward pass.
        """
        apart = max(apart, finest)
        together = _Climb(torch.cat((visible, available)), fusion.begin())
        with self._telling(together.mask):
            for scale in reversed(range(apart, len(features))):
                fused, context = self._level_of_both(scale, features[scale], together, fusion)
                together.add(fused, context, self._output(scale, context, scale == finest))

        def finish(*fine: torch.Tensor) -> Decoded:
            climb = together.half(1, fusion.begin())
            with silence(), self._telling(climb.mask):  # also where it is run again
                self._climb(climb, range(finest, apart), fine, fusion)
            return climb.decoded()

        # first, so that the backward pass meets it last, when what the student kept is gone
        if again and finest < apart:
            complete: Decoded = checkpoint(finish, *features[:apart], use_reentrant=False, preserve_rng_state=False)
        else:
            complete = finish(*features[:apart])
        student = together.half(0, fusion.begin())
        with self._telling(visible):
            self._climb(student, range(apart), features, fusion)
        return student.decoded(), complete

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
            with self._telling(masks):
                _, context = self._level(scale, own, masks, context, fusion, state)
            return decode(scale - 1, masks, context, state) if scale else self.logits(0, context)

        deepest = len(features) - 1
        together = masks.split(len(masks) if len(scales) > 1 else at_once[0])
        return torch.cat([decode(deepest, some, None, fusion.begin(shared)) for some in together])

    def _telling(self, mask: torch.Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self.told is None else self.told.tell(mask)

    def _climb(self, climb: _Climb, scales: range, features: Sequence[torch.Tensor], fusion: FusionDesign) -> None:
        """Take a pass through some scales, the coarsest first; the last of them ends in an output."""
        for scale in reversed(scales):
            fused, context = self._level(scale, features[scale], climb.mask, climb.context, fusion, climb.state)
            climb.add(fused, context, self._output(scale, context, scale == scales[0]))

    def _output(self, scale: int, context: torch.Tensor, last: bool) -> torch.Tensor | None:
        """Return a scale's logits where there are any: at the last scale, and under deep supervision above the
        bottleneck."""
        wanted = last or (self.deep_supervision and scale < len(self.stages))
        return self.logits(scale, context) if wanted else None

    def _level_of_both(
        self, scale: int, features: torch.Tensor, together: _Climb, fusion: FusionDesign
    ) -> tuple[FusedScale, torch.Tensor]:
        """Return what `_level` does, for a batch of two passes; of the auxiliary logits the first ones' are enough."""
        mask, context = together.mask, together.context
        if fusion.joins(scale):
            return self._level(scale, torch.cat((features, features)), mask, context, fusion, together.state)
        masks = mask.chunk(2)
        contexts = (None, None) if context is None else context.chunk(2)
        with self._telling(masks[0]):
            own, reached = self._level(scale, features, masks[0], contexts[0], fusion, fusion.begin())
        with silence(), self._telling(masks[1]):
            other, also = self._level(scale, features, masks[1], contexts[1], fusion, fusion.begin())
        return own._replace(fused=torch.cat((own.fused, other.fused))), torch.cat((reached, also))

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
