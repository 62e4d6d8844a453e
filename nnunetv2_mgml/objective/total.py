"""The total loss (eq. 10): ``lambda1 L_seg + lambda2 L_SL + lambda3 L_CR``, and what trains the MetaNetwork.

Who gets which gradient: L_seg everything; L_SL the encoders and the shared decoder, through the modality logits as
students; L_CR the fused path of the student; L_complete (``complete_view_weight``) the encoders and the fused path of
the teacher's own pass, by ``output.complete``; L_meta the MetaNetwork alone. As targets of L_SL and L_CR soft label and
teacher get none. Rebalancing, an option, weighs the shared decoder's part of L_seg by modality and adds two terms
(`rebalancing`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.network.outputs import TrainingOutput
from nnunetv2_mgml.objective import readings
from nnunetv2_mgml.objective.adaptive_fusion import adaptive_fusion, mean_fusion
from nnunetv2_mgml.objective.base import SharedOptions
from nnunetv2_mgml.objective.consistency import consistency_loss
from nnunetv2_mgml.objective.distillation import soft_label_loss
from nnunetv2_mgml.objective.meta_network import MetaParameters
from nnunetv2_mgml.objective.published.reading import ReadingOptions
from nnunetv2_mgml.objective.rebalancing import Balance, Rebalancing, rebalancing_terms
from nnunetv2_mgml.objective.segmentation import (
    auxiliary_loss,
    class_mass,
    label_target,
    segmentation_of_log_probabilities,
)
from nnunetv2_mgml.objective.tensors import at_least_float32, no_autocast
from nnunetv2_mgml.objective.terms.complete_view import CompleteViewOptions
from nnunetv2_mgml.objective.terms.consistency import ConsistencyOptions
from nnunetv2_mgml.objective.terms.modality_decoder import ModalityDecoderOptions
from nnunetv2_mgml.objective.terms.rebalancing import RebalancingOptions
from nnunetv2_mgml.objective.terms.segmentation import SegmentationOptions
from nnunetv2_mgml.objective.terms.soft_label import SoftLabelOptions
from nnunetv2_mgml.objective.voxel_masking import keep_map
from nnunetv2_mgml.plans.options import OptionGroup, Options

_NO_PARAMETERS_CONFIDENCE = 0.5  # a mean has no w_f; at 0.5 the dropped share is mask_ratio itself


GROUPS: tuple[type[OptionGroup], ...] = (
    SharedOptions,
    SegmentationOptions,
    ModalityDecoderOptions,
    SoftLabelOptions,
    ConsistencyOptions,
    CompleteViewOptions,
    RebalancingOptions,
    ReadingOptions,
)
"""The options of the terms, in the order in which they are shown."""


def needs_of(options: Options) -> Needs:
    """Return what the terms that are on want of the network."""
    config = _Flat(options)
    taught = (
        config.uses_rebalancing and config.mask_sampling != "fixed"
    )  # else it is the prediction from what is visible
    target = config.uses_teacher or taught
    return Needs(
        "learns" if config.supervises_teacher else "target" if target else "no",
        config.uses_rebalancing,
        config.modality_decoder_weight > 0 or config.uses_soft_label,
        config.uses_teacher and config.teacher_augmentation,
    )


class _Flat:
    """Every option by its name, and which terms are on."""

    def __init__(self, options: Options) -> None:
        vars(self).update(options.as_dict())
        self.uses_soft_label = options.objective[SoftLabelOptions].on
        self.uses_teacher = self.consistency_weight > 0 and not (
            self.mask_sampling == "fixed" and self.reading == "ours"
        )
        self.supervises_teacher = self.complete_view_weight > 0 and self.mask_sampling != "fixed"
        self.uses_rebalancing = self.rebalancing != "none"


class LossTerms(NamedTuple):
    """Result of `MGMLLoss`."""

    total: torch.Tensor
    """Scalar for backward."""
    parts: dict[str, torch.Tensor]
    """Detached scalars, unweighted: the terms that are on, and the batch means of the meta-parameters."""
    distance: torch.Tensor | None = None
    """``(B, M)``, how far each modality is from the teacher (rebalancing only; 0 where absent)."""


class _Target(NamedTuple):
    labels: torch.Tensor
    valid: torch.Tensor | None
    present: torch.Tensor


class MGMLLoss(nn.Module):
    """Eq. 10 for one training step.

    Args:
        options: weights and choices.
        segmentation_loss: nnU-Net's own loss, called with what its trainer would pass: a list of outputs and of targets
            under deep supervision, else tensors.
        regions: whether the fused heads are regions (sigmoid) rather than labels (softmax).
        num_classes: ``K``, label classes with background.
        ignore_label: nnU-Net's ignore label, or None.
        batch_dice: nnU-Net's ``batch_dice``, for the modality and auxiliary losses.
        meta_network: what `build_meta_network` returned, possibly wrapped for DDP. Held by reference only: whoever
            built it also optimises and saves it.

    Raises:
        ValueError: a MetaNetwork missing where the soft label needs it, or given where nothing uses it.
    """

    def __init__(
        self,
        options: Options,
        segmentation_loss: nn.Module,
        *,
        regions: bool,
        num_classes: int,
        ignore_label: int | None = None,
        batch_dice: bool = False,
        meta_network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        config = _Flat(options)
        uses_meta = config.uses_soft_label and config.soft_label == "meta_amf"
        if uses_meta != (meta_network is not None):
            needs = "needs a" if uses_meta else "uses no"
            raise ValueError(
                f"soft_label '{config.soft_label}' with weight {config.soft_label_weight:g} {needs} "
                f"MetaNetwork; pass what build_meta_network gives."
            )
        self.config = config
        self.segmentation_loss = segmentation_loss
        self.regions = regions
        self.num_classes = num_classes
        self.ignore_label = ignore_label
        self.batch_dice = batch_dice
        self._meta_network = (meta_network,)  # a tuple hides it from nn.Module: no second owner of its parameters

    def forward(
        self,
        output: TrainingOutput,
        target: torch.Tensor | Sequence[torch.Tensor],
        mask: torch.Tensor,
        available: torch.Tensor,
        ramp: float = 1.0,
        balance: Balance | None = None,
    ) -> LossTerms:
        """Compute all terms.

        Args:
            output: of the network, with ``modality`` and ``teacher`` where the configuration needs them.
            target: nnU-Net's target, a list (highest resolution first) under deep supervision; see `label_target`.
            mask: ``(B, M)`` bool, the modalities the student saw.
            available: ``(B, M)`` bool, the modalities each case has; a superset of ``mask``, never empty.
            ramp: weight in [0, 1] of the soft-label, consistency and rebalancing terms.
            balance: this epoch's weights of the modalities for rebalancing; None: all 1.

        Returns:
            The total and its parts.

        Raises:
            ValueError: ``output`` lacks the modality or teacher logits a term needs, or has another number of classes.
        """
        config = self.config
        deep = not isinstance(target, torch.Tensor)
        self._check(output)
        labels, valid = label_target(
            target[0] if deep else target, regions=self.regions, ignore_label=self.ignore_label
        )
        # The published code teaches and fuses all modalities, whatever the case has.
        present = torch.ones_like(available) if config.reading == "reference" else available
        truth = _Target(labels, valid, present)

        segmentation = (
            self.segmentation_loss(list(output.student), target)
            if deep
            else self.segmentation_loss(output.student[0], target)
        )
        parts = {"segmentation": segmentation}
        total = segmentation
        if output.auxiliary:
            parts["auxiliary"] = auxiliary_loss(output.auxiliary, labels, valid, self.batch_dice)
            total = total + config.auxiliary_weight * parts["auxiliary"]
        if config.supervises_teacher:
            parts["complete"] = (
                self.segmentation_loss(list(output.complete), target)
                if deep
                else self.segmentation_loss(output.complete[0], target)
            )
            total = total + config.complete_view_weight * parts["complete"]
        parts["fusion"] = output.fusion_loss
        total = config.segmentation_weight * (total + config.auxiliary_weight * output.fusion_loss)
        modality_weights, distance = None, None
        if config.uses_rebalancing:
            balance = balance or Balance.even(available.shape[1], available.device)
            terms = self._rebalance(output, target, truth, balance)
            parts["distillation"], parts["prototype"], distance = terms.distillation, terms.prototype, terms.distance
            total = total + ramp * (
                config.rebalancing_distillation_weight * terms.distillation
                + config.rebalancing_prototype_weight * terms.prototype
            )
            modality_weights = (1 + ramp * (terms.switch - 1)) * balance.beta * balance.count
        if output.modality is not None:
            total = total + self._modality_terms(output.modality, truth, ramp, parts, modality_weights)
        if config.uses_teacher:
            heads = target[0] if deep else target
            reference = heads[:, : output.student[0].shape[1]] if self.regions else labels
            parts["consistency"] = self._consistency(output, mask, available, valid, reference)
            total = total + ramp * config.consistency_weight * parts["consistency"]
        return LossTerms(total, {name: value.detach() for name, value in parts.items()}, distance)

    def _rebalance(
        self, output: TrainingOutput, target: torch.Tensor | Sequence[torch.Tensor], truth: _Target, balance: Balance
    ) -> Rebalancing:
        valid = [truth.valid]
        if truth.valid is not None and not isinstance(target, torch.Tensor):
            valid += [label_target(t, regions=self.regions, ignore_label=self.ignore_label)[1] for t in target[1:]]
        elif truth.valid is None:
            valid = [None] * len(output.student)
        return rebalancing_terms(
            output.single,
            truth.labels,
            valid,
            truth.present,
            balance,
            num_classes=self.num_classes,
            temperature=self.config.rebalancing_temperature,
            regions=self.regions,
        )

    def _check(self, output: TrainingOutput) -> None:
        config = self.config
        if output.modality is None and (config.uses_soft_label or config.modality_decoder_weight > 0):
            raise ValueError(
                "The network returned no modality logits, which modality_decoder_weight > 0 and "
                "soft_label need. Build it with the shared modality decoder, or set them to 0 and none."
            )
        if output.modality is not None and output.modality.shape[2] != self.num_classes:
            raise ValueError(
                f"The modality logits have {output.modality.shape[2]} classes, the labels "
                f"{self.num_classes} (background included). Build the network with num_classes="
                f"{self.num_classes}, or with the plans of this dataset."
            )
        if output.teacher is None and config.uses_teacher:
            raise ValueError(
                "The network returned no teacher, which consistency_weight > 0 needs. Call it with "
                "with_teacher=True, or set consistency_weight to 0."
            )
        if output.complete is None and config.supervises_teacher:
            raise ValueError(
                "The network returned no teacher with gradient, which complete_view_weight > 0 needs. "
                "Call it with with_teacher=True and teacher_learns=True, or set the weight to 0."
            )
        if output.single is None and config.uses_rebalancing:
            raise ValueError(
                "The network returned no predictions from single modalities, which rebalancing needs. "
                "Call it with with_single=True, or set rebalancing to none."
            )

    def _modality_terms(
        self,
        logits: torch.Tensor,
        truth: _Target,
        ramp: float,
        parts: dict[str, torch.Tensor],
        modality_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The terms on the shared decoder's ``(B, M, K, *spatial)``; its log-softmax is computed once for all."""
        config = self.config
        with no_autocast(logits):
            logits = at_least_float32(logits)
            log_probabilities = logits.log_softmax(2)
            mass = class_mass(log_probabilities, truth.valid)
            parts["modality"] = segmentation_of_log_probabilities(
                log_probabilities, mass, truth.labels, truth.valid, truth.present, self.batch_dice, modality_weights
            )
            total = config.segmentation_weight * config.modality_decoder_weight * parts["modality"]
            if not config.uses_soft_label:
                return total
            means = mass / mass.sum(2, keepdim=True).clamp_min(1)
            if config.reading == "ours":
                total = total + self._soft_label(log_probabilities, means.detach(), truth, ramp, parts)
            else:
                total = total + self._published_soft_label(logits, means, truth, ramp, parts)
            return total

    def _predict_parameters(
        self, means: torch.Tensor, present: torch.Tensor, parts: dict[str, torch.Tensor]
    ) -> MetaParameters:
        (meta_network,) = self._meta_network
        if meta_network is None:
            return MetaParameters.fixed(
                len(means), self.config.fixed_confidence, self.config.fixed_sharpness, means.device
            )
        parameters = meta_network(means, present)
        parts.update({name: value.mean() for name, value in parameters._asdict().items()})
        return parameters

    def _soft_label(
        self,
        log_probabilities: torch.Tensor,
        means: torch.Tensor,
        truth: _Target,
        ramp: float,
        parts: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        config, present = self.config, truth.present
        if config.soft_label == "mean":
            fused = mean_fusion(log_probabilities, present, normalised=True)
            w_f = torch.full_like(means[:, 0, 0], _NO_PARAMETERS_CONFIDENCE)
        else:
            parameters = self._predict_parameters(means, present, parts)
            w_f = parameters.w_f
            fused = adaptive_fusion(log_probabilities, present, parameters, normalised=True)
        log_soft = fused.log_softmax(1)[:, None]
        keep = keep_map(log_soft[:, 0].detach().exp(), w_f, config.mask_ratio, config.mask_mode)
        from_label = config.soft_label == "meta_amf" and config.meta_objective == "soft_label"
        parts["soft_label"] = soft_label_loss(
            log_probabilities,
            fused,
            present,
            keep,
            config.temperature,
            truth.valid,
            train_target=from_label,
            labels=truth.labels if config.teaching == "better" else None,
        )
        total = ramp * config.soft_label_weight * parts["soft_label"]
        if config.soft_label == "meta_amf" and not from_label:
            parts["meta"] = segmentation_of_log_probabilities(
                log_soft,
                class_mass(log_soft, truth.valid),
                truth.labels,
                truth.valid,
                torch.ones_like(present[:, :1]),
                self.batch_dice,
            )
            total = total + parts["meta"]
        return total

    def _published_soft_label(
        self, logits: torch.Tensor, means: torch.Tensor, truth: _Target, ramp: float, parts: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        config = self.config
        parameters = self._predict_parameters(means, truth.present, parts)
        if config.reading == "paper":
            loss = readings.paper_soft_label_loss(logits, truth.present, parameters, config.mask_ratio, truth.valid)
        else:
            loss = readings.reference_soft_label_loss(
                logits, parameters, config.temperature, config.mask_ratio, truth.valid
            )
        parts["soft_label"] = loss
        return ramp * config.soft_label_weight * loss

    def _consistency(
        self,
        output: TrainingOutput,
        mask: torch.Tensor,
        available: torch.Tensor,
        valid: torch.Tensor | None,
        reference: torch.Tensor,
    ) -> torch.Tensor:
        config, student, teacher = self.config, output.student[0], output.teacher
        if config.reading == "ours":
            return consistency_loss(
                student,
                teacher,
                mask,
                available,
                config.temperature,
                self.regions,
                valid,
                reference if config.teaching == "better" else None,
            )
        published = (
            readings.paper_consistency_loss if config.reading == "paper" else readings.reference_consistency_loss
        )
        return published(student, teacher, config.temperature, self.regions, valid)
