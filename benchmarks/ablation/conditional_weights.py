"""A trial: convolutions whose weights are linear in the mask, as the conditional norms' scale and shift are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mgml.network.conditioned_unet import ConditionedUNet

MOST_WEIGHTS = 60_000
"""Convolutions of more weights stay as they are: an optimiser's step costs as much per weight as it does per norm."""


class _ConditionalConv3d(nn.Conv3d):
    of_modalities: nn.Parameter
    told: Any

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        signs = self.told.visible.to(self.weight.dtype) - 0.5
        weights = self.weight + torch.einsum("bm,mo...->bo...", signs, self.of_modalities)
        samples = (
            functional.conv3d(x[None], w, self.bias, self.stride, self.padding)
            for x, w in zip(input, weights, strict=True)
        )
        return torch.cat(list(samples))


def condition_weights(network: ConditionedUNet) -> ConditionedUNet:
    """Turn the convolutions of few weights into conditional ones, in place."""
    convolutions = {id(m): m for m in network.modules() if isinstance(m, nn.Conv3d)}
    for module in convolutions.values():
        if module.weight.numel() <= MOST_WEIGHTS and module.kernel_size != (1, 1, 1):
            module.__class__ = _ConditionalConv3d
            conditional = cast(_ConditionalConv3d, module)
            conditional.of_modalities = nn.Parameter(torch.zeros(network.num_modalities, *module.weight.shape))
            conditional.told = network._told
    return network
