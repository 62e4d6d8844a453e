"""DeMoSeg (kk42yy/DeMoSeg): the channels of each modality are kept for others to stand in for those that are absent.

The ``C`` channels of the fused feature are cut into ``M`` slots, one per modality. In a modality's own feature the
channels of its slot describe itself, those of another slot are what it keeps ready to stand in for that other modality.
A slot is filled from its own modality where that is visible, else from the first visible one of a fixed order. By
position of the channels, ``j`` asks ``j^1``, ``j^2``, ``j^3``, ... (bits exclusive-or): with T1, T1ce, T2, FLAIR these
are the published partners, T1 with T1ce and T2 with FLAIR first, T1 with T2 and T1ce with FLAIR next.

In training every visible modality learns to say what every other visible one says of itself (a KL divergence over the
channels of a slot). Each modality's feature then passes a channel-shuffle block of its own. Published as the first
block of one ordinary U-Net: that is ``network_form=early_fusion`` (`nnunetv2_mgml.network.early_fusion`). Elsewhere it
is a design like others, at every scale. ``stand_in=none`` is its control: own slots only, zeros for the absent.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    conv_block,
    register,
)
from nnunetv2_mgml.network.fusion.channel_shuffle import GATINGS, ChannelShuffle
from nnunetv2_mgml.network.layers import layers
from nnunetv2_mgml.network.silence import random_layers_act


def partner_order(modalities: int) -> torch.Tensor:
    """Return who fills each slot, best first, ``(M, M)`` int64: row ``j`` is ``j, j^1, j^2, ...``, those there are."""
    steps = range(1 << max(1, (modalities - 1).bit_length()))
    return torch.tensor([[j ^ step for step in steps if j ^ step < modalities] for j in range(modalities)])


def slot_sizes(width: int, modalities: int) -> list[int]:
    """Return the channels of each slot: equal, the first ones larger by one where the width cannot be divided."""
    return [width // modalities + (j < width % modalities) for j in range(modalities)]


def stand_in_divergence(features: torch.Tensor, mask: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Sum over ordered pairs of visible modalities (a, b) of KL(b's own slot || what a keeps for b).

    Softmax over the channels of the slot, mean over channels, voxels and samples; gradient on both sides. Scalar
    float32.

    Args:
        features: ``(B, M, C, V)``.
        mask: ``(B, M)`` bool, True = visible.
        sizes: channels of each slot.
    """
    total = features.new_zeros((), dtype=torch.promote_types(features.dtype, torch.float32))
    for b, slot in enumerate(features.split(sizes, 2)):
        log_shares = at_least_float32(slot).log_softmax(2)
        own = log_shares[:, b : b + 1]
        divergence = (own.exp() * (own - log_shares)).mean((2, 3))
        both = (mask & mask[:, b : b + 1]).to(divergence.dtype)
        total = total + (divergence * both).sum(1).mean()
    return total


@register
class DeMoSegFusion(FusionDesign):
    """Slots filled by their own modality or by one that stands in."""

    name = "demoseg"
    summary = "channel slots that present modalities fill for absent ones, for one encoder (DeMoSeg, 2026)"
    publication = "DeMoSeg (kk42yy/DeMoSeg), 2026"
    trainer = "DeMoSeg"
    published_options: ClassVar[dict[str, Any]] = {
        "fusion_options": {"kl_weight": 1.0},  # half the sum over a batch of two, in the published code
        "network_form": "early_fusion",
        "width_factor": 1.0,
        "decoder_width_ratio": 1.0,
    }
    published_alone: ClassVar[dict[str, Any]] = {"modality_decoder_weight": 0.0}
    differences: ClassVar[tuple[str, ...]] = (
        "who stands in for whom follows the channels' positions; with T1, T1ce, T2, FLAIR that is the published rule",
        "the gates of the channel-shuffle blocks, which nothing trains in the published code, are stored as constants",
        (
            "the plan's norm also inside the blocks, published without scale and shift there; heads and transposed "
            "convolutions have biases"
        ),
        "the divergence is averaged over the samples; published is half their sum, the same for a batch of two",
        "slots differ by a channel where the width cannot be divided by the number of modalities",
    )
    default_options: ClassVar[dict[str, Any]] = {"stand_in": "partners", "gating": "published", "kl_weight": 0.5}
    option_choices: ClassVar[dict[str, tuple[str, ...]]] = {"stand_in": ("partners", "none"), "gating": GATINGS}
    weights_depend_on_modality = True
    order_matters = True
    hides_absent = True
    order: torch.Tensor
    """`partner_order`."""
    uses_context = False

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        self.partners = self.options["stand_in"] == "partners"
        self.sizes = [slot_sizes(width, spec.num_modalities) for width in spec.channels]
        if any(sizes[-1] == 0 for sizes in self.sizes):
            raise ValueError(
                f"Fusion design 'demoseg' needs at least one channel per modality, got {min(spec.channels)} channels "
                f"for {spec.num_modalities} modalities. Set a larger width_factor or decoder_width_ratio."
            )
        self.register_buffer("order", partner_order(spec.num_modalities), persistent=False)
        for scale, sizes in enumerate(self.sizes):  # made here: made in a step, the copy to a GPU would be waited for
            slot = torch.tensor([slot for slot, size in enumerate(sizes) for _ in range(size)])
            self.register_buffer(f"slot_{scale}", slot, persistent=False)
        self.blocks = layers(self._blocks(s) for s in range(spec.num_scales)) if self.partners else None

    def _blocks(self, scale: int) -> nn.ModuleList:
        spec, width = self.spec, self.spec.channels[scale]
        return nn.ModuleList(
            nn.Sequential(
                conv_block(spec, width, width, spec.kernel_sizes[scale]),
                ChannelShuffle(width, spec.norm_op, spec.norm_op_kwargs, self.options["gating"], descending=m > 0),
            )
            for m in range(spec.num_modalities)
        )

    def prepared(self, scale: int, features: torch.Tensor) -> torch.Tensor:
        """Return what the slots are cut from, ``(B, M, C, *spatial)``: every modality through its block, if any."""
        if self.blocks is None:
            return features
        return torch.stack([block(features[:, m]) for m, block in enumerate(self.blocks[scale])], 1)

    def share(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """See `FusionDesign.share`: the prepared features."""
        return [self.prepared(s, f) for s, f in enumerate(features)]

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        prepared = self.prepared(scale, features) if state is None else state[scale]
        prepared = prepared.expand(len(mask), *prepared.shape[1:])
        fused = self._fill(prepared, mask, self.get_buffer(f"slot_{scale}"))
        if not (self.partners and random_layers_act(self.training)):
            return FusedScale(fused)
        with torch.autocast(features.device.type, enabled=False):
            divergence = stand_in_divergence(features.flatten(3), mask, self.sizes[scale])
        return FusedScale(fused, loss=self.options["kl_weight"] / self.spec.num_scales * divergence)

    def _fill(self, prepared: torch.Tensor, mask: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Take every channel from whoever fills its slot ``(C,)``; ``(B, C, *spatial)``."""
        dimensions = [1] * (prepared.ndim - 3)
        if self.partners:
            first = mask[:, self.order].int().argmax(2)  # (B, M): place in a slot's row of the first that is visible
            source = self.order.expand(len(mask), -1, -1).gather(2, first[..., None])[..., 0]
            chosen = source[:, slot]
        else:
            chosen = slot.expand(len(mask), -1)
        index = chosen.reshape(len(mask), 1, -1, *dimensions).expand(-1, -1, -1, *prepared.shape[3:])
        fused = prepared.gather(1, index)[:, 0]
        if self.partners:
            return fused
        return torch.where(mask[:, slot].reshape(*chosen.shape, *dimensions), fused, 0)
