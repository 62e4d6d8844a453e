"""Voxel overlap: Dice, sensitivity, precision. ``tp``, ``fp``, ``fn`` are voxel counts of one region.

Where a formula is 0/0 the value is NaN; which of these an evaluation replaces is decided by its empty-case policy.
"""

from __future__ import annotations

import math

from nnunetv2_mgml.scoring.metrics.base import MaskPair, Metric


def dice(pair: MaskPair) -> float:
    """Return ``2 tp / (2 tp + fp + fn)``; NaN when both masks are empty."""
    total = pair.reference.voxels + pair.prediction.voxels
    return 2 * pair.true_positives / total if total else math.nan


def sensitivity(pair: MaskPair) -> float:
    """Return ``tp / (tp + fn)``; NaN when the reference is empty."""
    return math.nan if pair.reference.empty else pair.true_positives / pair.reference.voxels


def precision(pair: MaskPair) -> float:
    """Return ``tp / (tp + fp)``; NaN when the prediction is empty."""
    return math.nan if pair.prediction.empty else pair.true_positives / pair.prediction.voxels


DICE = Metric("dice", "Dice", "%", True, dice)
SENSITIVITY = Metric("sensitivity", "Sensitivity", "%", True, sensitivity)
PRECISION = Metric("precision", "Precision", "%", True, precision)
