"""1x1 convolutions as matrix products: the same modules and parameters, on a CPU several times faster.

PyTorch's CPU convolutions reorder their input and output, which for one multiplication per number costs more than the
multiplications.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class _Pointwise:
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, *spatial)`` to ``(B, O, *spatial)``."""
        weight = self.weight.flatten(1).expand(len(x), -1, -1)
        flat = x.flatten(2)
        mixed = torch.bmm(weight, flat) if self.bias is None else torch.baddbmm(self.bias[:, None], weight, flat)
        result: torch.Tensor = mixed.unflatten(2, x.shape[2:])
        return result


class PointwiseConv2d(_Pointwise, nn.Conv2d):
    """``nn.Conv2d`` of kernel size and stride 1, as a matrix product."""


class PointwiseConv3d(_Pointwise, nn.Conv3d):
    """``nn.Conv3d`` of kernel size and stride 1, as a matrix product."""


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: PointwiseConv2d, nn.Conv3d: PointwiseConv3d}


def pointwise(conv_op: type[nn.Module]) -> type[nn.Module]:
    """Return the class to use for ``nn.Conv2d`` or ``nn.Conv3d`` where kernel size and stride are 1."""
    return _CLASSES[conv_op]


def make_pointwise(conv: nn.Module) -> None:
    """Turn an ``nn.Conv2d`` or ``nn.Conv3d`` of kernel size and stride 1 into a matrix product, in place.

    Raises:
        ValueError: it is another convolution.
    """
    if not isinstance(conv, (nn.Conv2d, nn.Conv3d)) or not _is_pointwise(conv):
        raise ValueError(f"Not a 1x1 convolution: {conv}.")
    kind: Any = pointwise(type(conv))  # mypy does not know that a module may change its class
    conv.__class__ = kind


def _is_pointwise(conv: nn.Conv2d | nn.Conv3d) -> bool:
    return {*conv.kernel_size, *conv.stride} == {1} and conv.groups == 1 and not any(conv.padding)
