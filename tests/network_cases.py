"""Designs, layouts and inputs of the tests of the network."""

from __future__ import annotations

import torch
from builders import options_with

from nnunetv2_mgml.objective import Options

DESIGNS = ("mean", "concat", "region_aware")
LAYOUTS = {
    "3d": dict(patch=(16, 16, 16)),
    "residual": dict(patch=(16, 16, 16), residual=True),
    "2d": dict(patch=(32, 24)),
    "anisotropic": dict(
        patch=(6, 16, 16), strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]], kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    ),
}


def config(fusion: str, **changes: object) -> Options:
    return options_with(fusion=fusion, width_factor=1.0, **changes)


def batch(patch: tuple[int, ...], modalities: int = 4, size: int = 2, extra: int = 0) -> torch.Tensor:
    return torch.randn(size, modalities + extra, *patch, generator=torch.Generator().manual_seed(1))
