"""What our networks share: being told what is visible, from outside or with the call, and hiding the rest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from nnunetv2_mgml.network.fusion.base import expand_mask
from nnunetv2_mgml.network.interface import View
from nnunetv2_mgml.upstream.plain_errors import PlainError


class SubsetModule(nn.Module):
    """Base of the networks that know subsets of their modalities (`nnunetv2_mgml.network.interface.SubsetNetwork`).

    Attributes:
        channel_names: of the modalities, for messages; whoever knows them sets them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.channel_names: tuple[str, ...] = ()
        self._visible: torch.Tensor | None = None
        self._visible_subset: tuple[bool, ...] | None = None

    @property
    def num_modalities(self) -> int:
        """``M``."""
        raise NotImplementedError(f"{type(self).__name__} must say how many modalities it has")

    def set_visible(self, subset: Sequence[bool] | torch.Tensor | None) -> None:
        """Set what every later `forward` sees that is given no view (a whole case, or a validation batch).

        Args:
            subset: ``M`` bools (what only the others need is then not computed), a ``(B, M)`` bool tensor, or None to
                forget it. Use `nnunetv2_mgml.network.interface.seeing`, which takes it back.

        Raises:
            ValueError: wrong shape or dtype, or a sample without any modality.
        """
        if subset is None:
            self._visible_subset = self._visible = None
            return
        case = None if isinstance(subset, torch.Tensor) else tuple(bool(present) for present in subset)
        mask = subset if isinstance(subset, torch.Tensor) else torch.tensor([case])
        if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape[1] != self.num_modalities or not mask.any(1).all():
            shown = mask.tolist() if case is None else case
            raise ValueError(
                f"Expected {self.num_modalities} bools with at least one True, or a bool tensor "
                f"(batch, {self.num_modalities}) with such rows, got {shown}. Leave samples without any "
                f"modality out."
            )
        self._visible = mask.to(next(self.parameters()).device)  # once: a copy in each patch would wait for a GPU
        self._visible_subset = case

    def set_availability(self, subset: Sequence[bool] | torch.Tensor | None) -> None:
        """Do what `set_visible` does, under the name of version 0.1; to go with 0.3."""
        warnings.warn("set_availability is now set_visible; the old name works until 0.3.", DeprecationWarning, 2)
        self.set_visible(subset)

    def _view(self, x: torch.Tensor, view: View | torch.Tensor | None) -> View:
        """Return the view of an input ``(B, M + P, *spatial)``: the given one, what was set, or what it shows itself.

        Raises:
            ValueError: the input has fewer channels than there are modalities, or a view of another shape.
        """
        if x.shape[1] < self.num_modalities:  # a shape: no compiled graph breaks at it
            raise PlainError(self._too_few_channels(x.shape[1]))
        if view is not None:
            given = View(view) if isinstance(view, torch.Tensor) else view
            if given.visible.shape != (x.shape[0], self.num_modalities):
                raise PlainError(
                    f"What is visible must be a bool tensor (batch, modalities), here ({x.shape[0]}, "
                    f"{self.num_modalities}); got {tuple(given.visible.shape)}. One row for all samples: expand it, or "
                    f"set_visible."
                )
            return given
        if self._visible is None:
            return View(in_band_mask(x, self.num_modalities))
        return View(self._visible.to(x.device).expand(x.shape[0], -1))

    def _too_few_channels(self, given: int) -> str:
        names = f" ({', '.join(self.channel_names)})" if self.channel_names else ""
        return (
            f"The network was given {given} channels; it has {self.num_modalities} modalities{names}. Where files are "
            f"missing, say so: --missing_modalities auto goes by the files that exist, --missing_modalities NAME names "
            f"what is missing (missing_modalities of MGMLPredictor)."
        )


def zero_absent(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return ``x (B, M + P, *spatial)`` with the channels of absent modalities zero, NaN included.

    Args:
        x: any float dtype; the ``P`` previous-stage channels of a cascade stay as they are.
        mask: ``(B, M)`` bool, True = visible, on the device of ``x``.
    """
    extra = x.shape[1] - mask.shape[1]
    keep = torch.cat((mask, mask.new_ones(len(mask), extra)), 1) if extra else mask
    return torch.where(expand_mask(keep, x), x, 0)


def in_band_mask(x: torch.Tensor, num_modalities: int) -> torch.Tensor:
    """Read a ``(B, M)`` bool mask off a patch ``(B, M + P, *spatial)``: the fallback when nobody passed one.

    A channel that is zero all over the patch while another is not counts as absent. A patch in which every channel is
    zero lies outside the brain and counts as all present.
    """
    occupied = (x[:, :num_modalities].flatten(2) != 0).any(-1)
    return occupied | ~occupied.any(1, keepdim=True)
