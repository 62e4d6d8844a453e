"""The published block of SFusion (Liu et al., MICCAI 2023): tokens of the visible modalities become scores per voxel.

Tokens are means over cells of ``s`` voxels per axis. A sinusoidal code runs on over the tokens of one visible modality
after the other, so a modality's code depends on its place among those present. Post-norm layers with ReLU follow, and
a 1x1 convolution to ``C s^3`` channels (no bias) whose channels are moved into the cell's voxels. Left out: the bias of
the last norm, which is added to every modality's scores alike and cancels in the softmax over them, and dropout on the
attention's weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.fusion.attention import SelfAttention, StudentDropout, heads_for, to_tokens
from nnunetv2_mgml.network.fusion.base import FusionSpec

_POOL = {2: F.avg_pool2d, 3: F.avg_pool3d}


def running_code(count: int, width: int, device: torch.device | None = None) -> torch.Tensor:
    """Return sinusoidal codes ``(count, width)`` float32: sine in even and cosine in odd columns.

    Position ``p`` has the angle ``p / 10000^(2k / width)`` in columns ``2k`` and ``2k + 1``.
    """
    wide = torch.float32 if device is not None and device.type == "mps" else torch.float64  # Apple's GPUs have no other
    positions = torch.arange(count, dtype=wide, device=device)[:, None]
    rates = 10000.0 ** (torch.arange(0, width, 2, dtype=wide, device=device) / width)
    angles = positions / rates
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)[:, :width].float()


def depth_to_space(tokens: torch.Tensor, grid: tuple[int, ...], cell: tuple[int, ...]) -> torch.Tensor:
    """Spread every token over the voxels of its cell.

    Args:
        tokens: ``(N, V, prod(cell) * C)``, voxels and sub-voxels in row-major order, channels fastest.
        grid: token grid of ``V`` cells.
        cell: voxels per cell and axis.

    Returns:
        ``(N, C, *(grid * cell))``.
    """
    axes = len(grid)
    split = tokens.reshape(len(tokens), *grid, *cell, -1)
    order = [0, split.ndim - 1]
    for axis in range(axes):
        order += [1 + axis, 1 + axes + axis]
    size = tuple(n * s for n, s in zip(grid, cell, strict=True))
    return split.permute(order).reshape(len(tokens), split.shape[-1], *size)


class PostNormLayer(nn.Module):
    """Attention and a ReLU MLP, each with dropout, a residual and LayerNorm after.

    Args:
        width: token width ``d``.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP as a multiple of ``d``.
        dropout: rate of `StudentDropout`.
        last: leave out the bias of the last norm.
        attention_dropout: of `SelfAttention`.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: int, dropout: float, last: bool, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads, bias=True, dropout=attention_dropout)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.ReLU(), StudentDropout(dropout), nn.Linear(mlp_ratio * width, width)
        )
        self.mlp_norm = nn.LayerNorm(width, bias=not last)
        self.dropout = StudentDropout(dropout)

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Args: tokens ``(B, N, d)``; keep as for `SelfAttention`."""
        attended: torch.Tensor = self.attention_norm(tokens + self.dropout(self.attention(tokens, keep)))
        mapped: torch.Tensor = self.mlp_norm(attended + self.dropout(self.mlp(attended)))
        return mapped


class CellScores(nn.Module):
    """Pooled tokens of the visible modalities ``-> `` scores per voxel and channel."""

    def __init__(self, spec: FusionSpec, scale: int, options: dict[str, Any]) -> None:
        super().__init__()
        width, depth = spec.channels[scale], options["depth"]
        self.cell = tuple(-(-n // options["grid"]) for n in spec.feature_size(scale))
        self.dropout = StudentDropout(options["dropout"])
        wanted = options["heads"]
        heads = wanted if options["narrow_heads"] and width % wanted == 0 else heads_for(width, wanted)
        rates = options["dropout"], options["attention_dropout"]
        self.layers = nn.ModuleList(
            PostNormLayer(width, heads, options["mlp_ratio"], rates[0], i == depth - 1, rates[1]) for i in range(depth)
        )
        self.spread = nn.Linear(width, math.prod(self.cell) * width, bias=False)

    def grid(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Return the token grid of features of ``size`` voxels; the last cell of an axis may be cut off."""
        return tuple(-(-n // s) for n, s in zip(size, self.cell, strict=True))

    def pool(self, features: torch.Tensor) -> torch.Tensor:
        """Return tokens ``(B, M, V, C)``, the means over the cells of features ``(B, M, C, *spatial)``."""
        pooled = _POOL[len(self.cell)](
            features.flatten(0, 1), self.cell, self.cell, ceil_mode=True, count_include_pad=False
        )
        return to_tokens(pooled.unflatten(0, features.shape[:2]))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor | None, size: tuple[int, ...]) -> torch.Tensor:
        """Score every voxel.

        Args:
            tokens: ``(B, M, V, C)`` from `pool`.
            mask: ``(B, M)`` bool, True = visible; None: all are.
            size: voxels of the features.

        Returns:
            ``(B, M, C, *size)``; those of absent modalities mean nothing.
        """
        batch, modalities, voxels, width = tokens.shape
        code = running_code(modalities * voxels, width, tokens.device).to(tokens.dtype).unflatten(0, (modalities, -1))
        keep = None
        if mask is None:
            tokens = tokens + code
        else:
            place = (mask.cumsum(1) - 1).clamp(min=0)
            tokens = tokens + code[place]
            keep = mask[:, :, None].expand(batch, modalities, voxels).flatten(1)
        tokens = self.dropout(tokens.flatten(1, 2))
        for layer in self.layers:
            tokens = layer(tokens, keep)
        spread = self.spread(tokens).unflatten(1, (modalities, voxels)).flatten(0, 1)
        scores = depth_to_space(spread, self.grid(size), self.cell)
        inside: tuple[Any, ...] = (..., *(slice(n) for n in size))
        cut: torch.Tensor = scores[inside].unflatten(0, (batch, modalities))
        return cut
