"""What follows from scores that are there: inversions between nested subsets, and the volume bias."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from nnunetv2_mgml.modalities import Subset

if TYPE_CHECKING:
    from nnunetv2_mgml.scoring.results import Evaluation

MARGIN = 0.01
"""An inversion is a loss of more than this, one Dice point."""
_ROUNDING = 1e-9  # 0.85 - 0.84 is a little more than 0.01 in floating point


class Over(Enum):
    """What an entry is over, where it is not one region."""

    ALL = "all regions"


ALL = Over.ALL
"""Key of the entry over all regions; no region, whatever its name, is equal to it."""


def name_of_all(regions: Collection[str], name: str = ALL.value) -> str:
    """Return what all regions together are called beside these: ``name``, in brackets where one is called so."""
    while name in regions:
        name = f"({name})"
    return name


class Inversions(NamedTuple):
    """How often more modalities made the prediction worse."""

    share: float
    """Inverted triples / triples; NaN where there is none."""
    n: int
    """Triples of a case, a region and two nested subsets in which both have a value."""


def nested_pairs(subsets: Sequence[Subset]) -> list[tuple[int, int]]:
    """Return ``(i, j)`` for every subset ``i`` that is contained in another subset ``j``, by position."""
    return [
        (i, j)
        for i, small in enumerate(subsets)
        for j, large in enumerate(subsets)
        if small != large and all(has or not wanted for wanted, has in zip(small, large, strict=True))
    ]


def inversions_of_cases(evaluation: Evaluation, metric: str = "dice", margin: float = MARGIN) -> pd.DataFrame:
    """Count, per case and region, the nested pairs of subsets in which the larger one scores lower.

    Args:
        evaluation: with a metric where more is better.
        metric: its name.
        margin: by more than this, in the metric's own unit (a fraction for Dice).

    Returns:
        Columns ``case``, ``region``, ``inverted`` and ``n`` (pairs in which both have a value).

    Raises:
        ValueError: the evaluation has no such metric.
    """
    pairs = nested_pairs(evaluation.subsets)
    small, large = (np.array([pair[side] for pair in pairs], dtype=int) for side in (0, 1))
    frames = []
    for region in evaluation.region_names:
        values = evaluation.values(metric, region)
        scores = values.to_numpy(dtype=float)
        loss = scores[:, small] - scores[:, large]
        frames.append(
            pd.DataFrame(
                {
                    "case": values.index,
                    "region": region,
                    "inverted": (loss > margin + _ROUNDING).sum(axis=1),  # NaN compares as False
                    "n": (~np.isnan(loss)).sum(axis=1),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def inversions(evaluation: Evaluation, metric: str = "dice", margin: float = MARGIN) -> dict[str | Over, Inversions]:
    """Return the share of inversions per region, and of all regions together under `ALL`.

    Arguments and errors are those of `inversions_of_cases`.
    """
    counts = inversions_of_cases(evaluation, metric, margin)
    rows: dict[str | Over, pd.DataFrame] = {r: counts[counts["region"] == r] for r in evaluation.region_names}
    rows[ALL] = counts
    sums = {name: (int(r["inverted"].sum()), int(r["n"].sum())) for name, r in rows.items()}
    return {name: Inversions(inverted / n if n else float("nan"), n) for name, (inverted, n) in sums.items()}


def has_volume_bias(evaluation: Evaluation) -> bool:
    """Whether the metrics are there from which `volume_bias` follows."""
    return {"absolute_volume_error", "relative_volume_error"} <= set(evaluation.metrics)


def volume_bias(evaluation: Evaluation, region: str) -> pd.DataFrame:
    """Return ``V_prediction - V_reference`` in ml, one row per case and one column per subset.

    It is the absolute volume error with the sign of the relative one; where the reference is empty there is none, and
    no prediction can be too small.

    Raises:
        ValueError: the evaluation lacks one of the two metrics, or has no such region.
    """
    size = evaluation.values("absolute_volume_error", region)
    sign = evaluation.values("relative_volume_error", region)
    return size.where(~(sign < 0), -size)
