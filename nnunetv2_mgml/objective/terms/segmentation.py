"""Segmentation."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_mgml.plans.options import OptionGroup, option


@dataclass(frozen=True)
class SegmentationOptions(OptionGroup):
    """Of `Segmentation`."""

    auxiliary_weight: float = option(1.0, "weight of the fusion design's auxiliary losses", low=0)
