"""What a network that knows subsets of the modalities offers: the one contract of training, inference and figures.

``network(x)`` is nnU-Net's: images in, logits out. ``network(x, view)`` says which modalities it may see.
``network(x, view, needs)`` is a training step: one forward pass, which DDP and ``torch.compile`` wrap, computes all
that the loss terms need and returns a `TrainingOutput`.

``B`` batch, ``M`` modalities, ``R`` fused heads (regions, or labels with background), ``K`` label classes with
background. All masks are bool, True = visible; all predictions are raw logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from nnunetv2_mgml.upstream.wrappers import bare as bare

Complete = Literal["no", "target", "learns"]
_ORDER: tuple[Complete, ...] = ("no", "target", "learns")


class Needs(NamedTuple):
    """What the loss terms want computed beside the prediction from what is visible; the objective takes the union.

    A constant of the training: which heads the network is built with, and which passes a step runs, depend on it.
    """

    complete: Complete = "no"
    """Whether to predict from all modalities a case has: as a ``target`` without gradient, or so that it ``learns``."""
    single: bool = False
    """Whether to run the fusion decoder on each modality alone."""
    modality: bool = False
    """Whether to run the decoder shared by all modalities, which predicts labels from each modality alone."""
    own_view: bool = False
    """Whether the complete prediction gets its own, more strongly augmented copy of the images."""
    subsets: int = 0
    """How many further subsets per sample to predict from, drawn by the term."""
    noisy: bool = False
    """Whether random layers, dropout above all, act in the complete prediction as in any other."""
    teacher_scale: int = 0
    """At which output of deep supervision the complete prediction ends: 0 at full resolution, 1 one stage before. At
    the coarsest there is where there are fewer."""

    def union(self, other: Needs) -> Needs:
        """Return what serves both; further subsets are each term's own, so their numbers add up."""
        scales = [needs.teacher_scale for needs in (self, other) if needs.complete != "no"]
        return Needs(
            max(self.complete, other.complete, key=_ORDER.index),
            self.single or other.single,
            self.modality or other.modality,
            self.own_view or other.own_view,
            self.subsets + other.subsets,
            self.noisy or other.noisy,
            min(scales, default=0),
        )


class View(NamedTuple):
    """Which modalities a prediction is made from, and in training what else is shown."""

    visible: torch.Tensor
    """``(B, M)``, what the network may see."""
    available: torch.Tensor | None = None
    """``(B, M)``, what each case has at all, a superset of ``visible``; None: ``visible``."""
    own_images: torch.Tensor | None = None
    """The complete prediction's own augmented images, shaped as the input; None: it shares the input's features."""
    subsets: torch.Tensor | None = None
    """``(B, S, M)``, further subsets of ``available`` to predict from."""
    encoded: torch.Tensor | None = None
    """``(N,)`` int64, the places in ``available.flatten()`` of what is worth encoding: a network may leave the rest
    out. None: all."""

    def of_available(self) -> View:
        """Return the view in which what cases lack is not worth encoding; asks the device which that is."""
        available = self.visible if self.available is None else self.available
        return self._replace(encoded=available.flatten().nonzero().flatten())


class SingleModalities(NamedTuple):
    """The fusion decoder run on each modality alone, and the prediction that teaches it; ``C`` decoder channels."""

    students: list[torch.Tensor]
    """Fused heads from one modality, each ``(B, M, R, *spatial_s)``, highest resolution first."""
    features: torch.Tensor
    """What the full-resolution head of a student reads, ``(B, M, C, *spatial)``."""
    teacher: list[torch.Tensor]
    """Fused heads from all modalities the sample has, each ``(B, R, *spatial_s)``, without gradient; of the images that
    the students see, whatever another term's complete prediction is made from."""
    teacher_features: torch.Tensor
    """``(B, C, *spatial)``, without gradient."""


class TrainingOutput(NamedTuple):
    """What one training step gets from the network; None where nobody needs it."""

    student: list[torch.Tensor]
    """Fused prediction from what is visible, each ``(B, R, *spatial_s)``, highest resolution first."""
    auxiliary: list[torch.Tensor]
    """The fusion design's own label logits, each ``(B, K, *spatial_s)`` at its own resolution; may be empty."""
    fusion_loss: torch.Tensor
    """Sum of the loss terms the fusion design computes itself (a KL divergence, ...), scalar float32; often 0."""
    modality: torch.Tensor | None = None
    """Shared decoder's prediction from each modality alone, ``(B, M, K, *spatial_s)`` at the scale where it ends."""
    complete: list[torch.Tensor] | None = None
    """Fused prediction from all modalities a case has, shaped as the last entries of ``student``: all, or those from
    `Needs.teacher_scale` on; with gradient where it ``learns``."""
    single: SingleModalities | None = None
    """What rebalancing compares."""
    subsets: list[torch.Tensor] | None = None
    """Fused predictions from the further subsets, each ``(B, S, R, *spatial_s)``, highest resolution first."""

    def lacks(self, needs: Needs) -> list[str]:
        """Return the names of fields that are needed and not there."""
        wanted = {
            "modality": needs.modality,
            "complete": needs.complete != "no",
            "single": needs.single,
            "subsets": needs.subsets > 0,
        }
        return [name for name, is_needed in wanted.items() if is_needed and getattr(self, name) is None]


Logits = torch.Tensor | list[torch.Tensor]
"""What nnU-Net expects: ``(B, R, *spatial)``, or with deep supervision a list highest resolution first."""


@runtime_checkable
class SubsetNetwork(Protocol):
    """A network that predicts from any subset of its modalities; `MultiEncoderUNet` is ours."""

    @property
    def num_modalities(self) -> int:
        """``M``."""

    def set_visible(self, subset: Sequence[bool] | torch.Tensor | None) -> None:
        """Say what every later call sees that is given no view; use `seeing`, which takes it back.

        Args:
            subset: ``M`` bools for a whole case, a ``(B, M)`` tensor for a batch, or None to forget it.

        Raises:
            ValueError: wrong shape or dtype, or a sample without any modality.
        """

    def encode(self, x: torch.Tensor, subset: tuple[bool, ...] | None = None) -> list[torch.Tensor]:
        """Return the features of the modalities, on which every subset is decoded.

        Args:
            x: ``(B, M + P, *spatial)``.
            subset: the modalities whose features are wanted; None: all.

        Returns:
            Per scale, full resolution first, ``(B, M, C_s, *spatial_s)``.
        """

    def decode_subsets(self, features: list[torch.Tensor], subsets: torch.Tensor) -> torch.Tensor:
        """Return logits ``(B, S, R, *spatial)`` for every sample and subset ``(S, M)``."""


def subset_network(network: nn.Module) -> SubsetNetwork | None:
    """Return the bare network where it knows subsets; None where it can only be given empty channels."""
    found = bare(network)
    return found if isinstance(found, SubsetNetwork) else None


@contextmanager
def seeing(network: nn.Module, subset: Sequence[bool] | torch.Tensor) -> Iterator[None]:
    """Let a network see only some modalities: the one way in where nnU-Net's code calls ``network(x)``.

    Args:
        network: wrapped or not. One that does not know subsets is left alone: it has to be given empty channels.
        subset: see `SubsetNetwork.set_visible`.
    """
    knowing = subset_network(network)
    if knowing is None:
        yield
        return
    knowing.set_visible(subset)
    try:
        yield
    finally:
        knowing.set_visible(None)
