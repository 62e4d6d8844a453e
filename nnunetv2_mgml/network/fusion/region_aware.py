"""Region-aware fusion of RFNet (Ding et al., ICCV 2021): probability maps guide per-class modality weights.

At every scale a small head (PRM) predicts label maps from the masked features and the decoder; they have a loss of
their own and reach the fusion (RFM) detached. Each class then weighs the modalities by an MLP on its pooled features.
RFNet does so at full resolution too; here that scale, as costly as all others together, has the shortcut alone unless
``full_resolution_regions`` is set. Three things differ from the published code: the ``(B, M, K, C, V)`` tensor is never
built (the weights act before the maps, with the same result), the pooling denominator is floored at 1e-3 for half
precision, and the PRM is at least 8 channels wide inside (RFNet: C/4, which is less below C = 32).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusedScale, FusionDesign, FusionSpec, conv_block, masked, register
from nnunetv2_mgml.network.fusion.skip import skip_fusion

_FLOOR = 1e-3


class ProbabilityMap(nn.Module):
    """PRM: features of present modalities (and the decoder's) ``-> (B, K, *spatial)`` label logits."""

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
        return self.head(embedded if context is None else torch.cat((context, embedded), 1))


class RegionWeights(nn.Module):
    """One two-layer MLP per class, evaluated together: ``(B, K, M*C+1) -> (B, K, M)`` in (0, 1)."""

    def __init__(self, num_classes: int, num_modalities: int, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(num_modalities * channels + 1, hidden) for _ in range(num_classes))
        self.second = nn.ModuleList(nn.Linear(hidden, num_modalities) for _ in range(num_classes))
        self.activation = nn.LeakyReLU(0.2)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Args: pooled ``(B, K, M*C+1)`` float32."""
        weights = [
            second(self.activation(first(pooled[:, k])))
            for k, (first, second) in enumerate(zip(self.first, self.second, strict=True))
        ]
        return torch.stack(weights, 1).sigmoid()


class RegionFusion(nn.Module):
    """RFM: features and class maps ``-> (B, C, *spatial)``, half from the regions, half from a shortcut."""

    def __init__(self, spec: FusionSpec, scale: int) -> None:
        super().__init__()
        width = spec.channels[scale]
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
        flat, flat_maps = features.flatten(3), maps.flatten(2)
        with torch.autocast(features.device.type, enabled=False):
            pooled = torch.einsum("bmcv,bkv->bkmc", flat.float(), flat_maps.float()) / flat.shape[-1]
            present = masked(mask, pooled[:, 0])
            share = flat_maps.float().mean(-1)[..., None]
            pooled = (pooled * present[:, None]).flatten(2) / (share + _FLOOR)
            weights = self.weights(torch.cat((pooled, share + _FLOOR), -1)) * present[:, None, :, 0]
            weights = weights.to(features.dtype)
        weighted = torch.einsum("bmcv,bkm->bkcv", flat, weights)
        regions = (weighted * flat_maps[:, :, None]).reshape(batch, -1, *features.shape[3:])
        return torch.cat((self.regions(regions), self.shortcut.fuse(features, mask, shared)), 1)


@register
class RegionAwareFusion(FusionDesign):
    """PRM and RFM at every scale, the full resolution only where ``full_resolution_regions`` asks for it."""

    name = "region_aware"
    summary = "class maps weigh the modalities per region, scale by scale (RFNet, ICCV 2021)"
    trainer = "RFNet"
    published_options: ClassVar[dict[str, Any]] = {"fusion_options": {"full_resolution_regions": True}}
    default_options = {"full_resolution_regions": False}
    weights_depend_on_modality = True
    hides_absent = True

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__(spec)
        finest = 0 if self.options["full_resolution_regions"] or spec.num_scales == 1 else 1
        self.shortcut = skip_fusion(spec, 0) if finest else None
        self.maps = nn.ModuleDict({str(s): ProbabilityMap(spec, s) for s in range(finest, spec.num_scales)})
        self.fusions = nn.ModuleDict({str(s): RegionFusion(spec, s) for s in range(finest, spec.num_scales)})

    def share(self, features: list[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """See `FusionDesign.share`: per scale the shares of the map head and of the shortcut, or the latter alone."""
        skips = [
            (self.maps[str(s)].embed, self.fusions[str(s)].shortcut) if str(s) in self.maps else (self.shortcut,)
            for s in range(self.spec.num_scales)
        ]
        return [tuple(skip.share(f) for skip in own) for own, f in zip(skips, features, strict=True)]

    def fuse_scale(
        self, scale: int, features: torch.Tensor, mask: torch.Tensor, context: torch.Tensor | None, state: Any
    ) -> FusedScale:
        """See `FusionDesign.fuse_scale`."""
        shared = state[scale] if state else (None, None)
        if scale == 0 and self.shortcut is not None:
            return FusedScale(self.shortcut.fuse(features, mask, shared[0]))
        logits = self.maps[str(scale)](features, mask, context, shared[0])
        maps = logits.float().softmax(1).to(features.dtype).detach()
        return FusedScale(self.fusions[str(scale)](features, mask, maps, shared[1]), auxiliary=logits)
