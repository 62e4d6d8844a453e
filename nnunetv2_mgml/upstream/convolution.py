"""3d convolutions by the kernels that are fast on a CPU: the same modules, parameters and sums, added in another order.

PyTorch gives a single sample of few channels or voxels to a kernel of its own that is up to twelve times slower than
oneDNN's, forward and backward, and takes a copy of the input per tap: at batch 1, as every prediction is, all of the
small feature maps. And oneDNN finds the gradient of the weights in half the time when every voxel's channels lie side
by side. Elsewhere (other devices, dtypes and layouts, autocast, tracing, shapes without data) they are PyTorch's.

Bends: the class of ``torch.nn.Conv3d`` modules of our networks, and asks PyTorch whether operations are being counted.
Why: see above; a training step on a CPU takes three quarters of the time.
Guarded by: tests/upstream/test_convolution.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_SMALL = 20480
"""PyTorch's own limit for one sample, in channels x voxels of the first two axes; larger ones go to oneDNN."""


class Conv3d(nn.Conv3d):
    """``nn.Conv3d``, on a CPU in float32 by oneDNN whatever the size."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, z, y, x)`` to ``(B, O, z', y', x')``."""
        if not _suits(input, self.weight):
            return super().forward(input)
        x, stride, padding = input.contiguous(), list(self.stride), list(cast("tuple[int, ...]", self.padding))
        if torch.is_grad_enabled():
            learning: torch.Tensor = _Convolution.apply(x, self.weight, self.bias, stride, padding)
            return learning
        return _convolved(x, self.weight, self.bias, stride, padding)


def make_fast(modules: Iterable[nn.Module]) -> None:
    """Turn those ``nn.Conv3d`` among modules that can be into `Conv3d`, in place."""
    for module in modules:
        if type(module) is nn.Conv3d and _plain(module):
            module.__class__ = Conv3d


def _plain(conv: nn.Conv3d) -> bool:
    """Return whether a convolution has neither groups nor dilation nor a padding other than zeros of a given number."""
    return conv.groups == 1 and {*conv.dilation} == {1} and conv.padding_mode == "zeros" and conv.padding not in _NAMES


_NAMES = ("same", "valid")


def _suits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # PyTorch does not export its type
    if tracing or torch.compiler.is_compiling():
        return False
    return (
        type(x) is torch.Tensor  # neither a shape without data nor one of a function transform
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.ndim == 5
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not is_in_torch_dispatch_mode()  # counters of operations know PyTorch's convolution alone
    )


def _convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int]
) -> torch.Tensor:
    result: torch.Tensor = torch.mkldnn_convolution(x, weight, bias, padding, stride, [1, 1, 1], 1)
    return result


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: list[int],
        padding: list[int],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return _convolved(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        gradient = gradient.contiguous()

        def gradients(gradient: torch.Tensor, x: torch.Tensor, *wanted: bool) -> list[Any]:
            found = torch.ops.aten.convolution_backward(
                gradient, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1, 1], False, [0, 0, 0], 1, wanted
            )
            return [each.to_dense() if each is not None and each.is_mkldnn else each for each in found]

        if x[0, :, :, :, 0].numel() <= _SMALL:
            own, weights, _ = gradients(gradient.to_mkldnn(), x.to_mkldnn(), of_input, of_weight, False)
        elif {*ctx.stride} != {1} or not of_weight:  # where the copies cost what they bring
            own, weights, _ = gradients(gradient, x, of_input, of_weight, False)
        else:
            own = gradients(gradient, x, True, False, False)[0] if of_input else None
            weights = torch.zeros_like(weight)
            for one, sample in zip(gradient.split(1), x.split(1), strict=True):  # the copies of one sample at a time
                weights += gradients(_channels_last(one), _channels_last(sample), False, True, False)[1]
        return own, weights, gradient.sum((0, 2, 3, 4)) if of_bias else None, None, None


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
