"""``mgml report``: the numbers, cases, labels and subsets of the page are those of the evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_cases import DATASET, score, write_evaluation
from report_page import assert_self_contained

from nnunetv2_mgml.modalities import all_subsets, subset_name
from nnunetv2_mgml.presentation.report import content
from nnunetv2_mgml.presentation.report.cases import spread_cases
from nnunetv2_mgml.presentation.report.charts import score_figures
from nnunetv2_mgml.presentation.report.page import Pictures, build_page
from nnunetv2_mgml.presentation.report.sheets import label_names, telling_subsets
from nnunetv2_mgml.scoring.metrics import get_metric
from nnunetv2_mgml.scoring.results import COLUMNS, Evaluation

CASES = ["case_a", "case_b", "case_c"]
ALL_SUBSETS = [subset_name(subset, ("dwi", "adc", "flair")) for subset in all_subsets(3)]


def test_numbers_of_the_page_are_those_of_the_evaluation(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    metric = content.headline_metric(evaluation)
    table = content.subset_table(evaluation, metric)
    assert table.heads == ["DWI", "ADC", "FLAIR", "modalities", "lesion", "core", "mean"]
    for row, subset in zip(table.rows, evaluation.subsets, strict=True):
        assert [cell.text for cell in row[:3]] == ["●" if on else "○" for on in subset]
        expected = [100 * np.mean([score(i, subset, region) for i in range(3)]) for region in ("lesion", "core")]
        assert [row[4].key, row[5].key] == pytest.approx(expected)
        assert row[6].key == pytest.approx(np.mean(expected))
        assert row[4].note == " ± 2.00"
    full = [100 * np.mean([score(i, s, "lesion") for i in range(3)]) for s in evaluation.subsets]
    assert table.foot[0].key == pytest.approx(np.mean(full))
    cases = content.case_table(evaluation, metric)
    assert [row[0].text for row in cases.rows] == CASES
    assert cases.rows[1][1].key == pytest.approx(100 * score(1, (True,) * 3, "lesion"))
    assert cases.rows[0][4].text == "ADC"  # the first of the two worst single modalities
    worth = content.worth_by_region(evaluation, metric)
    assert sum(value.shapley for value in worth["lesion"].values()) == pytest.approx(
        100 * np.mean([score(i, (True,) * 3, "lesion") for i in range(3)])
    )
    headline = content.findings(evaluation, metric)
    assert headline[0].label == "mean Dice with all modalities"
    assert headline[-1].value == "DWI"


def test_missing_values_and_subsets_are_left_out(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES, subsets=[(True, False, False), (True, True, True)])
    metric = content.headline_metric(evaluation)
    assert content.worth_table(evaluation, metric) is None
    evaluation.table.loc[evaluation.table["subset"] == "dwi", "value"] = np.nan
    table = content.subset_table(evaluation, metric)
    assert table.rows[0][-1] == content.Cell("n/a", "")
    assert [f.label for f in content.findings(evaluation, metric)] == [
        "mean Dice with all modalities",
        "mean Dice over 2 subsets",
    ]
    assert_self_contained(build_page(evaluation, "partial", Pictures()))


def uneven(tmp_path: Path, hard: int) -> Evaluation:
    """Dice depends on the case alone; the last ``hard`` of four cases are bad ones and lack FLAIR."""
    evaluation = write_evaluation(tmp_path, ["a", "b", "c", "d"])
    table = evaluation.table[evaluation.table["metric"] == "dice"].copy()
    bad = table["case"].isin(["a", "b", "c", "d"][4 - hard :])
    table["value"] = np.where(bad, 0.3, 0.9)
    return dataclasses.replace(evaluation, table=table[~bad | ~table["subset"].str.contains("flair")])


def test_what_a_modality_is_worth_is_told_over_the_same_cases(tmp_path: Path):
    evaluation = uneven(tmp_path, 2)
    metric = content.headline_metric(evaluation)
    told = "Over the cases with a score from every subset, of 4 in all: lesion 2, core 2."
    for values in content.worth_by_region(evaluation, metric).values():
        for worth in values.values():
            assert worth == pytest.approx((30, 90, 0)), "no modality is worth more than another"
    table = content.worth_table(evaluation, metric)
    assert table is not None
    assert table.caption.endswith(told)
    findings = content.findings(evaluation, metric)
    assert findings[-1].detail.endswith(told)
    assert findings[0].detail == (
        "lesion 90.00, core 90.00; over 2 to 4 cases (every mean over those with a score there, of 4 in all)"
    )
    heatmap, by_number, shapley = score_figures(evaluation, metric)
    assert "over 2 to 4 cases" in heatmap.caption
    assert by_number.caption.endswith(told)
    assert shapley.caption.endswith(told)
    for line in by_number.figure.axes[0].lines:
        np.testing.assert_allclose(line.get_ydata(), 90)


def test_nothing_is_said_of_cases_that_are_all_there(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    metric = content.headline_metric(evaluation)
    assert all("cases with a score" not in f.detail for f in content.findings(evaluation, metric))
    charts = score_figures(evaluation, metric)
    assert charts[0].caption.startswith("Mean Dice (%) over 3 cases, by region")
    assert not any("every subset, of" in chart.caption for chart in charts)


def test_without_a_case_that_has_every_subset_subsets_are_not_compared(tmp_path: Path):
    evaluation = uneven(tmp_path, 4)
    rows = [("e", s, r, "dice", 0.5) for s in ALL_SUBSETS if "flair" in s for r in evaluation.regions]
    evaluation = dataclasses.replace(
        evaluation, table=pd.concat([evaluation.table, pd.DataFrame(rows, columns=list(COLUMNS))])
    )
    metric = content.headline_metric(evaluation)
    assert content.has_all_subsets(evaluation)
    assert content.worth_table(evaluation, metric) is None
    assert [chart.name for chart in score_figures(evaluation, metric)] == ["heatmap"]
    assert_self_contained(build_page(evaluation, "uneven", Pictures()))
    whole = pd.DataFrame([("f", s, "lesion", "dice", 0.5) for s in ALL_SUBSETS], columns=list(COLUMNS))
    evaluation = dataclasses.replace(evaluation, table=pd.concat([evaluation.table, whole]))
    assert list(content.worth_by_region(evaluation, metric)) == ["lesion"]
    assert len(score_figures(evaluation, metric)) == 3


def test_four_brats_modalities_follow_the_papers_row_order(tmp_path: Path):
    dataset = {**DATASET, "channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}
    table = content.subset_table(write_evaluation(tmp_path, CASES, dataset), get_metric("dice"))
    assert table.heads[:4] == ["FLAIR", "T1ce", "T1", "T2"]
    assert [[c.text for c in row[:4]].index("●") for row in table.rows[:4]] == [0, 1, 2, 3]


def test_only_distances_are_not_enough(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    only = evaluation.table[evaluation.table["metric"] == "hd95"]
    with pytest.raises(ValueError, match="more is better"):
        content.headline_metric(type(evaluation)("x", only, evaluation.channels, evaluation.regions, "nan"))


def test_cases_are_spread_from_worst_to_best(tmp_path: Path):
    names = [f"c{i}" for i in range(9)]
    evaluation = write_evaluation(tmp_path, names)
    metric = content.headline_metric(evaluation)
    assert spread_cases(evaluation, metric, 3) == ["c0", "c4", "c8"]
    assert spread_cases(evaluation, metric, 1) == ["c4"]
    assert spread_cases(evaluation, metric, 99) == names


def test_label_names_say_what_a_label_is_in_overlapping_regions(tmp_path: Path):
    evaluation = write_evaluation(tmp_path, CASES)
    assert label_names(evaluation) == {1: "lesion without core", 2: "core"}
    brats = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": [3]}
    four = write_evaluation(tmp_path / "b", CASES, {**DATASET, "labels": brats, "regions_class_order": [1, 2, 3]})
    assert label_names(four) == {1: "WT without TC", 2: "TC without ET", 3: "ET"}


@pytest.mark.parametrize(("modalities", "count"), [(2, 3), (3, 7), (4, 9), (5, 6), (6, 7)])
def test_sheets_show_single_modalities_one_missing_and_all(tmp_path: Path, modalities: int, count: int):
    dataset = {**DATASET, "channel_names": {str(i): f"m{i}" for i in range(modalities)}}
    evaluation = write_evaluation(tmp_path, ["a"], dataset)
    chosen = telling_subsets(evaluation)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen[-1] == (True,) * modalities
    assert chosen[:modalities] == all_subsets(modalities)[:modalities]
