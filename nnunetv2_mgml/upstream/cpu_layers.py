"""Layers by the kernels that are fast on a CPU: the same modules, parameters and sums, added in another order.

PyTorch gives a 3d convolution of a single sample of few channels or voxels to a kernel of its own that is up to twelve
times slower than oneDNN's, forward and backward, and takes a copy of the input per tap: at batch 1, as every prediction
is, all of the small feature maps. And oneDNN needs half the time where every voxel's channels lie side by side: a
prediction goes through the network in that layout, and in training the gradient of the weights is found from copies in
it. PyTorch's instance norm is a batch norm over one sample, which adds number by number; its group norm of one channel
per group is the same and takes half the time or less, forward and backward, but is inexact where channels lie side by
side: there it is a batch norm again, of pieces. A prediction's norm behind a convolution writes over what that made:
fresh memory costs as much as the sums. A prediction in bfloat16 (autocast, on a processor with instructions for it)
goes the same way, with the roundings that PyTorch's layers have. In training in bfloat16 the norms are group norms too,
and the gradients of convolutions to few channels are found from copies with the channels side by side, which takes a
third to two thirds of the time. Elsewhere (other devices and dtypes, other training under autocast, tracing, function
transforms, shapes without data) the layers are PyTorch's, but for bfloat16 convolutions over an axis of one or two
voxels, which are computed in float32: PyTorch's are wrong on some processors (`_is_wrong_in_bfloat16`).

Bends: the class of ``torch.nn.Conv3d``, ``ConvTranspose3d``, ``InstanceNorm2d`` and ``InstanceNorm3d`` modules of our
    networks, and asks PyTorch whether operations are counted or transformed and oneDNN has bfloat16.
Why: see above; a training step on a CPU takes less than three quarters of the time.
Guarded by: tests/upstream/test_cpu_layers.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_SMALL = 20480
"""PyTorch's own limit for one sample, in channels x voxels of the first two axes; larger ones go to oneDNN."""

_NARROW = 8
"""Output channels up to which the gradients of a convolution in bfloat16 are faster from copies."""

_FEW_VOXELS = 1024
"""Feature maps of fewer voxels stay channel by channel after a norm: the next convolution's copy costs little."""

_MANY_VOXELS, _MANY_NUMBERS = 4096, 2**16
"""Feature maps of no more voxels are rather copied for a norm than summed in pieces, unless a sample has as many
numbers and so few channels that the sums stay exact."""

_LANES = 16
"""float32 numbers of a register of 512 bits."""

_COLUMNS, _ROWS = 256, 2048
"""Of a piece, whose sums are in float32 and which stays in the cache meanwhile."""


class Conv3d(nn.Conv3d):
    """``nn.Conv3d``, on a CPU by oneDNN whatever the size."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, z, y, x)`` to ``(B, O, z', y', x')``."""
        return self.with_weight(input, self.weight)

    def with_weight(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Do so with another weight, ``(O, C', *kernel)`` for an input of ``C'`` channels."""
        if _is_wrong_in_bfloat16(self, input):
            with torch.autocast("cpu", enabled=False):
                wide: torch.Tensor = self._conv_forward(input.float(), weight, self.bias)
            return wide.to(torch.bfloat16)
        stride, padding = list(self.stride), list(cast("tuple[int, ...]", self.padding))
        if _learns_narrow_in_bfloat16(self, input, weight):
            small = [None if each is None else each.to(torch.bfloat16) for each in (input, weight, self.bias)]
            narrow: torch.Tensor = _Convolution.apply(*small, stride, padding)
            return narrow
        if not (suits(input) and input.ndim == 5 and weight.dtype == torch.float32 and onednn()):
            stock: torch.Tensor = self._conv_forward(input, weight, self.bias)
            return stock
        if torch.is_grad_enabled():
            learning: torch.Tensor = _Convolution.apply(input.contiguous(), weight, self.bias, stride, padding)
            return learning
        return predicted(input, weight, self.bias, stride, padding)


def _is_wrong_in_bfloat16(conv: nn.Conv3d, x: torch.Tensor) -> bool:
    """Return whether PyTorch may read values, or the gradient of the weights, from memory that nobody has written.

    PyTorch 2.14 (oneDNN 3.12) does so where kernels of more than one tap run over one or two voxels of an axis: for the
    gradient over two slices on processors without matrix instructions (AMX); on those that have them for values over
    one slice, and for both where a stride leaves one voxel of the last axis. Patches that nnU-Net plans have no such
    maps.
    """
    return (
        x.ndim == 5
        and x.device.type == "cpu"
        and any(voxels <= 2 and taps > 1 for voxels, taps in zip(x.shape[2:], conv.kernel_size, strict=True))
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _learns_narrow_in_bfloat16(conv: nn.Conv3d, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a convolution to few channels learns under autocast, and its input with it."""
    return (
        conv.out_channels <= _NARROW
        and weight.shape[1] > 1
        and {*conv.stride} == {1}
        and max(conv.kernel_size) > 1
        and weight.dtype == torch.float32
        and weight.requires_grad
        and x.ndim == 5
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and _ordinary(x)
        and _in_bfloat16(x)
    )


class ConvTranspose3d(nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` whose kernel is its stride: on a CPU a matrix product, unless it learns."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        """Map ``(B, C, z, y, x)`` to ``(B, O, z s, y s, x s)``."""
        if torch.is_grad_enabled() or not (suits(input) and input.ndim == 5) or output_size is not None:
            return super().forward(input, output_size)
        taps = self.weight.permute(2, 3, 4, 1, 0).flatten(0, 3)  # (s s s O, C)
        bias = None if self.bias is None else self.bias.repeat(math.prod(self.stride))
        spread: torch.Tensor = functional.linear(_channels_last(input).permute(0, 2, 3, 4, 1), taps, bias)
        blocks = spread.unflatten(4, (*self.stride, self.out_channels))  # (B, z, y, x, s, s, s, O)
        blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
        own: torch.Tensor = blocks.permute(0, 4, 1, 2, 3)
        return own


class InstanceNorm2d(nn.InstanceNorm2d):
    """``nn.InstanceNorm2d``, on a CPU as a group norm."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, y, x)`` to the same shape."""
        return _grouped(input, self.weight, self.bias, self.eps) if _normalises(self, input) else super().forward(input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """``nn.InstanceNorm3d``, on a CPU as a group norm.

    Attributes:
        overwrites: whether a prediction's input is nobody else's, so that the result may take its place.
    """

    overwrites = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, z, y, x)`` to the same shape."""
        if not _normalises(self, input):
            return super().forward(input)
        return _grouped(input, self.weight, self.bias, self.eps, self.overwrites)


def make_fast(modules: Iterable[nn.Module]) -> None:
    """Turn those modules that can be into the classes above, in place.

    In a prediction on a CPU, what a hook keeps of a convolution is written over by the norm behind it, as it is by
    nnU-Net's activations already.
    """
    modules = list(modules)
    for module in modules:
        if type(module) is nn.Conv3d and is_plain(module):
            module.__class__ = Conv3d
        elif type(module) is nn.ConvTranspose3d and _is_product(module):
            module.__class__ = ConvTranspose3d
        elif type(module) is nn.InstanceNorm2d and not module.track_running_stats:
            module.__class__ = InstanceNorm2d
        elif type(module) is nn.InstanceNorm3d and not module.track_running_stats:
            module.__class__ = InstanceNorm3d
    for layers in modules:
        for before, norm in pairwise(layers) if type(layers) is nn.Sequential else ():
            if isinstance(before, nn.Conv3d) and hasattr(norm, "overwrites"):
                cast(InstanceNorm3d, norm).overwrites = True


def normed(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, overwrites: bool = False
) -> torch.Tensor:
    """Instance norm with a scale and a shift for every sample, on a CPU as a group norm.

    Args:
        x: ``(B, C, *spatial)``.
        scale: ``(B, C)`` float32 or wider, as in PyTorch's norms also where ``x`` is of 16 bit.
        shift: ``(B, C)`` like ``scale``.
        eps: added to the variances.
        overwrites: whether ``x`` is nobody else's, so that a prediction's result may take its place.
    """
    rows = x.reshape(1, -1, *x.shape[2:])
    if _can_be_grouped(rows, scale.dtype):
        result = _grouped(rows, scale.flatten(), shift.flatten(), eps, overwrites)
    else:
        result = functional.instance_norm(rows, weight=scale.flatten(), bias=shift.flatten(), eps=eps)
    return result.reshape(x.shape)


def _grouped(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float, overwrites: bool = False
) -> torch.Tensor:
    # on what does not lie channel by channel PyTorch's sums are inexact, and on few voxels up to 50 times slower
    last = x.ndim == 5 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    voxels = math.prod(x.shape[2:])
    many = voxels > _MANY_VOXELS or (voxels * x.shape[1] >= _MANY_NUMBERS and _side_by_side(x.shape[1]) >= 8)
    if last and many and not torch.is_grad_enabled():
        return _normed_in_pieces(x, scale, shift, eps, x if overwrites else torch.empty_like(x))
    result = functional.group_norm(x.contiguous(), x.shape[1], scale, shift, eps)
    return _channels_last(result) if last and voxels > _FEW_VOXELS else result


def _normed_in_pieces(
    x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None, eps: float, result: torch.Tensor
) -> torch.Tensor:
    """Norm what lies channels last into ``result``, which lies so too and may be ``x``.

    PyTorch's group norm takes mean and variance of this layout from two sums over all voxels, which costs three or four
    digits of them. Its batch norm, for which voxels are samples, first finds the mean and then sums distances from it.
    The pieces are those of the sums, so that a thread writes what it has just read.
    """
    samples = (each.permute(0, 2, 3, 4, 1).flatten(1, 3) for each in (x, result))
    unused = x.new_empty(0, dtype=torch.float32)
    for sample, place in zip(*samples, strict=True):
        mean, variance = _mean_and_variance(sample)
        rows = _ROWS * _side_by_side(x.shape[1])
        for piece, own in zip(sample.split(rows), place.split(rows), strict=True):
            torch.native_batch_norm(
                piece, scale, shift, mean, variance, False, 0.0, eps, out=(own, unused, unused.clone())
            )
    return result


def _side_by_side(channels: int) -> int:
    """Return how many voxels are a row of a piece."""
    return max(1, _COLUMNS // channels)


def _mean_and_variance(voxels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both of every channel of ``(voxels, C)``, float32.

    Summed one by one, the digits would get lost: voxels side by side are columns of their own, and so are pieces of
    a column, all joined in float64.
    """
    channels = voxels.shape[1]
    side_by_side = _side_by_side(channels)
    fitting = len(voxels) - len(voxels) % side_by_side
    pieces = [*voxels[:fitting].view(-1, side_by_side * channels).split(_ROWS)]
    if fitting < len(voxels):
        pieces.append(voxels[fitting:])
    means: list[torch.Tensor] = []
    variances: list[torch.Tensor] = []
    shares: list[float] = []
    for piece in pieces:
        unused = torch.zeros(piece.shape[1])  # running statistics: they say that the result is float32
        found = torch.batch_norm_update_stats(piece, unused, unused, 0.0)
        for parts, values in zip((means, variances), found, strict=True):
            parts.append(values.view(-1, channels))
        shares += [len(piece) / len(voxels)] * len(means[-1])
    each, spread = (torch.cat(parts).double() for parts in (means, variances))
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    mean = (share * each).sum(0)
    variance = (share * (spread + (each - mean).square())).sum(0)
    return mean.float(), variance.float()


def _normalises(norm: nn.InstanceNorm2d | nn.InstanceNorm3d, x: torch.Tensor) -> bool:
    """Return whether a norm's channels may be groups; a wrong number of them PyTorch shall refuse."""
    return (
        x.ndim == (5 if isinstance(norm, nn.InstanceNorm3d) else 4)
        and x.shape[1] == norm.num_features
        and _can_be_grouped(x, torch.float32 if norm.weight is None else norm.weight.dtype)
    )


def _can_be_grouped(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether channels may be groups; one voxel PyTorch shall refuse."""
    autocast = torch.is_autocast_enabled("cpu")  # in which both learn as well, rounded alike
    known = _ordinary(x) and _in_bfloat16(x) if autocast else suits(x)
    return known and math.prod(x.shape[2:]) > 1 and dtype == torch.float32


def is_plain(conv: nn.Conv2d | nn.Conv3d) -> bool:
    """Return whether a convolution has neither groups nor dilation nor a padding other than zeros of a given number."""
    return conv.groups == 1 and {*conv.dilation} == {1} and conv.padding_mode == "zeros" and conv.padding not in _NAMES


_NAMES = ("same", "valid")


def _is_product(conv: nn.ConvTranspose3d) -> bool:
    """Return whether the blocks that the voxels become do not overlap."""
    return (
        conv.kernel_size == conv.stride
        and conv.groups == 1
        and {*conv.dilation} == {1}
        and not any((*cast("tuple[int, ...]", conv.padding), *conv.output_padding))
    )


def suits(x: torch.Tensor) -> bool:
    """Return whether a tensor is one that these layers have kernels of their own for."""
    if torch.is_autocast_enabled("cpu"):
        return _ordinary(x) and not torch.is_grad_enabled() and _in_bfloat16(x)
    return _ordinary(x) and x.dtype == torch.float32


def _ordinary(x: torch.Tensor) -> bool:
    """Return whether a tensor has numbers on a CPU, and operations on it are only computed."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # PyTorch does not export its type
    if tracing or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return (
        type(x) is torch.Tensor  # no shape without data
        and x.device.type == "cpu"
        and x.numel() > 0
        and not is_in_torch_dispatch_mode()  # counters of operations know PyTorch's own alone
    )


def _in_bfloat16(x: torch.Tensor) -> bool:
    """Return whether autocast brings a tensor to bfloat16, and the processor has instructions for it."""
    return (
        torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
        and onednn()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def onednn() -> bool:
    """Return whether oneDNN is there and not switched off."""
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _convolved(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int]
) -> torch.Tensor:
    if x.shape[1] == 1 and (x.shape[4] + 2 * padding[2] - weight.shape[4]) // stride[2] == 0:
        x = x.flatten().view(x.shape)  # where a row becomes one voxel oneDNN misreads the strides of one channel last
    result: torch.Tensor = torch.mkldnn_convolution(x, weight, bias, padding, stride, [1, 1, 1], 1)
    return result


def predicted(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int]
) -> torch.Tensor:
    """Convolve what `suits` without gradients, channels last and in autocast's type where it is on."""
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype
    bias, weight = None if bias is None else bias.to(dtype), weight.to(dtype)
    convolve = _two_at_once if _leaves_lanes_empty(x, weight, stride, padding) else _convolved
    return convolve(_channels_last(x.to(dtype)), weight, bias, stride, padding)


def _leaves_lanes_empty(x: torch.Tensor, weight: torch.Tensor, stride: list[int], padding: list[int]) -> bool:
    """Return whether a voxel's results are half of a register of 512 bits, and neighbours in pairs."""
    return (
        len(weight) == _LANES // 2
        and (weight.shape[4], stride[2], padding[2]) == (3, 1, 1)
        and x.shape[4] % 2 == 0
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


def _two_at_once(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: list[int], padding: list[int]
) -> torch.Tensor:
    """Convolve so that two neighbours are one voxel of twice the channels, which in this layout is the same memory.

    Three taps of the one and three of the other are four, some of them zeros; the sums are the same.
    """
    pair = torch.stack([functional.pad(weight, side) for side in ((0, 1), (1, 0))]).flatten(0, 1)
    both = None if bias is None else bias.repeat(2)
    found = _convolved(x, pair, both, [*stride[:2], 2], padding).permute(0, 2, 3, 4, 1)
    samples, z, y, pairs, channels = found.shape
    return found.reshape(samples, z, y, 2 * pairs, channels // 2).permute(0, 4, 1, 2, 3)


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
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # gradients that are to have gradients are PyTorch's
            with_graph = torch.ops.aten.convolution_backward(
                gradient, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1, 1], False, [0, 0, 0], 1,
                (of_input, of_weight, of_bias),
            )  # fmt: skip
            return *with_graph, None, None
        gradient = gradient.contiguous()

        def gradients(gradient: torch.Tensor, x: torch.Tensor, *wanted: bool) -> list[Any]:
            found = torch.ops.aten.convolution_backward(
                gradient, x, weight, [len(weight)], ctx.stride, ctx.padding, [1, 1, 1], False, [0, 0, 0], 1, wanted
            )
            return [each.to_dense() if each is not None and each.is_mkldnn else each for each in found]

        if x.dtype == torch.bfloat16:
            found = gradients(_channels_last(gradient), _channels_last(x), of_input, of_weight, False)
            own, weights, _ = (None if each is None else each.contiguous() for each in found)
        elif x[0, :, :, :, 0].numel() <= _SMALL:
            own, weights, _ = gradients(gradient.to_mkldnn(), x.to_mkldnn(), of_input, of_weight, False)
        elif {*ctx.stride} != {1} or not of_weight:  # where the copies cost what they bring
            own, weights, _ = gradients(gradient, x, of_input, of_weight, False)
        else:
            own = gradients(gradient, x, True, False, False)[0] if of_input else None
            weights = torch.zeros_like(weight)
            for one, sample in zip(gradient.split(1), x.split(1), strict=True):  # the copies of one sample at a time
                weights += gradients(_channels_last(one), _channels_last(sample), False, True, False)[1]
        return own, weights, gradient.sum((0, 2, 3, 4)) if of_bias else None, None, None


def pointwise_product(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor | None:
    """Return a 1x1 convolution's ``(B, O, z, y, x)`` of what lies channels last, or None where that is not faster.

    With fewer outputs than a register holds it is not.
    """
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    if torch.is_grad_enabled() or not last or conv.out_channels % 8 or not (suits(x) and onednn()):
        return None
    return predicted(x, conv.weight, conv.bias, [1, 1, 1], [0, 0, 0])


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    samples, channels, z, y, x_axis = x.shape
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if samples == 1 or channels == 1:  # oneDNN goes by the strides, also by those of an axis of length 1
        return x.as_strided(x.shape, (channels * z * y * x_axis, 1, channels * y * x_axis, channels * x_axis, channels))
    return x
