"""What a training step asks of the network."""

from __future__ import annotations

from typing import Literal, NamedTuple

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

    def union(self, other: Needs) -> Needs:
        """Return what serves both."""
        return Needs(
            max(self.complete, other.complete, key=_ORDER.index),
            self.single or other.single,
            self.modality or other.modality,
            self.own_view or other.own_view,
        )
