"""What a prediction's probabilities tell of its Dice, fitted on validation cases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import NAMES, REGIONS, synthetic_evaluation

from nnunetv2_mgml.inference.case_quality import SIGNS, SUMMARY_ENDING, estimate, summary
from nnunetv2_mgml.io.files import write_json
from nnunetv2_mgml.scoring.case_quality import FALSE_ALARMS, fit_case_quality, fit_region, rank_correlation

SUBSETS = ["t1", "t2", "t1+t2"]


def draws(cases: int, seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Dice ``(N, 3)`` and signs ``(N, 3, 2)``: every subset has its own level and is as sure as it likes."""
    rng = np.random.default_rng(seed)
    signs = rng.normal(size=(cases, 3, 2)) + np.array([0.0, 3.0, 1.0])[:, None]
    usual = signs - np.array([0.0, 3.0, 1.0])[:, None]
    dice = np.array([0.4, 0.5, 0.6]) + 0.1 * usual[..., 0] + 0.05 * usual[..., 1] + rng.normal(size=(cases, 3)) * noise
    return dice, signs


def entry(signs: np.ndarray) -> dict[str, float | None]:
    return dict(zip(SIGNS, (1 / (1 + np.exp(-signs))).tolist(), strict=True))


def test_the_weights_are_found_and_the_interval_holds_on_new_cases() -> None:
    fitted = fit_region(*draws(60, 0), SUBSETS)
    assert fitted["used"]
    np.testing.assert_allclose(fitted["weights"], [0.1, 0.05], atol=0.02)
    assert fitted["left_out"]["mean_absolute_error"] < 0.5 * fitted["left_out"]["mean_absolute_error_of_subset_mean"]
    assert fitted["left_out"]["correlation"] > 0.9 > fitted["left_out"]["correlation_of_subset_mean"]
    dice, signs = draws(400, 1)
    found = [
        [estimate(fitted, name, entry(signs[case, s])) for s, name in enumerate(SUBSETS)] for case in range(len(dice))
    ]
    low, high, value, doubtful = (
        np.array([[place[what] for place in row] for row in found])  # type: ignore[index]
        for what in ("low", "high", "estimate", "doubtful")
    )
    assert 0.85 < np.mean((dice >= low) & (dice <= high)) < 0.96
    good = dice >= 0.5
    assert np.mean(doubtful[good]) == pytest.approx(FALSE_ALARMS, abs=0.05)
    assert np.mean(doubtful[~good]) > 0.5
    assert value.max() <= fitted["dice_range"][1]


def test_probabilities_that_say_nothing_are_not_used() -> None:
    dice, signs = draws(30, 0)
    fitted = fit_region(dice, np.random.default_rng(1).normal(size=signs.shape), SUBSETS)
    assert fitted["left_out"]["mean_absolute_error"] > 0.95 * fitted["left_out"]["mean_absolute_error_of_subset_mean"]
    shuffled = [
        fit_region(dice, np.random.default_rng(seed).normal(size=signs.shape), SUBSETS)["used"] for seed in range(8)
    ]
    assert not all(shuffled)
    assert not fit_region(dice[:4], signs[:4], SUBSETS)["used"], "too few cases"
    assert fit_region(np.full_like(dice, np.nan), signs, SUBSETS) == {"used": False}


def test_subsets_and_empty_predictions_of_which_little_is_known() -> None:
    dice, signs = draws(12, 0)
    dice[2:, 1] = np.nan  # two cases have T2
    signs[:6, 0] = np.nan
    dice[:6, 0] = [1, 0, 1, 0, 0, 0]
    fitted = fit_region(dice, signs, SUBSETS)
    assert estimate(fitted, "t2", entry(np.zeros(2))) is None
    nothing = dict.fromkeys(SIGNS)
    assert estimate(fitted, "t1", nothing) == {
        "estimate": pytest.approx(1 / 3),
        "low": None,
        "high": None,
        "doubtful": True,
    }
    signs[:4, 0] = 0
    assert estimate(fit_region(dice, signs, SUBSETS), "t1", nothing) is None


def test_a_prediction_below_the_rule_of_the_fit_counts_as_empty(tmp_path: Path) -> None:
    """Cases of 40 voxels were scored as empty; so is the estimate of a new one, however sure it is."""
    evaluation = synthetic_evaluation(cases=20, metrics=["dice"])
    table = evaluation.table.copy()
    region, large = "enhancing tumor", table["case"] >= "case_10"
    rng = np.random.default_rng(0)
    for (case, subset), rows in table[table["region"] == region].groupby(["case", "subset"]):
        sure = rng.uniform(0.7, 0.95)
        told = summary(1000, 1000 * sure, 1000) if case >= "case_10" else summary(40, 38, 39)
        write_json(tmp_path / str(subset) / f"{case}{SUMMARY_ENDING}", dict.fromkeys(REGIONS, told))
        table.loc[rows.index, "value"] = sure - 0.05
    table.loc[(table["region"] == region) & ~large, "value"] = 0.0
    info = dataclasses.replace(evaluation.info, min_region_voxels={region: 500})
    fitted = fit_case_quality(dataclasses.replace(evaluation, table=table, info=info), tmp_path)
    assert fitted is not None
    one = fitted["regions"][region]
    assert one["used"]
    assert one["min_region_voxels"] == 500
    assert estimate(one, "t1", summary(40, 38, 39)) == {"estimate": 0.0, "low": None, "high": None, "doubtful": True}
    assert estimate(one, "t1", summary(499, 400, 450)) == estimate(one, "t1", summary(0, 0, 0))
    found = estimate(one, "t1", summary(500, 400, 450))
    assert found is not None
    assert found["estimate"] > 0.6


def test_a_mask_that_is_there_on_the_image_grid_only_is_neither_empty_nor_used() -> None:
    dice, signs = draws(12, 0)
    fitted = fit_region(dice, signs, SUBSETS)
    assert estimate({**fitted, "empty": 0.25}, "t1", {"voxels": 3, **dict.fromkeys(SIGNS)}) is None


def test_rank_correlation() -> None:
    one, two = np.array([1.0, 2, 2, 4]), np.array([10.0, 20, 20, 15])
    assert rank_correlation(one, two) == pytest.approx(1 / 3)
    assert rank_correlation(one, np.ones(4)) is None


def write_summaries(folder: Path, cases: int, voxels: int = 9) -> None:
    rng = np.random.default_rng(0)
    for case in range(cases):
        for subset in NAMES:
            (folder / subset).mkdir(parents=True, exist_ok=True)
            content = {region: {"voxels": voxels, **entry(rng.normal(size=2))} for region in REGIONS}
            write_json(folder / subset / f"case_{case:02d}{SUMMARY_ENDING}", content)


def test_the_fit_reads_what_lies_beside_label_maps(tmp_path: Path) -> None:
    evaluation = synthetic_evaluation(cases=8)
    assert fit_case_quality(evaluation, tmp_path) is None, "an evaluation of before"
    write_summaries(tmp_path, 4)
    assert fit_case_quality(evaluation, tmp_path) is None
    write_summaries(tmp_path, 6)
    fitted = fit_case_quality(evaluation, tmp_path)
    assert fitted is not None
    assert fitted["cases"] == 6
    assert set(fitted["regions"]) == set(REGIONS)
    assert set(fitted["regions"]["tumor core"]["subsets"]) == set(NAMES)
    info = dataclasses.replace(evaluation.info, min_region_voxels={"enhancing tumor": 10})
    rule = fit_case_quality(dataclasses.replace(evaluation, info=info), tmp_path)
    assert rule is not None
    assert rule["regions"]["enhancing tumor"] == {"used": False, "min_region_voxels": 10}, "all are empty"
    assert rule["regions"]["tumor core"] == fitted["regions"]["tumor core"]
