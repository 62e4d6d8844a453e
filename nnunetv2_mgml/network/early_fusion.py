"""The early-fusion form of the network: a stem per modality, fused at full resolution, and one U-Net for all.

The stems (one convolution, norm, nonlinearity) never see the mask, so their features serve every subset; the fusion
design works on them alone, as on a network of one scale. Everything after it, the trunk, runs once per subset: it is an
ordinary U-Net of one stride-2 convolution and one channel-shuffle block per stage, as DeMoSeg's. Next to the
multi-encoder form the trunk costs the same for one modality as for four, and memory hardly grows with their number;
what is predicted from many subsets, and each modality's own prediction that MGML teaches with, costs one trunk each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunetv2_mgml.network.decoder import Decoded
from nnunetv2_mgml.network.encoders import EncoderSpec
from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, expand_mask
from nnunetv2_mgml.network.fusion.channel_shuffle import ChannelShuffle
from nnunetv2_mgml.network.multi_encoder_unet import MultiEncoderUNet
from nnunetv2_mgml.network.pointwise import pointwise

_TRANSPOSED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv2d: nn.ConvTranspose2d,
    nn.Conv3d: nn.ConvTranspose3d,
}


def _convolution(spec: EncoderSpec, inputs: int, outputs: int, scale: int, stride: Any = 1) -> nn.Sequential:
    """Convolution, norm, nonlinearity with a scale's kernel; "same" padding."""
    kernel = spec.kernel_sizes[scale]
    layers: list[nn.Module] = [
        spec.conv_op(inputs, outputs, kernel, stride, padding=[k // 2 for k in kernel], bias=spec.conv_bias)
    ]
    if spec.norm_op is not None:
        layers.append(spec.norm_op(outputs, **(spec.norm_op_kwargs or {})))
    if spec.nonlin is not None:
        layers.append(spec.nonlin(**(spec.nonlin_kwargs or {})))
    return nn.Sequential(*layers)


def _block(spec: EncoderSpec, width: int, scale: int, gating: str) -> nn.Sequential:
    """A convolution and a channel shuffle, ``(B, C, *spatial)`` to the same."""
    return nn.Sequential(
        _convolution(spec, width, width, scale), ChannelShuffle(width, spec.norm_op, spec.norm_op_kwargs, gating)
    )


class Stem(nn.Module):
    """One modality's channels ``(B, 1 + P, *spatial) -> [(B, C_0, *spatial)]``, with ``P`` channels of a cascade."""

    def __init__(self, spec: EncoderSpec, inputs: int) -> None:
        super().__init__()
        self.convolution = _convolution(spec, inputs, spec.output_channels[0], 0)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Args: ``(B, 1 + P, *spatial)``."""
        return [self.convolution(x)]


class TrunkDecoder(nn.Module):
    """Fuses the stems, then the one U-Net; takes the place of `FusionDecoder`, with the same calls.

    ``deep_supervision`` is read at every call, as nnU-Net expects of ``network.decoder``.

    Args:
        spec: widths, kernels and strides of the stages.
        num_outputs: ``R``, fused heads.
        deep_supervision: start value.
        gating: of the channel-shuffle blocks.
    """

    def __init__(self, spec: EncoderSpec, num_outputs: int, deep_supervision: bool, gating: str = "published") -> None:
        super().__init__()
        widths, scales = spec.output_channels, len(spec.output_channels)
        self.deep_supervision = deep_supervision
        self.down = nn.ModuleList(
            nn.Sequential(
                _convolution(spec, widths[s - 1], widths[s], s, spec.strides[s]), _block(spec, widths[s], s, gating)
            )
            for s in range(1, scales)
        )
        transposed = _TRANSPOSED[spec.conv_op]
        self.up = nn.ModuleList(
            transposed(widths[s + 1], widths[s], spec.strides[s + 1], spec.strides[s + 1], bias=spec.conv_bias)
            for s in range(scales - 1)
        )
        self.merge = nn.ModuleList(
            nn.Sequential(_convolution(spec, 2 * widths[s], widths[s], s), _block(spec, widths[s], s, gating))
            for s in range(scales - 1)
        )
        self.heads = nn.ModuleList(pointwise(spec.conv_op)(widths[s], num_outputs, 1) for s in range(scales - 1))

    @property
    def coarsest_output(self) -> int:
        """See `SubsetDecoder`."""
        return len(self.heads) - 1 if self.deep_supervision else 0

    def forward(
        self,
        features: list[torch.Tensor],
        mask: torch.Tensor,
        fusion: FusionDesign,
        images: torch.Tensor | None = None,
        available: torch.Tensor | None = None,
        finest: int = 0,
    ) -> Decoded:
        """Fuse and predict; see `FusionDecoder.forward`. ``features`` are the stems', a list of one."""
        fused = self.fuse(features, mask, fusion, available)
        loss = fused.fused.new_zeros((), dtype=torch.float32)
        if fused.loss is not None:
            loss = loss + fused.loss
        if images is not None:
            assert available is not None  # comes with the images
            loss = loss + fusion.image_loss([fused.fused], images, available)
        own = self.run(fused.fused, finest)
        outputs = [head(feature) for head, feature in zip(self.heads[finest:], own, strict=True)]
        auxiliary = [] if fused.auxiliary is None else [fused.auxiliary]
        return Decoded(outputs if self.deep_supervision else outputs[:1], auxiliary, loss, own[0])

    def fuse(
        self, features: list[torch.Tensor], mask: torch.Tensor, fusion: FusionDesign, available: torch.Tensor | None
    ) -> FusedScale:
        """Fuse the stems; the arguments are those of `forward`."""
        (stems,) = features
        state = fusion.begin() if available is None else fusion.begin_training(available)
        if not fusion.hides_absent:
            stems = torch.where(expand_mask(mask, stems), stems, 0)
        return fusion.fuse_scale(0, stems, mask, None, state)

    def run(self, fused: torch.Tensor, finest: int = 0) -> list[torch.Tensor]:
        """Return what the heads read, per scale ``(B, C_s, *spatial_s)``, highest resolution first.

        Args:
            fused: ``(B, C_0, *spatial)``.
            finest: the scale at which to end.
        """
        skips = [fused]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        feature = skips.pop()
        decoded: list[torch.Tensor] = []
        for scale in reversed(range(finest, len(self.up))):
            feature = self.merge[scale](torch.cat((self.up[scale](feature), skips.pop()), 1))
            decoded.append(feature)
        return decoded[::-1]

    def decode_masks(
        self, features: list[torch.Tensor], masks: torch.Tensor, fusion: FusionDesign, voxels: int
    ) -> torch.Tensor:
        """Predict one sample from many subsets; see `FusionDecoder.decode_masks`."""
        shared = fusion.share(features)
        most = max(1, voxels // math.prod(features[0].shape[3:]))
        results = []
        for some in masks.split(most):
            stems = features[0].expand(len(some), *features[0].shape[1:])
            if not fusion.hides_absent:
                stems = torch.where(expand_mask(some, stems), stems, 0)
            fused = fusion.fuse_scale(0, stems, some, None, fusion.begin(shared)).fused
            results.append(self.heads[0](self.run(fused)[0]))
        return torch.cat(results)


class EarlyFusionUNet(MultiEncoderUNet):
    """`MultiEncoderUNet` whose encoders are stems and whose decoder is the whole U-Net.

    Its ``modality_decoder`` is a 1x1 convolution from the trunk's full-resolution feature to the label classes.
    """

    def decode_modalities(self, features: list[torch.Tensor], places: torch.Tensor | None = None) -> torch.Tensor:
        """Return label logits from each modality alone, ``(B, M, K, *spatial)``: ``M`` passes of the trunk.

        Args:
            features: the stems'.
            places: not used, every pass is of all samples.

        Raises:
            RuntimeError: the network was built without this head (no loss needed it).
        """
        if self.modality_decoder is None:
            raise RuntimeError("This network has no modality head (modality_decoder_weight 0, soft_label none).")
        trunk = cast(TrunkDecoder, self.decoder)
        alone = torch.eye(self.num_modalities, dtype=torch.bool, device=features[0].device)
        fused = [trunk.fuse(features, row.expand(len(features[0]), -1), self.fusion, None).fused for row in alone]
        return torch.stack([self.modality_decoder(self._at_full_resolution(trunk, one)) for one in fused], 1)

    def _at_full_resolution(self, trunk: TrunkDecoder, fused: torch.Tensor) -> torch.Tensor:
        """Run the trunk, which draws no random numbers; computed again in the backward pass where memory counts."""
        if not self._checkpoints():
            return trunk.run(fused)[0]
        again: torch.Tensor = checkpoint(
            lambda one: trunk.run(one)[0], fused, use_reentrant=False, preserve_rng_state=False
        )
        return again
