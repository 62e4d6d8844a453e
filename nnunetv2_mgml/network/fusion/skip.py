"""The "skip fusion" of mmFormer (Zhang et al., MICCAI 2022): 1x1, 3x3 and 1x1 convolutions over stacked modalities.

The first convolution is linear in each modality, and a mask only leaves modalities out. So the features are neither
zeroed nor copied into a stack: the mask goes into the weights, one set per sample (`SkipFusion.fuse`), or, for many
masks of the same features, every modality's share of the sum is computed once (`SkipFusion.share`). The result is that
of the convolution over zeroed features, up to rounding.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusionSpec, conv_block, span, sum_present
from nnunetv2_mgml.network.pointwise import products


class SkipFusion(nn.Sequential):
    """Three `conv_block`; called as a module, it takes what is stacked already, ``(B, inputs*C, *spatial)``."""

    def _first(self) -> tuple[torch.Tensor, torch.Tensor | None, list[nn.Module]]:
        """Return the first convolution's weight and bias, and the layers after it in its block."""
        convolution, *rest = cast(nn.Sequential, self[0])
        return cast(torch.Tensor, convolution.weight), cast("torch.Tensor | None", convolution.bias), rest

    def share(self, features: torch.Tensor) -> torch.Tensor:
        """Return what each modality adds to the first convolution, ``(B, M, O, *spatial)`` without the bias.

        Args:
            features: ``(B, M, C, *spatial)``; what is absent in every mask to come may hold anything finite.
        """
        modalities = features.shape[1]
        weight, _, _ = self._first()
        weight = weight.flatten(1).unflatten(1, (modalities, -1)).transpose(0, 1)  # (M, O, C)
        added = products(weight.repeat(len(features), 1, 1), features.flatten(3).flatten(0, 1))
        shares: torch.Tensor = added.unflatten(0, features.shape[:2]).unflatten(3, features.shape[3:])
        return shares

    def fuse(
        self,
        features: torch.Tensor,
        mask: torch.Tensor,
        shared: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map features to ``(B, O', *spatial)``, modalities where the mask is False left out.

        Args:
            features: ``(B, M, C, *spatial)``; absent ones may hold anything finite.
            mask: ``(B, M)`` bool, True = visible.
            shared: what `share` returned for these features, of the same batch or of one sample for all masks.
            weights: ``(B, M, *spatial)``, 0 where the mask is False: by what each voxel of a modality is multiplied
                first; with ``shared`` that is done after the first convolution, where it is the same.
        """
        weight, bias, rest = self._first()
        seen = span(mask)
        if weights is not None:
            weights = weights[:, seen]
        if weights is not None and shared is not None:
            factors = weights[:, :, None].to(shared.dtype).unbind(1)
            terms = iter(zip(shared[:, seen].unbind(1), factors, strict=True))
            part, factor = next(terms)
            mixed = part * factor
            for part, factor in terms:
                mixed = torch.addcmul(mixed, part, factor)
            mixed = mixed.flatten(2)
        elif shared is None:
            features = features[:, seen]
            if weights is not None:
                features = features * weights[:, :, None].to(features.dtype)
            weight = weight.flatten(1).unflatten(1, (mask.shape[1], -1))  # (O, M, C)
            weight = (weight * mask[:, None, :, None].to(weight.dtype))[:, :, seen].flatten(2)  # (B, O, M*C)
            mixed = products(weight, features.flatten(3).flatten(1, 2), bias)
            bias = None
        else:
            mixed = sum_present(shared, mask).flatten(2)
        if bias is not None:
            mixed += bias[:, None].to(mixed.dtype)
        mixed = mixed.unflatten(2, features.shape[3:])
        for layer in (*rest, *self[1:]):
            mixed = layer(mixed)
        result: torch.Tensor = mixed
        return result


def skip_fusion(
    spec: FusionSpec, scale: int, out_channels: int | None = None, inputs: int | None = None, inner: int | None = None
) -> SkipFusion:
    """Build one scale.

    Args:
        spec: of the design.
        scale: whose width ``C`` and kernel count.
        out_channels: ``C`` if None.
        inputs: stacked feature maps, ``M`` if None.
        inner: channels between the convolutions, ``C`` if None.
    """
    width = spec.channels[scale]
    inner = inner or width
    return SkipFusion(
        conv_block(spec, (inputs or spec.num_modalities) * width, inner),
        conv_block(spec, inner, inner, spec.kernel_sizes[scale]),
        conv_block(spec, inner, out_channels or width),
    )
