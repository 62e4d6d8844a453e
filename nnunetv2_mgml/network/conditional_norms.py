"""Instance norms that depend on what is visible.

Each norm's scale and shift get a part that every modality adds or takes away, learned and zero at the start:
conditional instance normalisation (Dumoulin et al., ICLR 2017) with a linear layer on the mask as condition, as in
feature-wise linear modulation (FiLM; Perez et al., AAAI 2018).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pydoc import locate
from typing import Any, cast

import torch
from torch import nn

from nnunetv2_mgml.upstream.cpu_layers import normed

_OfAll = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]


class _Pass(threading.local):
    """What one thread's pass was told."""

    now: _OfAll | None

    def __init__(self) -> None:
        self.now = None


class Told:
    """What the norms of one network are told for a pass: scale and shift of all of them, found at once.

    Every thread has passes of its own.

    Args:
        norms: conditional ones.
    """

    def __init__(self, norms: Sequence[Any]) -> None:
        self._norms = tuple(norms)
        self._pass = _Pass()

    def __getstate__(self) -> dict[str, Any]:
        return {"_norms": self._norms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._norms, self._pass = state["_norms"], _Pass()

    @contextmanager
    def tell(self, visible: torch.Tensor) -> Iterator[None]:
        """Say for a while what is visible, ``(B, M)`` bool."""
        before, self._pass.now = self._pass.now, self._of_all(visible)
        try:
            yield
        finally:
            self._pass.now = before

    def of(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and shift of a norm, ``(B, C)``.

        Raises:
            RuntimeError: outside a pass of the network, so that nobody knows what is visible.
        """
        now = self._pass.now
        if now is None:
            raise RuntimeError(
                "A conditional norm works inside its network only, which tells it what is visible. A fusion design "
                "whose `share` calls its norms must not say `conditions_norms`."
            )
        scales, shifts = now
        return scales[place], shifts[place]

    def _of_all(self, visible: torch.Tensor) -> _OfAll:
        widths = [norm.num_features for norm in self._norms]
        parts = torch.cat([norm.of_modalities for norm in self._norms], 2)
        signs = visible.to(parts.dtype) - 0.5
        scale, shift = (signs[:, :, None, None] * parts).sum(1).unbind(1)
        scale = 1 + scale
        if any(norm.affine for norm in self._norms):
            one, none = parts.new_ones(1), parts.new_zeros(1)
            own = [
                (norm.weight, norm.bias) if norm.affine else (one.expand(width), none.expand(width))
                for norm, width in zip(self._norms, widths, strict=True)
            ]
            weight, bias = (torch.cat(of_all) for of_all in zip(*own, strict=True))
            shift = shift + scale * bias
            scale = scale * weight
        return scale.split(widths, 1), shift.split(widths, 1)


class ConditionalNorm(nn.Module):
    """Mixed into an instance norm: ``norm(x) (1 + a) + b`` with ``a`` and ``b`` linear in the mask.

    Attributes:
        of_modalities: ``(M, 2, C)``: what each modality adds to scale and shift where it is visible, and takes away
            where it is not, halved.
    """

    of_modalities: nn.Parameter
    told: Told
    place: int
    """Among the norms that are told."""
    overwrites = False
    """See `nnunetv2_mgml.upstream.cpu_layers.InstanceNorm3d`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map ``(B, C, *spatial)`` to the same shape.

        Raises:
            RuntimeError: outside a pass of the network.
        """
        scale, shift = self.told.of(self.place)
        return normed(input, scale, shift, cast(nn.InstanceNorm3d, self).eps, self.overwrites)  # or 2d


class ConditionalInstanceNorm2d(ConditionalNorm, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` that depends on what is visible."""


class ConditionalInstanceNorm3d(ConditionalNorm, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` that depends on what is visible."""


_CONDITIONAL: dict[type[nn.Module], type[ConditionalNorm]] = {
    nn.InstanceNorm2d: ConditionalInstanceNorm2d,
    nn.InstanceNorm3d: ConditionalInstanceNorm3d,
}


def can_be_conditional(norm_op: Any, kwargs: Mapping[str, Any] | None) -> bool:
    """Return whether the norms of a plan can depend on what is visible.

    Args:
        norm_op: a class, or the name of one as in nnU-Net's plans.
        kwargs: its arguments.
    """
    kind = locate(norm_op) if isinstance(norm_op, str) else norm_op
    return kind in _CONDITIONAL and not (kwargs or {}).get("track_running_stats", False)


def make_conditional(modules: Iterable[nn.Module], modalities: int) -> Told | None:
    """Turn instance norms into conditional ones, in place, since nnU-Net's blocks hold each module twice.

    Args:
        modules: those of them that are instance norms, no subclass of one and without running statistics.
        modalities: ``M``.

    Returns:
        What they are to be told before each pass; None where there are no such norms.
    """
    norms: list[Any] = list({id(module): module for module in modules if _is_plain(module)}.values())
    if not norms:
        return None
    told = Told(norms)
    for place, norm in enumerate(norms):
        norm.__class__ = _CONDITIONAL[type(norm)]
        like = norm.weight if norm.affine else torch.empty(0)
        parts = torch.zeros(modalities, 2, norm.num_features, dtype=like.dtype, device=like.device)
        norm.of_modalities = nn.Parameter(parts)
        norm.told, norm.place = told, place
    return told


def _is_plain(module: nn.Module) -> bool:
    return type(module) in _CONDITIONAL and not cast(nn.InstanceNorm3d, module).track_running_stats  # or 2d
