"""A decoder's first convolution at a scale, from the coarser scale's features instead of from raised ones.

A transposed convolution whose kernel is its stride and a convolution behind it are one linear map. Where both double
the resolution, a voxel of the result depends on 2^3 voxels of the coarser scale, not on 3^3 of its own: with half of
their channels, as in nnU-Net, the two layers take a quarter fewer multiplications, those of the skip included, in
kernels wide enough for a CPU's registers, and neither the raised features nor their stack with the skip are written.
Predictions on a CPU in float32 alone; the sums are those of the layers, added in another order. In bfloat16 two rounded
parts would be added, which is less exact.

Bends: the layers that a `UNetDecoder` goes through at a scale; where any of them has a hook, they run themselves.
Why: at full resolution the convolution is the decoder's costliest layer (docs/speed.md).
Guarded by: tests/upstream/test_raised_convolution.py
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from nnunetv2_mgml.upstream import cpu_layers
from nnunetv2_mgml.upstream.cpu_layers import Conv3d, ConvTranspose3d, predicted

_VOXELS = 40000
"""Of the result, samples together; with fewer, putting the weights together takes longer than what is spared."""


def raised_convolution(
    raise_: nn.Module, convolution: nn.Module, coarse: torch.Tensor, skip: torch.Tensor
) -> torch.Tensor | None:
    """Return ``convolution(cat((raise_(coarse), skip), 1))``, or None where that is to be computed so.

    Args:
        raise_: a transposed convolution from ``I`` to ``M`` channels.
        convolution: from ``M + S`` channels to ``O``.
        coarse: ``(B, I, z, y, x)``.
        skip: ``(B, S, z s, y s, x s)``.

    Returns:
        ``(B, O, z s, y s, x s)`` float32.
    """
    if not (isinstance(raise_, ConvTranspose3d) and isinstance(convolution, Conv3d)):
        return None
    stride, size = raise_.stride, skip.shape[2:]
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    if not (cpu_layers.suits(coarse) and cpu_layers.suits(skip)):
        return None
    if not cpu_layers.onednn():  # asked last: where a network is compiled nothing suits, and this cannot be compiled
        return None
    if len(skip) * math.prod(size) < _VOXELS or min(size) < 2:
        return None
    fitting = [n * step for n, step in zip(coarse.shape[2:], stride, strict=True)]
    if len(coarse) != len(skip) or fitting != [*size]:  # for the layers to refuse
        return None
    if 2 not in stride or not _can_be_joined(stride, convolution):
        return None
    kernel, own_kernel = convolution.weight.split([raise_.out_channels, skip.shape[1]], 1)
    padding = list(cast("tuple[int, ...]", convolution.padding))
    bias = convolution.bias
    if raise_.bias is not None:
        raised_bias = raise_.bias[None, :, None, None, None].expand(-1, -1, *convolution.kernel_size)
        shares = functional.conv3d(raised_bias, kernel, padding=padding)[0]
        z, y, x = (taps // 2 for taps in shares.shape[1:])
        inside = shares[:, z, y, x]
        bias = inside if bias is None else bias + inside
    result = predicted(skip, own_kernel, bias, [1, 1, 1], padding)
    if raise_.bias is not None:
        _correct_borders(result, shares)
    response = functional.conv3d(raise_.weight, kernel, padding=[2 * each for each in padding])
    _add_raised(result, coarse, response, stride)
    return result


def _can_be_joined(stride: tuple[int, ...], convolution: nn.Conv3d) -> bool:
    """Return whether every axis is doubled under a kernel of 3, or kept, and keeps its size in the convolution."""
    kernel, padding = (cast("tuple[int, ...]", each) for each in (convolution.kernel_size, convolution.padding))
    axes = zip(stride, kernel, padding, strict=True)
    return {*convolution.stride} == {1} and all(
        pad == taps // 2 and (step, taps) in ((2, 3), (1, 3), (1, 1)) for step, taps, pad in axes
    )


def _correct_borders(result: torch.Tensor, shares: torch.Tensor) -> None:
    """Take off what the bias of raised features would add from beyond the border, where there are none.

    Args:
        result: ``(B, O, Z, Y, X)``, which has the bias's share of the inside everywhere.
        shares: ``(O, z, y, x)``: the bias's share at the first voxel, inside and at the last voxel of every axis along
            which the kernel has three taps; the same everywhere along the others.
    """
    for axis in (2, 3, 4):
        taps = shares.shape[axis - 1]
        inside = shares.narrow(axis - 1, taps // 2, 1)
        for end, kind in ((0, 0), (result.shape[axis] - 1, 2)) if taps > 1 else ():
            missing = shares.narrow(axis - 1, kind, 1) - inside
            for later in range(axis + 1, 5):
                if missing.shape[later - 1] > 1:
                    kinds = torch.ones(result.shape[later], dtype=torch.long)
                    kinds[0], kinds[-1] = 0, 2
                    missing = missing.index_select(later - 1, kinds)
            face = result.narrow(axis, end, 1)
            face += missing
        shares = inside


def _add_raised(result: torch.Tensor, coarse: torch.Tensor, response: torch.Tensor, stride: tuple[int, ...]) -> None:
    """Add what the coarser scale contributes, but for biases.

    Args:
        result: ``(B, O, Z, Y, X)``.
        coarse: ``(B, I, z, y, x)``.
        response: ``(I, O, ...)``: what one coarse voxel adds to those of the result around it, along a doubled axis
            four of them, along the others as many as the kernel has taps.
        stride: 1 or 2 per axis.
    """
    reach = [size // step for size, step in zip(response.shape[2:], stride, strict=True)]  # coarse voxels, per axis
    parts = response  # (I, O, z s, y s, x s)
    for axis in (2, 1, 0):
        parts = parts.unflatten(axis + 2, (reach[axis], stride[axis]))
    kernel = parts.flip(2, 4, 6).permute(3, 5, 7, 1, 0, 2, 4, 6).flatten(0, 3)  # (s s s O, I, z, y, x)
    found = predicted(coarse, kernel, None, [1, 1, 1], [1 if size > 1 else 0 for size in reach])
    blocks = found.permute(0, 2, 3, 4, 1).unflatten(4, (*stride, result.shape[1]))  # (B, z, y, x, s, s, s, O)
    blocks = blocks.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)
    for axis, (step, size) in enumerate(zip(stride, result.shape[2:], strict=True), 1):
        blocks = blocks.narrow(axis, step - 1, size)  # of a doubled axis they begin one voxel before the border
    result += blocks.permute(0, 4, 1, 2, 3)
