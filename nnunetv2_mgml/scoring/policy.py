"""What a metric is worth when the reference, the prediction or both are empty: a named, recorded choice.

``brats`` follows the BraTS challenges: nothing there and nothing predicted is a perfect answer, one of the two is the
worst. 374 mm is the diagonal of a BraTS volume (240 x 240 x 155 mm, rounded up). ``nan`` is nnU-Net's: what is 0/0 has
no value and leaves the mean; a metric that is still defined (Dice 0 for a false alarm) keeps its value. Lesion-wise
metrics follow the same choice: their rules would give 1 and 0 mm for an empty pair, and 374 mm for a false alarm.

A relative volume error against an empty reference has no finite value: it stays NaN under both, unless both are empty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from nnunetv2_mgml.scoring.metrics import MaskPair, Metric
from nnunetv2_mgml.scoring.regions import are_brats_regions

BRATS_DISTANCE_MM = 374.0


@dataclass(frozen=True)
class EmptyPolicy:
    """A policy: metric name -> situation (`MaskPair.situation`) -> value. What is not listed is computed."""

    name: str
    summary: str
    values: dict[str, dict[str, float]]

    def score(self, metric: Metric, pair: MaskPair) -> float:
        """Return the metric's value for a pair: the policy's where it has one, else the computed one."""
        listed = self.values.get(metric.name, {})
        return listed[pair.situation] if pair.situation in listed else float(metric.compute(pair))


def _same(both: float, one: float) -> dict[str, float]:
    return {"both_empty": both, "reference_empty": one, "prediction_empty": one}


POLICIES: dict[str, EmptyPolicy] = {
    "brats": EmptyPolicy(
        "brats",
        "both empty: Dice, sensitivity, precision 1 and HD95 0 mm; one empty: 0 and 374 mm",
        {
            "dice": _same(1.0, 0.0),
            "sensitivity": _same(1.0, 0.0),
            "precision": _same(1.0, 0.0),
            "hd95": _same(0.0, BRATS_DISTANCE_MM),
            "relative_volume_error": {"both_empty": 0.0},
        },
    ),
    "nan": EmptyPolicy(
        "nan",
        "both empty: no value; one empty: Dice 0, HD95 and every 0/0 no value",
        {"lesion_dice": {"both_empty": math.nan}, "lesion_hd95": _same(math.nan, math.nan)},
    ),
}


def get_policy(name: str, region_names: Iterable[str] = ()) -> EmptyPolicy:
    """Return a policy by name; ``auto`` is ``brats`` when the regions are those of BraTS, else ``nan``.

    Raises:
        ValueError: no such policy; the message lists all.
    """
    if name == "auto":
        name = "brats" if are_brats_regions(region_names) else "nan"
    if name not in POLICIES:
        raise ValueError(f"Unknown empty-case policy '{name}'. Allowed: auto, {', '.join(POLICIES)}.")
    return POLICIES[name]
