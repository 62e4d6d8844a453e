"""Fit, on validation cases, what a prediction's own probabilities tell of its Dice (`inference.case_quality`).

Per region one line for all subsets: how far a case's Dice lies from its subset's mean, from how far the log-odds of its
expected precision and sensitivity lie from theirs (least squares with a little shrinkage). Intervals, the bound below
which a prediction is doubtful, and the decision whether the estimate is used at all come from the same fit with each
case left out in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnunetv2_mgml.inference.case_quality import SIGNS, SMALLEST, SUMMARY_ENDING, counts_as_empty, signs_of
from nnunetv2_mgml.inference.subset_quality import RELIABILITY_BOUND
from nnunetv2_mgml.io.files import read_json
from nnunetv2_mgml.scoring.results import Evaluation

FEWEST_CASES = 5
LEVEL = 0.9
"""Share of left-out validation cases inside the interval."""
FALSE_ALARMS = 0.05
_SHRINKAGE = 1 / 15
_FEWEST_OF_SUBSET = 3
_FEWEST_OF_GROUP = 20

Values = NDArray[np.float64]


def fit_case_quality(evaluation: Evaluation, predictions: Path) -> dict[str, Any] | None:
    """Fit from an evaluation and the summaries beside its label maps.

    Args:
        evaluation: with Dice.
        predictions: its folder of label maps, ``<subset>/<case>.probabilities.json`` among them.

    Returns:
        JSON-ready content of ``case_quality``; None for fewer than `FEWEST_CASES` cases with summaries.
    """
    found: dict[tuple[str, str], Any] = {}
    for subset in evaluation.subset_names:
        for case in evaluation.cases:
            file = predictions / subset / f"{case}{SUMMARY_ENDING}"
            if file.is_file():
                found[case, subset] = read_json(file)
    cases = sorted({case for case, _ in found})
    if len(cases) < FEWEST_CASES:
        return None
    subsets = evaluation.subset_names
    smallest = evaluation.info.min_region_voxels
    regions = {}
    for region in evaluation.region_names:
        table = evaluation.values("dice", region).reindex(index=cases)
        signs = np.full((len(cases), len(subsets), len(SIGNS)), np.nan)
        predicted = np.zeros(signs.shape[:2], bool)
        for (case, subset), entries in found.items():
            place = cases.index(case), subsets.index(subset)
            empty = counts_as_empty(entries[region], smallest.get(region, 1))
            if not empty:
                signs[place] = signs_of(entries[region])
            # a mask that is there on the image's grid only has no signs, and is not empty either
            predicted[place] = empty or np.isfinite(signs[place]).all()
        dice = np.where(predicted, table.to_numpy(np.float64), np.nan)
        regions[region] = {**fit_region(dice, signs, subsets), SMALLEST: smallest.get(region)}
    return {"interval": LEVEL, "false_alarms": FALSE_ALARMS, "cases": len(cases), "regions": regions}


def fit_region(dice: Values, signs: Values, subsets: Sequence[str]) -> dict[str, Any]:
    """Fit one region.

    Args:
        dice: ``(N, S)``, fractions, NaN where there is none.
        signs: ``(N, S, 2)``, see `signs_of`; NaN where the predicted mask is empty, or counts as empty.
        subsets: ``S`` names.

    Returns:
        What `estimate` reads, and ``left_out``: how estimates of left-out cases compare with the subset's mean.
    """
    fitted = _fit(dice, signs, subsets)
    estimated, means = np.full(dice.shape, np.nan), np.full(dice.shape, np.nan)
    for case in range(len(dice)):
        others = np.arange(len(dice)) != case
        without = _fit(dice[others], signs[others], subsets)
        if without is not None:
            for column, subset in enumerate(subsets):
                estimated[case, column] = moved_dice(without, subset, signs[case, column])
                means[case, column] = without["subsets"].get(subset, {}).get("dice", np.nan)
    seen = np.isfinite(estimated) & np.isfinite(dice)
    if fitted is None or not seen.any():
        return {"used": False}
    _add_intervals(fitted, np.where(seen, dice - np.clip(estimated, *fitted["dice_range"]), np.nan), subsets)
    error, rival = (np.abs(values - dice)[seen] for values in (np.clip(estimated, *fitted["dice_range"]), means))
    good = seen & (dice >= RELIABILITY_BOUND)
    bad = seen & (dice < RELIABILITY_BOUND)
    return {
        "used": bool(error.mean() < rival.mean()),
        **fitted,
        "doubtful_below": _bound(estimated[good], estimated[bad]),
        "empty": _of_empty(dice, signs),
        "left_out": {
            "values": int(seen.sum()),
            "mean_absolute_error": float(error.mean()),
            "mean_absolute_error_of_subset_mean": float(rival.mean()),
            "correlation": rank_correlation(estimated[seen], dice[seen]),
            "correlation_of_subset_mean": rank_correlation(means[seen], dice[seen]),
        },
    }


def rank_correlation(one: Values, two: Values) -> float | None:
    """Return Spearman's correlation of two vectors; None where one of them is constant."""
    from scipy.stats import rankdata  # slow to import

    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(two) == 0:
        return None
    return float(np.corrcoef(rankdata(one), rankdata(two))[0, 1])


def _fit(dice: Values, signs: Values, subsets: Sequence[str]) -> dict[str, Any] | None:
    used = np.isfinite(dice) & np.isfinite(signs).all(-1)
    used &= used.sum(0) >= _FEWEST_OF_SUBSET
    columns = np.flatnonzero(used.any(0))
    if len(columns) == 0 or used.any(1).sum() < FEWEST_CASES - 1:
        return None
    y, x, known = [], [], {}
    for column in columns:
        rows = used[:, column]
        usual, mean = signs[rows, column].mean(0), dice[rows, column].mean()
        known[subsets[column]] = {"dice": float(mean), "signs": usual.tolist()}
        y.append(dice[rows, column] - mean)
        x.append(signs[rows, column] - usual)
    target, design = np.concatenate(y), np.concatenate(x)
    scale = design.std(0) + 1e-9
    design = design / scale
    shrinkage = _SHRINKAGE * len(design) * np.eye(design.shape[1])
    weights = np.linalg.solve(design.T @ design + shrinkage, design.T @ target) / scale
    seen = signs[used]
    return {
        "dice_range": [float(dice[used].min()), float(dice[used].max())],
        "weights": weights.tolist(),
        "range": np.stack([seen.min(0), seen.max(0)], 1).tolist(),
        "subsets": known,
    }


def moved_dice(fitted: Mapping[str, Any], subset: str, signs: Values) -> float:
    """Return the estimate before it is cut to what was seen; NaN where there is none."""
    known = fitted["subsets"].get(subset)
    if known is None or not np.isfinite(signs).all():
        return float("nan")
    low, high = np.array(fitted["range"]).T
    return float(known["dice"] + (np.clip(signs, low, high) - known["signs"]) @ np.array(fitted["weights"]))


def _add_intervals(fitted: dict[str, Any], residuals: Values, subsets: Sequence[str]) -> None:
    """Give every subset the interval of its group: the subsets of as many modalities, or all where those are few."""
    sizes = np.array([subset.count("+") for subset in subsets])
    for subset, known in fitted["subsets"].items():
        group = residuals[:, sizes == subset.count("+")]
        values = group[np.isfinite(group)]
        if len(values) < _FEWEST_OF_GROUP:
            values = residuals[np.isfinite(residuals)]
        tail = min(0.5, (1 - LEVEL) / 2)
        # conformal: one more value than there are, beyond the end
        share = min(1.0, (1 - tail) * (len(values) + 1) / len(values))
        known["low"] = -float(np.quantile(-values, share, method="higher"))
        known["high"] = float(np.quantile(values, share, method="higher"))


def _bound(of_good: Values, of_bad: Values) -> float:
    """Return below which estimate a prediction is doubtful: 5 % of the good ones are, where there are bad ones."""
    if len(of_bad) < FEWEST_CASES or len(of_good) < FEWEST_CASES:
        return RELIABILITY_BOUND
    return float(np.quantile(of_good, FALSE_ALARMS))


def _of_empty(dice: Values, signs: Values) -> float | None:
    """Return the mean Dice of empty predictions, where there are enough."""
    empty = np.isfinite(dice) & ~np.isfinite(signs).all(-1)
    if empty.sum() < FEWEST_CASES or empty.any(1).sum() < _FEWEST_OF_SUBSET:
        return None
    return float(dice[empty].mean())
