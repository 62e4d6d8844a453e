"""Instance norms that depend on what is visible.

Each norm's scale and shift get a part that every modality adds or takes away, learned and zero at the start:
conditional instance normalisation (Dumoulin et al., ICLR 2017) with a linear layer on the mask as condition, as in
feature-wise linear modulation (FiLM; Perez et al., AAAI 2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from nnunetv2_mgml.upstream.cpu_layers import normed


class Told:
    """What the norms of one network are told before each pass."""

    visible: torch.Tensor | None = None
    """``(B, M)`` bool."""


class ConditionalNorm(nn.Module):
    """Mixed into an instance norm: ``norm(x) (1 + a) + b`` with ``a`` and ``b`` linear in the mask.

    Attributes:
        of_modalities: ``(M, 2, C)``: what each modality adds to scale and shift where it is visible, and takes away
            where it is not, halved.
    """

    of_modalities: nn.Parameter
    told: Told
    overwrites = False
    """See `nnunetv2_mgml.upstream.cpu_layers.InstanceNorm3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, *spatial)`` to the same shape.

        Raises:
            RuntimeError: outside a pass of the network, so that nobody knows what is visible.
        """
        if self.told.visible is None:
            raise RuntimeError("A conditional norm works inside its network only, which tells it what is visible.")
        norm = cast(nn.InstanceNorm3d, self)  # or 2d: what this is mixed into
        signs = self.told.visible.to(self.of_modalities.dtype) - 0.5
        scale, shift = (signs[:, :, None, None] * self.of_modalities).sum(1).unbind(1)
        scale = 1 + scale
        if norm.affine:
            shift = shift + scale * norm.bias
            scale = scale * norm.weight
        return normed(input, scale, shift, norm.eps, self.overwrites)


class ConditionalInstanceNorm2d(ConditionalNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` that depends on what is visible."""


class ConditionalInstanceNorm3d(ConditionalNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` that depends on what is visible."""


_CONDITIONAL: dict[type[nn.Module], type[ConditionalNorm]] = {
    nn.InstanceNorm2d: ConditionalInstanceNorm2d,
    nn.InstanceNorm3d: ConditionalInstanceNorm3d,
}


def make_conditional(modules: Iterable[nn.Module], modalities: int) -> Told | None:
    """Turn instance norms into conditional ones, in place, since nnU-Net's blocks hold each module twice.

    Args:
        modules: those of them that are instance norms, and no subclass of one.
        modalities: ``M``.

    Returns:
        What they are to be told before each pass; None where there are no such norms.
    """
    told = Told()
    norms = {id(module): module for module in modules if type(module) in _CONDITIONAL}
    for norm in cast("Iterable[Any]", norms.values()):
        norm.__class__ = _CONDITIONAL[type(norm)]
        like = norm.weight if norm.affine else torch.empty(0)
        parts = torch.zeros(modalities, 2, norm.num_features, dtype=like.dtype, device=like.device)
        norm.of_modalities = nn.Parameter(parts)
        norm.told = told
    return told if norms else None
