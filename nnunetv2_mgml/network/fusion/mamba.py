"""Mamba layer (Gu and Dao, 2023) with the parameters and their names of ``mamba_ssm.Mamba``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from nnunetv2_mgml.network.fusion.selective_scan import kernel_scan, mamba_kernel, selective_scan

_EXPAND, _KERNEL = 2, 4
_MIN_STEP, _MAX_STEP = 1e-3, 1e-1


class Mamba(nn.Module):
    """Causal sequence layer ``(B, L, C) -> (B, L, C)``; weights load from and into ``mamba_ssm.Mamba``.

    Args:
        width: token width ``C``.
        d_state: state size ``N`` per inner channel.
    """

    def __init__(self, width: int, d_state: int = 16) -> None:
        super().__init__()
        inner, rank = _EXPAND * width, math.ceil(width / 16)
        self.split_sizes = (rank, d_state, d_state)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, _KERNEL, groups=inner, padding=_KERNEL - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self._use_kernel = mamba_kernel() is not None
        self._start_steps(rank)

    def _start_steps(self, rank: int) -> None:
        """Initialise so that ``softplus(bias)`` is log-uniform between the smallest and the largest step."""
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        low, high = math.log(_MIN_STEP), math.log(_MAX_STEP)
        steps = torch.exp(torch.rand_like(self.dt_proj.bias) * (high - low) + low)
        with torch.no_grad():
            self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Args: tokens ``(B, L, C)`` float32."""
        signal, gate = self.in_proj(tokens).chunk(2, 2)
        signal = self.conv1d(signal.transpose(1, 2))[..., : tokens.shape[1]].transpose(1, 2)
        signal = F.silu(signal)
        rank, b, c = self.x_proj(signal).split(self.split_sizes, 2)
        step = F.softplus(self.dt_proj(rank))
        scan = kernel_scan if self._use_kernel and tokens.is_cuda else selective_scan
        out: torch.Tensor = self.out_proj(scan(signal, step, -self.A_log.exp(), b, c, self.D) * F.silu(gate))
        return out


class MambaBlock(nn.Module):
    """``t + Mamba(LN(t))``, then ``t + Linear(LN(t))``, as in IM-Fuse."""

    def __init__(self, width: int, d_state: int = 16) -> None:
        super().__init__()
        self.mamba_norm = nn.LayerNorm(width)
        self.mamba = Mamba(width, d_state)
        self.linear_norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Args: tokens ``(B, L, C)`` float32."""
        scanned: torch.Tensor = tokens + self.mamba(self.mamba_norm(tokens))
        mapped: torch.Tensor = scanned + self.linear(self.linear_norm(scanned))
        return mapped
