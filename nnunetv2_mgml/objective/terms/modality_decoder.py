"""Modality decoder."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class ModalityDecoderOptions(OptionGroup):
    """Of `ModalityDecoder`."""

    modality_decoder_weight: float = option(
        0.7, "weight of the shared decoder's Dice + CE per modality (reference code; not stated in the text)", low=0
    )
