"""Means of several evaluations over the same regions and subsets, so that none gains by what it has no value for."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from nnunetv2_mgml.scoring.results import Evaluation

_Values = dict[str, dict[str, float]]
"""Region -> subset -> mean Dice."""


def dice_means(candidates: Mapping[str, Evaluation]) -> tuple[dict[str, dict[str, float]], dict[str, list[str]]]:
    """Return the mean Dice of every candidate over what all of them have a value for, and what that leaves out.

    Args:
        candidates: name -> evaluation, all of the same regions and subsets, with Dice.

    Returns:
        Name -> ``all`` (mean over subsets), ``complete`` and ``single`` (one modality), as a fraction and over regions,
        NaN where nothing of the kind is left; and region -> subsets that are left out.

    Raises:
        ValueError: nothing is left.
    """
    values = {name: _values(evaluation) for name, evaluation in candidates.items()}
    num_modalities = len(next(iter(candidates.values())).channels)
    left_out = _left_out(values)
    return {name: _means(_without(own, left_out), num_modalities) for name, own in values.items()}, left_out


def _values(evaluation: Evaluation) -> _Values:
    summaries = {region: evaluation.summary("dice", region) for region in evaluation.region_names}
    return {
        region: {name: summary[name]["mean"] for name in evaluation.subset_names}
        for region, summary in summaries.items()
    }


def _left_out(candidates: Mapping[str, _Values]) -> dict[str, list[str]]:
    first = next(iter(candidates.values()))
    absent = {
        region: [name for name in subsets if any(math.isnan(own[region][name]) for own in candidates.values())]
        for region, subsets in first.items()
    }
    if all(len(absent[region]) == len(subsets) for region, subsets in first.items()):
        raise ValueError(
            f"There is no region and no subset of which every candidate ({', '.join(candidates)}) has a Dice: cases "
            f"without a label have none by this policy. Evaluate cases with labels, or with --policy brats."
        )
    return {region: names for region, names in absent.items() if names}


def _without(values: _Values, left_out: Mapping[str, Sequence[str]]) -> _Values:
    return {
        region: {name: value for name, value in subsets.items() if name not in left_out.get(region, ())}
        for region, subsets in values.items()
    }


def _means(values: _Values, num_modalities: int) -> dict[str, float]:
    """Return the mean over regions of the mean over subsets: all, complete and single ones."""
    wanted = {"all": range(1, num_modalities + 1), "complete": (num_modalities,), "single": (1,)}
    return {what: _mean_of_kind(values, sizes) for what, sizes in wanted.items()}


def _mean_of_kind(values: _Values, sizes: Collection[int]) -> float:
    rows = [[v for name, v in subsets.items() if len(name.split("+")) in sizes] for subsets in values.values()]
    means = [sum(row) / len(row) for row in rows if row]
    return sum(means) / len(means) if means else math.nan
