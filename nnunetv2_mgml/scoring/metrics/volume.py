"""Volume errors of a region: absolute in ml, relative to the reference (signed: positive is too large)."""

from __future__ import annotations

import math

from nnunetv2_mgml.scoring.metrics.base import MaskPair, Metric


def absolute_volume_error(pair: MaskPair) -> float:
    """Return ``|V_prediction - V_reference|`` in ml; defined for empty masks too."""
    return abs(pair.prediction.volume_ml - pair.reference.volume_ml)


def relative_volume_error(pair: MaskPair) -> float:
    """Return ``(V_prediction - V_reference) / V_reference``; NaN when the reference is empty."""
    if pair.reference.empty:
        return math.nan
    return (pair.prediction.voxels - pair.reference.voxels) / pair.reference.voxels


ABSOLUTE_VOLUME_ERROR = Metric("absolute_volume_error", "Absolute volume error", "ml", False, absolute_volume_error)
RELATIVE_VOLUME_ERROR = Metric("relative_volume_error", "Relative volume error", "%", None, relative_volume_error)
