"""Learned positions that follow the feature grid, so any patch size, spacing and dimension works."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resize_linear(tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Linearly resize ``(B, C, *spatial)`` to ``(B, C, *size)``; returned as it is where the size already fits."""
    if tuple(tensor.shape[2:]) == tuple(size):
        return tensor
    return F.interpolate(tensor, size=tuple(size), mode=_LINEAR[len(size)], align_corners=False)


class PositionCode(nn.Module):
    """Sum of one learned vector per axis and index; starts at zero, interpolated where the grid differs.

    Args:
        size: the plan's grid at this scale, in voxels of the scale.
        width: length of a code.
    """

    def __init__(self, size: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.axes = nn.ParameterList(torch.zeros(1, width, n) for n in size)

    def forward(self, size: tuple[int, ...]) -> torch.Tensor:
        """Return ``(V, width)`` float32 for a grid of ``size`` voxels, row-major."""
        size = tuple(size)
        tables = [resize_linear(table, (n,))[0] for table, n in zip(self.axes, size, strict=True)]
        shaped = [
            table.reshape(-1, *(n if i == axis else 1 for i, n in enumerate(size))) for axis, table in enumerate(tables)
        ]
        return sum(shaped[1:], shaped[0]).flatten(1).transpose(0, 1)


class TokenTable(nn.Module):
    """One learned token per voxel of the plan's grid, drawn from N(0, 1), interpolated where the grid differs.

    Args:
        size: the plan's grid at this scale, in voxels of the scale.
        width: length of a token.
    """

    def __init__(self, size: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, width, *size))

    def forward(self, size: tuple[int, ...]) -> torch.Tensor:
        """Return ``(V, width)`` float32 for a grid of ``size`` voxels, row-major."""
        return resize_linear(self.table, size)[0].flatten(1).transpose(0, 1)
