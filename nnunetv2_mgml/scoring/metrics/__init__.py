"""Segmentation metrics, one family per file. To add one: write the function, make a `Metric`, list it here."""

from nnunetv2_mgml.scoring.metrics.base import (
    MaskPair,
    Metric,
    RegionMask,
    all_metrics,
    default_metrics,
    get_metric,
    register,
)
from nnunetv2_mgml.scoring.metrics.lesionwise import LESION_DICE, LESION_HD95
from nnunetv2_mgml.scoring.metrics.overlap import DICE, PRECISION, SENSITIVITY
from nnunetv2_mgml.scoring.metrics.surface import HD95
from nnunetv2_mgml.scoring.metrics.volume import ABSOLUTE_VOLUME_ERROR, RELATIVE_VOLUME_ERROR

for _metric in (
    DICE,
    HD95,
    SENSITIVITY,
    PRECISION,
    ABSOLUTE_VOLUME_ERROR,
    RELATIVE_VOLUME_ERROR,
    LESION_DICE,
    LESION_HD95,
):
    register(_metric)

__all__ = ["MaskPair", "Metric", "RegionMask", "all_metrics", "default_metrics", "get_metric", "register"]
