"""Dice + cross-entropy of the decoder shared by all modalities, which predicts from each alone (part of eq. 10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunetv2_mgml.network.interface import Needs
from nnunetv2_mgml.objective.base import SharedOptions, Term, TermSpec, TermValue, register
from nnunetv2_mgml.objective.segmentation import segmentation_of_log_probabilities
from nnunetv2_mgml.objective.step import Step
from nnunetv2_mgml.objective.tensors import no_autocast
from nnunetv2_mgml.objective.terms.soft_label import SoftLabelOptions
from nnunetv2_mgml.plans.options import OptionGroup, Options, option


@dataclass(frozen=True)
class ModalityDecoderOptions(OptionGroup):
    """Of `ModalityDecoder`."""

    modality_decoder_weight: float = option(
        0.7, "weight of the shared decoder's Dice + CE per modality (reference code; not stated in the text)", low=0
    )


@register
class ModalityDecoder(Term):
    """Trains the encoders and the shared decoder."""

    name = "modality_decoder"
    order = 40
    summary = "Dice + cross-entropy of the prediction from each modality alone"
    option_group = ModalityDecoderOptions

    def __init__(self, spec: TermSpec) -> None:
        super().__init__(spec)
        weight = spec.options.objective[ModalityDecoderOptions].modality_decoder_weight
        self.weight = spec.options.objective[SharedOptions].segmentation_weight * weight

    @classmethod
    def active(cls, options: Options) -> bool:
        """With a weight; without one also where soft labels need the decoder, whose loss the log then shows."""
        return (
            options.objective[ModalityDecoderOptions].modality_decoder_weight > 0
            or options.objective[SoftLabelOptions].on
        )

    @classmethod
    def needs(cls, options: Options) -> Needs:
        """See `Term.needs`."""
        return Needs(modality=True)

    def present(self, step: Step) -> torch.Tensor:
        """Return which (sample, modality) pairs take part, ``(B, M)`` bool."""
        return step.available

    def forward(self, step: Step) -> TermValue:
        """See `Term.forward`."""
        with no_autocast(step.log_probabilities):
            loss = segmentation_of_log_probabilities(
                step.log_probabilities,
                step.class_mass,
                step.modality_labels,
                step.modality_valid,
                self.present(step),
                self.spec.batch_dice,
                step.modality_weights,
            )
            return TermValue(self.weight * loss, {"modality": loss})
