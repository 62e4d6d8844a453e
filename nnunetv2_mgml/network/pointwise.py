"""1x1 convolutions as matrix products: the same modules and parameters, on a CPU several times faster.

PyTorch's CPU convolutions reorder their input and output, which for one multiplication per number costs more than the
multiplications. Elsewhere they stay convolutions: the gradient of the weight is a product of few numbers by few, summed
over all voxels, and the matrix library of a GPU gives that to a few of its processors only (5 ms each at 128^3 on an
H200, a sixth of the step; docs/gpu.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mgml.upstream.cpu_layers import pointwise_product


def _product(conv: nn.Conv2d | nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    """Map ``(B, C, *spatial)`` to ``(B, O, *spatial)``."""
    weight = conv.weight.flatten(1).expand(len(x), -1, -1)
    flat = x.flatten(2)
    mixed = torch.bmm(weight, flat) if conv.bias is None else torch.baddbmm(conv.bias[:, None], weight, flat)
    result: torch.Tensor = mixed.unflatten(2, x.shape[2:])
    return result


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` of kernel size and stride 1, on a CPU as a matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, y, x)`` to ``(B, O, y, x)``."""
        return _product(self, input) if input.device.type == "cpu" else super().forward(input)


class PointwiseConv3d(nn.Conv3d):
    """``nn.Conv3d`` of kernel size and stride 1, on a CPU as a matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, z, y, x)`` to ``(B, O, z, y, x)``."""
        if input.device.type != "cpu":
            return super().forward(input)
        product = pointwise_product(self, input)
        return _product(self, input) if product is None else product


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


def products(matrices: torch.Tensor, features: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return ``matrices @ features + bias`` per sample, ``(B, O, V)``; in a prediction channels last stay so.

    PyTorch's own batched product makes a copy of such features in bfloat16.

    Args:
        matrices: ``(B, O, I)``.
        features: ``(B, I, V)``.
        bias: ``(O,)``.
    """
    if not one_by_one(features):
        product = torch.bmm(matrices, features)
        return product if bias is None else product + bias[:, None].to(product.dtype)
    rows = [functional.linear(sample.T, own, bias) for sample, own in zip(features, matrices, strict=True)]
    stacked = rows[0][None] if len(rows) == 1 else torch.stack(rows)
    return stacked.transpose(1, 2)


def one_by_one(features: torch.Tensor) -> bool:
    """Return whether `products` multiplies sample by sample: where features ``(B, I, V)`` lie channels last."""
    return not torch.is_grad_enabled() and features.stride(1) == 1 and not torch.compiler.is_compiling()
