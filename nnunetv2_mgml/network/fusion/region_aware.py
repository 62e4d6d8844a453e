"""Region-aware fusion of RFNet (Ding et al., ICCV 2021): probability maps guide per-class modality weights.

At every scale a small head (PRM) predicts label maps from the masked features and the decoder; they have a loss of
their own and reach the fusion (RFM) detached. Each class then weighs the modalities by an MLP on its pooled features.
RFNet does so at full resolution too; here that scale, as costly as all others together, has the shortcut alone unless
``full_resolution_regions`` is set. The ``(B, M, K, C, V)`` tensor of the published code is never built: the weights act
before the maps, with the same result. Pooling is done in float32 whatever the precision, so that the published epsilon
of 1e-7 (``pooling_epsilon``), far below the share of a class of a few voxels, is enough: a pooled feature is at most as
large as the largest feature in its region. What differs: `RegionAwareFusion.differences`.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mgml.network.fusion.base import (
    FusedScale,
    FusionDesign,
    FusionSpec,
    at_least_float32,
    conv_block,
    float_mask,
    register,
    span,
)
from nnunetv2_mgml.network.fusion.skip import SkipFusion, skip_fusion
from nnunetv2_mgml.network.pointwise import one_by_one, products


class ProbabilityMap(nn.Module):
    """PRM: features of visible modalities (and the decoder's) ``-> (B, K, *spatial)`` label logits."""

    def __init__(self, spec: FusionSpec, scale: int) -> None:
        super().__init__()
        width = spec.channels[scale]
        self.embed = skip_fusion(spec, scale, inner=max(8, width // 4))
        has_context = scale < spec.num_scales - 1
        self.head = nn.Sequential(
            conv_block(spec, width * (2 if has_context else 1), 16), spec.conv_op(16, spec.num_classes, 1)
        )

    def forward(
        self,
        features: torch.Tensor,
        mask: torch.Tensor,
        context: torch.Tensor | None,
        shared: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args: features, mask and shared as for `SkipFusion.fuse`; decoder feature ``(B, C, *spatial)`` or None."""
        embedded = self.embed.fuse(features, mask, shared)
        logits: torch.Tensor = self.head(embedded if context is None else torch.cat((context, embedded), 1))
        return logits


class RegionWeights(nn.Module):
    """One two-layer MLP per class, evaluated together: ``(B, K, M*C+1) -> (B, K, M)`` in (0, 1)."""

    def __init__(self, num_classes: int, num_modalities: int, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(num_modalities * channels + 1, hidden) for _ in range(num_classes))
        self.second = nn.ModuleList(nn.Linear(hidden, num_modalities) for _ in range(num_classes))
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Args: pooled ``(B, K, M*C+1)``, float32 or wider."""
        weights = [
            second(self.activation(first(pooled[:, k])))
            for k, (first, second) in enumerate(zip(self.first, self.second, strict=True))
        ]
        return torch.stack(weights, 1).sigmoid()


class RegionFusion(nn.Module):
    """RFM: features and class maps ``-> (B, C, *spatial)``, half from the regions, half from a shortcut."""

    def __init__(self, spec: FusionSpec, scale: int, epsilon: float = 1e-7) -> None:
        super().__init__()
        width = spec.channels[scale]
        self.epsilon = epsilon
        self.weights = RegionWeights(spec.num_classes, spec.num_modalities, width)
        self.regions = nn.Sequential(
            conv_block(spec, spec.num_classes * width, width),
            conv_block(spec, width, width, spec.kernel_sizes[scale]),
            conv_block(spec, width, width // 2),
        )
        self.shortcut = skip_fusion(spec, scale, width - width // 2)

    def forward(
        self, features: torch.Tensor, mask: torch.Tensor, maps: torch.Tensor, shared: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Args: features, mask and shared as for `SkipFusion.fuse`; maps ``(B, K, *spatial)`` probabilities."""
        batch = len(features)
        seen, modalities = span(mask), mask.shape[1]
        flat, flat_maps, axes = features[:, seen].flatten(3), maps.flatten(2), "bmcv"
        if batch > 1 and features.stride(0) == 0:  # one sample for all masks: no copies of it
            flat, axes = flat[0], "mcv"
        with torch.autocast(features.device.type, enabled=False):
            wide, wide_maps = at_least_float32(flat), at_least_float32(flat_maps)
            pooled = torch.einsum(f"{axes},bkv->bkmc", wide, wide_maps) / flat.shape[-1]
            present = float_mask(mask, pooled[:, 0])
            share = wide_maps.mean(-1)[..., None] + self.epsilon
            pooled = pooled * present[:, None, seen]
            if pooled.shape[2] < modalities:
                pooled = functional.pad(pooled, (0, 0, seen.start, modalities - seen.stop))
            pooled = pooled.flatten(2) / share
            weights = self.weights(torch.cat((pooled, share), -1)) * present[:, None, :, 0]
            matrices = self._matrices(weights).to(features.dtype)
        regions = _mixed(matrices, features.flatten(3), mask, flat_maps)
        convolution, *rest = cast(nn.Sequential, self.regions[0])
        if convolution.bias is not None:
            regions += cast(torch.Tensor, convolution.bias)[:, None].to(regions.dtype)
        regions = regions.unflatten(2, features.shape[3:])
        for layer in (*rest, *self.regions[1:]):
            regions = layer(regions)
        return torch.cat((regions, self.shortcut.fuse(features, mask, shared)), 1)

    def _matrices(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weights ``(B, K, M)`` times the first convolution's of each class, ``(B, K*O, M, C)``."""
        convolution, *_ = cast(nn.Sequential, self.regions[0])
        kernel = at_least_float32(cast(torch.Tensor, convolution.weight)).flatten(1)
        kernel = kernel.unflatten(1, (weights.shape[1], -1))  # (O, K, C)
        return torch.einsum("okc,bkm->bkomc", kernel, weights).flatten(1, 2)


def _mixed(matrices: torch.Tensor, features: torch.Tensor, mask: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Return the sum over classes of matrix times features, times map: ``(B, O, V)``.

    Args:
        matrices: ``(B, K*O, M, C)``, 0 where the mask is False.
        features: ``(B, M, C, V)``.
        mask: ``(B, M)`` bool.
        maps: ``(B, K, V)``.
    """
    if len(features) > 1 and one_by_one(features.flatten(1, 2)):
        samples = (each.split(1) for each in (matrices, features, mask, maps))
        return torch.cat([_mixed(*sample) for sample in zip(*samples, strict=True)])
    seen = span(mask)
    per_class = products(matrices[:, :, seen].flatten(2), features[:, seen].flatten(1, 2))
    per_class = per_class.unflatten(1, (maps.shape[1], -1))
    mixed: torch.Tensor = per_class[:, 0] * maps[:, 0, None]
    for k in range(1, maps.shape[1]):
        mixed.addcmul_(per_class[:, k], maps[:, k, None])
    return mixed


@register
class RegionAwareFusion(FusionDesign):
    """PRM and RFM at every scale, the full resolution only where ``full_resolution_regions`` asks for it."""

    name = "region_aware"
    summary = "class maps weigh the modalities per region, scale by scale (RFNet, ICCV 2021)"
    publication = "RFNet, ICCV 2021"
    trainer = "RFNet"
    published_options: ClassVar[dict[str, Any]] = {
        "fusion_options": {"full_resolution_regions": True},
        "modality_decoder_weight": 4.0,
        "auxiliary_weight": 4.0,
    }
    differences: ClassVar[tuple[str, ...]] = (
        "map heads are at least 8 channels wide inside, published C/4",
        (
            "maps predict labels also where the network predicts regions, and are compared at their own scale's "
            "size (published: upsampled)"
        ),
        "convolutions pad with zeros, not by mirroring",
        (
            "the fused prediction is trained from the first epoch; the published job begins with its maps and the "
            "shared decoder alone"
        ),
    )
    default_options: ClassVar[dict[str, Any]] = {"full_resolution_regions": False, "pooling_epsilon": 1e-7}
    defaults_before: ClassVar[dict[int, dict[str, Any]]] = {1: {"pooling_epsilon": 1e-3}}
    weights_depend_on_modality = True
    hides_absent = True
    conditions_norms = True
    joins_passes = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        epsilon = self.options["pooling_epsilon"]
        if epsilon == 0:
            raise ValueError(
                "pooling_epsilon is 0, which divides by 0 where a class is missing; give 1e-7, for instance."
            )
        finest = 0 if self.options["full_resolution_regions"] or spec.num_scales == 1 else 1
        self.shortcut = skip_fusion(spec, 0) if finest else None
        self.maps = nn.ModuleDict({str(s): ProbabilityMap(spec, s) for s in range(finest, spec.num_scales)})
        self.fusions = nn.ModuleDict({str(s): RegionFusion(spec, s, epsilon) for s in range(finest, spec.num_scales)})

    def share(self, features: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """See `FusionDesign.share`: per scale the shares of the map head and of the shortcut, or the latter alone."""
        return [tuple(skip.share(f) for skip in self._skips(scale)) for scale, f in enumerate(features)]

    def _skips(self, scale: int) -> tuple[SkipFusion, ...]:
        if scale == 0 and self.shortcut is not None:
            return (self.shortcut,)
        head, fusion = self.maps[str(scale)], self.fusions[str(scale)]
        return cast(ProbabilityMap, head).embed, cast(RegionFusion, fusion).shortcut

    def reads_context(self, scale: int) -> bool:
        """Not where there is the shortcut alone; see `FusionDesign.reads_context`."""
        return scale > 0 or self.shortcut is None

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        shared = state[scale] if state else (None, None)
        if scale == 0 and self.shortcut is not None:
            return FusedScale(self.shortcut.fuse(features, mask, shared[0]))
        logits = self.maps[str(scale)](features, mask, context, shared[0])
        maps = at_least_float32(logits).softmax(1).to(features.dtype).detach()
        return FusedScale(self.fusions[str(scale)](features, mask, maps, shared[1]), auxiliary=logits)
