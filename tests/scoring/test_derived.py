"""Inversions between nested subsets and volume bias, against slow references."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_cases import CHANNELS, DATASET_JSON, REGIONS, random_labels, synthetic_evaluation
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_mgml.modalities import parse_subset
from nnunetv2_mgml.scoring.cases import ScoringSettings, score_arrays
from nnunetv2_mgml.scoring.derived import ALL, inversions, inversions_of_cases, name_of_all, nested_pairs, volume_bias
from nnunetv2_mgml.scoring.regions import label_set
from nnunetv2_mgml.scoring.results import COLUMNS, Evaluation
from nnunetv2_mgml.scoring.statistics import compare_inversions

ORDER = ("whole tumor", "tumor core", "enhancing tumor")


def slow_inversions(evaluation: Evaluation, region: str | None) -> tuple[int, int]:
    """Every (patient, pair of subsets, region), one by one, with sets of modality names."""
    scores = {(r.case, r.subset, r.region): r.value for r in evaluation.table.itertuples() if r.metric == "dice"}
    inverted = count = 0
    for (case, small, name), low in scores.items():
        for large in evaluation.subset_names:
            high = scores.get((case, large, name), math.nan)
            nested = region in (None, name) and set(small.split("+")) < set(large.split("+"))
            if nested and not math.isnan(low) and not math.isnan(high):
                count += 1
                inverted += round(low - high, 6) > 0.01
    return inverted, count


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 0.6), st.integers(2, 4))
def test_inversions_against_counting_one_by_one(seed: int, holes: float, modalities: int) -> None:
    evaluation = synthetic_evaluation(cases=3, seed=seed, metrics=["dice"], channels=CHANNELS[:modalities])
    rng = np.random.default_rng(seed)
    table = evaluation.table.assign(value=evaluation.table.value.round(2))  # many differences of exactly one point
    table.loc[rng.random(len(table)) < holes, "value"] = math.nan
    table = table[rng.random(len(table)) > holes / 3]  # cases that lack a subset
    if table.empty:
        return
    evaluation = dataclasses.replace(evaluation, table=table)
    found = inversions(evaluation)
    assert list(found) == [*ORDER, ALL]
    for region in (*ORDER, None):
        inverted, count = slow_inversions(evaluation, region)
        share, n = found[region or ALL]
        assert n == count
        assert share == pytest.approx(inverted / count) if count else math.isnan(share)
    per_case = inversions_of_cases(evaluation)
    assert per_case[["inverted", "n"]].sum().tolist() == list(slow_inversions(evaluation, None))


def test_worked_example() -> None:
    """t1 to t1+t2 loses two points, t2 to t1+t2 exactly one: one of two pairs is inverted."""
    rows = [("a", name, "lesion", "dice", value) for name, value in (("t1", 0.82), ("t2", 0.81), ("t1+t2", 0.80))]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    evaluation = Evaluation("A", table, ("t1", "t2"), {"lesion": (1,)}, "nan")
    assert inversions(evaluation) == {"lesion": (0.5, 2), ALL: (0.5, 2)}
    assert inversions(evaluation, margin=0.03)[ALL].share == 0
    assert math.isnan(inversions(evaluation.restricted(["t1"]))[ALL].share)
    with pytest.raises(ValueError, match="has no metric 'hd95'"):
        inversions(evaluation, "hd95")


def test_a_region_may_be_called_all() -> None:
    """One region loses two points, the other none: half of the pairs over both."""
    values = {"all": (0.82, 0.80), "et 1": (0.7, 0.8)}
    rows = [
        ("a", s, region, "dice", v)
        for region, pair in values.items()
        for s, v in zip(("t1", "t1+t2"), pair, strict=True)
    ]
    regions = {"all": (1, 2), "et 1": (2,)}
    evaluation = Evaluation("A", pd.DataFrame(rows, columns=list(COLUMNS)), ("t1", "t2"), regions, "nan")
    assert inversions(evaluation) == {"all": (1.0, 1), "et 1": (0.0, 1), ALL: (0.5, 2)}
    table = compare_inversions([evaluation, dataclasses.replace(evaluation, name="B")])
    assert table[["region", "method_mean"]].to_numpy().tolist() == [["all", 1.0], ["et 1", 0.0], [ALL, 0.5]]


def test_what_all_regions_are_called_beside_others() -> None:
    assert name_of_all(["WT"]) == "all regions"
    assert name_of_all(["all", "(all)"], "all") == "((all))"


def test_four_modalities_have_50_nested_pairs() -> None:
    subsets = [parse_subset(name, CHANNELS) for name in synthetic_evaluation(cases=1).subset_names]
    assert len(nested_pairs(subsets)) == 3**4 - 2**4 - (2**4 - 1)  # A below B, without the empty A and without A = B


@pytest.mark.parametrize("policy", ["brats", "nan"])
def test_volume_bias_is_the_signed_difference_of_volumes(policy: str, tmp_path: Path) -> None:
    spacing = (1.0, 2.0, 2.5)
    scoring = ScoringSettings(label_set(DATASET_JSON), policy, ("absolute_volume_error", "relative_volume_error"))
    rows, expected = [], {}
    for case, (reference, prediction) in enumerate([(3, 3), (3, 2), (3, 0), (2, 3), (0, 3), (0, 0), (1, 3)]):
        truth, answer = random_labels(case, highest=reference), random_labels(case + 50, highest=prediction)
        for region, metrics in score_arrays(truth, answer, spacing, scoring).items():
            rows += [(f"case_{case}", "t1", region, metric, value) for metric, value in metrics.items()]
            voxels = np.isin(answer, REGIONS[region]).sum() - int(np.isin(truth, REGIONS[region]).sum())
            expected[f"case_{case}", region] = voxels * 5.0 / 1000
    evaluation = Evaluation("A", pd.DataFrame(rows, columns=list(COLUMNS)), CHANNELS, REGIONS, policy)
    for (case, region), bias in expected.items():
        assert volume_bias(evaluation, region).loc[case, "t1"] == pytest.approx(bias)
