"""Transformer pieces shared by the attention designs: pre-norm layers, a dropout that spares the teacher pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.silence import random_layers_act


def heads_for(width: int, wanted: int = 8) -> int:
    """Return the largest number of heads up to ``wanted`` whose widths are a multiple of 8 channels.

    Narrower heads cost more than they tell, and the fused kernels of GPUs refuse them in half precision. Where there is
    no such number, any that divides the width will do, so every plan's width works.
    """
    dividing = [heads for heads in range(1, wanted + 1) if width % heads == 0]
    return max([heads for heads in dividing if width // heads % 8 == 0] or dividing)


def to_tokens(features: torch.Tensor) -> torch.Tensor:
    """``(B, M, C, *spatial) -> (B, M, V, C)``, voxels in row-major order."""
    return features.flatten(3).transpose(2, 3)


def to_grid(tokens: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """``(B, M, V, C) -> (B, M, C, *size)``, the inverse of `to_tokens`."""
    grid: torch.Tensor = tokens.transpose(2, 3).unflatten(3, tuple(size))
    return grid


class StudentDropout(nn.Module):
    """Dropout in training, off in evaluation, wherever gradients are off, and in the teacher's pass (eq. 9).

    Args:
        rate: chance of an element to be dropped, in [0, 1).

    Raises:
        ValueError: a rate outside [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout is {rate}, allowed is a number in [0, 1). Set it in fusion_options.")
        self.rate = rate

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Args: any tensor; returns the same shape and dtype."""
        return F.dropout(tensor, self.rate, training=random_layers_act(self.training))


class AttentionHeads(nn.Module):
    """What every self-attention is made of: tokens to the heads' query, key and value, and the heads to tokens.

    Args:
        width: token width ``d``.
        heads: a divisor of it.
        bias: one on query, key and value, too; the output always has one.
    """

    def __init__(self, width: int, heads: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def split(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``(B, N, d) -> `` query, key and value, each ``(B, heads, N, d / heads)``."""
        return tuple(
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.query_key_value(tokens).chunk(3, 2)
        )

    def join(self, attended: torch.Tensor) -> torch.Tensor:
        """``(B, heads, N, d / heads) -> (B, N, d)``, output projection included."""
        joined: torch.Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return joined


class SelfAttention(AttentionHeads):
    """Multi-head self-attention with key padding.

    Args:
        width: token width ``d``.
        heads: a divisor of it.
        bias: see `AttentionHeads`.
        dropout: chance of an attention weight to be dropped, where a `StudentDropout` acts.
    """

    def __init__(self, width: int, heads: int, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__(width, heads, bias)
        self.dropout = dropout

    def forward(self, tokens: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Args: tokens ``(B, N, d)``; keep ``(B, N)`` bool, False = nobody attends to this token, None = all kept."""
        query, key, value = self.split(tokens)
        allowed = None if keep is None else keep[:, None, None]
        rate = self.dropout if random_layers_act(self.training) else 0.0
        return self.join(F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=rate))


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer: attention and a GELU MLP, each with LayerNorm before, dropout after and a residual.

    Args:
        width: token width ``d``.
        attention: maps normed tokens (and whatever else `forward` is given) to ``(B, N, d)``.
        mlp_ratio: hidden width of the MLP as a multiple of ``d``.
        dropout: rate of `StudentDropout`.
    """

    def __init__(self, width: int, attention: nn.Module, mlp_ratio: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), StudentDropout(dropout), nn.Linear(mlp_ratio * width, width)
        )
        self.dropout = StudentDropout(dropout)

    def forward(self, tokens: torch.Tensor, *context: Any) -> torch.Tensor:
        """Args: tokens ``(B, N, d)``; context is passed on to the attention."""
        attended: torch.Tensor = tokens + self.dropout(self.attention(self.attention_norm(tokens), *context))
        mapped: torch.Tensor = attended + self.dropout(self.mlp(self.mlp_norm(attended)))
        return mapped


def transformer_layers(width: int, options: dict[str, Any]) -> nn.ModuleList:
    """Build ``options["depth"]`` layers from a design's options ``depth, heads, mlp_ratio, dropout``."""
    heads = heads_for(width, options["heads"])
    return nn.ModuleList(
        TransformerLayer(width, SelfAttention(width, heads), options["mlp_ratio"], options["dropout"])
        for _ in range(options["depth"])
    )
