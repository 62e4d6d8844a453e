"""Image decoders: each modality's image from the fused features (reconstruction term of U-HVED)."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import FusionSpec, conv_block
from nnunetv2_mgml.network.fusion.positions import resize_linear


class ImageDecoder(nn.Module):
    """Fused features of all scales ``-> (B, 1, *spatial)``: per scale resize, concatenate, one convolution to C/2.

    Without norms, which would remove the mean intensity of the patch.
    """

    def __init__(self, spec: FusionSpec) -> None:
        super().__init__()
        spec = dataclasses.replace(spec, norm_op=None)
        widths = [max(1, width // 2) for width in spec.channels]
        below = [*widths[1:], 0]
        self.scales = nn.ModuleList(
            conv_block(spec, width + below[s], widths[s], spec.kernel_sizes[s]) for s, width in enumerate(spec.channels)
        )
        self.head = spec.conv_op(widths[0], 1, 1)

    def forward(self, fused: list[torch.Tensor]) -> torch.Tensor:
        """Args: fused ``(B, C_s, *spatial_s)`` per scale, full resolution first."""
        feature = self.scales[-1](fused[-1])
        for convolution, skip in zip(reversed(self.scales[:-1]), reversed(fused[:-1]), strict=True):
            feature = convolution(torch.cat((resize_linear(feature, tuple(skip.shape[2:])), skip), 1))
        image: torch.Tensor = self.head(feature)
        return image


def reconstruction_error(predicted: torch.Tensor, images: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
    """Mean squared error over voxels, over the modalities each sample has, then over the batch; scalar float32.

    Args:
        predicted: ``(B, M, *spatial)``.
        images: ``(B, M, *spatial)`` normalised intensities.
        available: ``(B, M)`` bool, at least one True per row.
    """
    with torch.autocast(images.device.type, enabled=False):
        error = (predicted.float() - images.float()).square().flatten(2).mean(2)
        return (torch.where(available, error, 0).sum(1) / available.sum(1)).mean()
