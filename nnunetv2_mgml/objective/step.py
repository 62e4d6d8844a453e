"""`Step`: what one training step gives the loss terms, each quantity computed once, by the first term that asks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch.nn import functional

from nnunetv2_mgml.network.interface import SingleModalities, TrainingOutput, View
from nnunetv2_mgml.objective.base import TermSpec
from nnunetv2_mgml.objective.segmentation import class_mass, label_target
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast

T = TypeVar("T")
Target = torch.Tensor | Sequence[torch.Tensor]
"""nnU-Net's target; a list, highest resolution first, under deep supervision (see `label_target`)."""


class FurtherSubsets(NamedTuple):
    """What a term that drew further subsets gets back."""

    subsets: torch.Tensor
    """``(B, S, M)`` bool, as the term drew them."""
    predictions: list[torch.Tensor]
    """Fused logits, each ``(B, S, R, *spatial_s)``, highest resolution first."""


class Step:
    """One training step.

    ``B`` batch, ``M`` modalities, ``K`` label classes with background, ``R`` fused heads.

    Args:
        spec: of the objective.
        output: of the network.
        view: what the network was shown.
        target: nnU-Net's target; None where there is no ground truth, which some terms can do without.
        ramp: weight in [0, 1] of the terms that grow over the first epochs.
        places: term name -> where its further subsets are among all of them.
    """

    def __init__(
        self,
        spec: TermSpec,
        output: TrainingOutput,
        view: View,
        target: Target | None,
        ramp: float = 1.0,
        places: Mapping[str, slice] | None = None,
    ) -> None:
        self.spec = spec
        self.output = output
        self.target = target
        self.ramp = ramp
        self.visible = view.visible
        """``(B, M)`` bool, what the student saw."""
        self.available = view.visible if view.available is None else view.available
        """``(B, M)`` bool, what each case has; a superset of `visible`, never empty."""
        self.modality_weights: torch.Tensor | None = None
        """``(M,)``, set by a term that weighs the modalities for the terms after it; None: all alike."""
        self._subsets = view.subsets
        self._places = places or {}
        self._labels: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._modality_labels: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._modality_logits: torch.Tensor | None = None
        self._log_probabilities: torch.Tensor | None = None
        self._class_mass: torch.Tensor | None = None

    # --- ground truth -------------------------------------------------------------------------------------------------
    @property
    def labels(self) -> torch.Tensor:
        """``(B, *spatial)`` int64 in ``[0, K)``; 0 where ignored."""
        return self._label_target()[0]

    @property
    def valid(self) -> torch.Tensor | None:
        """``(B, *spatial)`` bool, voxels without the ignore label; None: all."""
        return None if self.target is None else self._label_target()[1]

    def _label_target(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._labels is None:
            self._labels = self._labels_of(self._targets()[0])
        return self._labels

    def _targets(self) -> Sequence[torch.Tensor]:
        if self.target is None:
            raise ValueError("This step has no ground truth.")
        return [self.target] if isinstance(self.target, torch.Tensor) else self.target

    def _labels_of(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return label_target(target, regions=self.spec.regions, ignore_label=self.spec.ignore_label)

    def valid_at(self, output: int) -> torch.Tensor | None:
        """Return `valid` at an output of the fused prediction; 0 is the highest resolution."""
        if output == 0 or self.target is None:
            return self.valid
        return self._labels_of(self._targets()[output])[1]

    @property
    def valid_per_resolution(self) -> list[torch.Tensor | None]:
        """`valid` at each output of the fused prediction."""
        return [self.valid_at(output) for output in range(len(self.output.student))]

    def truth_at(self, output: int) -> torch.Tensor:
        """Return what an output of the fused prediction is to be: region maps ``(B, R, *spatial_s)``, or `labels`."""
        target = self._targets()[output]
        if self.spec.regions:
            return target[:, : self.output.student[0].shape[1]]
        return self.labels if output == 0 else self._labels_of(target)[0]

    def segmentation_loss(self, prediction: list[torch.Tensor]) -> torch.Tensor:
        """Return nnU-Net's own loss of a fused prediction at all its resolutions.

        Args:
            prediction: of all resolutions of the target, or of the last of them. Then the first of it gets the weight
                of full resolution, the next one that of half, ...
        """
        if self.target is None or isinstance(self.target, torch.Tensor):
            return self.spec.segmentation_loss(prediction[0], self._targets()[0])
        return self.spec.segmentation_loss(list(prediction), self.target[len(self.target) - len(prediction) :])

    # --- predictions --------------------------------------------------------------------------------------------------
    @property
    def student(self) -> torch.Tensor:
        """Fused logits from what is visible, ``(B, R, *spatial)``."""
        return self.output.student[0]

    @property
    def complete(self) -> list[torch.Tensor]:
        """Fused logits from all that is available, with gradient where that was asked for, at all resolutions from that
        of `Needs.teacher_scale` on."""
        return _required(self.output.complete, "complete")

    @property
    def teacher(self) -> torch.Tensor:
        """Fused logits from all that is available, ``(B, R, *spatial_s)``, without gradient: the finest of them."""
        return self.complete[0].detach()

    @property
    def teacher_output(self) -> int:
        """Which output of the fused prediction is as large as `teacher`."""
        return len(self.output.student) - len(self.complete)

    @property
    def single(self) -> SingleModalities:
        """The fusion decoder on each modality alone."""
        return _required(self.output.single, "single")

    def further_subsets(self, term: str) -> FurtherSubsets:
        """Return the subsets a term drew and what was predicted from them."""
        place = self._places[term]
        predictions = [scale[:, place] for scale in _required(self.output.subsets, "subsets")]
        return FurtherSubsets(_required(self._subsets, "subsets")[:, place], predictions)

    # --- the decoder shared by all modalities, at its own scale: one log-softmax in float32 serves every term ---------
    @property
    def modality_labels(self) -> torch.Tensor:
        """`labels` at the scale of `modality_logits`."""
        return self._modality_target()[0]

    @property
    def modality_valid(self) -> torch.Tensor | None:
        """`valid` at the scale of `modality_logits`."""
        return None if self.target is None else self._modality_target()[1]

    def _modality_target(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._modality_labels is None:
            size = self.modality_logits.shape[3:]
            full, *coarser = self._targets()
            if size == full.shape[2:]:
                self._modality_labels = self._label_target()
            else:  # without deep supervision as nnU-Net makes the targets that come with it
                same = (target for target in coarser if target.shape[2:] == size)
                found = next(same, None)
                if found is None:
                    found = functional.interpolate(full.float(), size, mode="nearest-exact").to(full.dtype)
                self._modality_labels = self._labels_of(found)
        return self._modality_labels

    @property
    def modality_logits(self) -> torch.Tensor:
        """Its label logits from each modality alone, ``(B, M, K, *spatial_s)``, at least float32.

        Raises:
            ValueError: the network was built for another number of classes.
        """
        if self._modality_logits is None:
            self._modality_logits = at_least_float32(self._checked_modality_logits())
        return self._modality_logits

    def _checked_modality_logits(self) -> torch.Tensor:
        logits = _required(self.output.modality, "modality")
        if logits.shape[2] != self.spec.num_classes:
            raise ValueError(
                f"The modality logits have {logits.shape[2]} classes, the labels {self.spec.num_classes} (background "
                f"included). Build the network with num_classes={self.spec.num_classes}, or with the plans of this "
                f"dataset."
            )
        return logits

    @property
    def log_probabilities(self) -> torch.Tensor:
        """``(B, M, K, *spatial_s)``, at least float32."""
        if self._log_probabilities is None:
            with no_autocast(self.modality_logits):
                self._log_probabilities = self.modality_logits.log_softmax(2)
        return self._log_probabilities

    @property
    def class_mass(self) -> torch.Tensor:
        """``(B, M, K)``: every class's probability, summed over the voxels that count."""
        if self._class_mass is None:
            with no_autocast(self.log_probabilities):
                self._class_mass = class_mass(self.log_probabilities, self.modality_valid)
        return self._class_mass

    @property
    def mean_probabilities(self) -> torch.Tensor:
        """``(B, M, K)``: every class's probability, averaged over the voxels that count (eq. 1)."""
        return self.class_mass / self.class_mass.sum(2, keepdim=True).clamp_min(1)


def _required(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"The network returned no '{name}'. Call it with the needs of the objective.")
    return value
