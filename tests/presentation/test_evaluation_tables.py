"""Results on disk and tables in the layout of the paper's Table 3."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pandas as pd
import pytest
from evaluation_cases import CHANNELS, NAMES, synthetic_evaluation

from nnunetv2_mgml.presentation.tables import (
    latex_table,
    markdown_table,
    overview_grid,
    summary_text,
    table_grid,
    write_tables,
)
from nnunetv2_mgml.scoring.derived import ALL, inversions
from nnunetv2_mgml.scoring.info import EvaluationInfo, Source
from nnunetv2_mgml.scoring.results import AVERAGE, common_subsets, load_evaluation, save_evaluation, tidy_table

PAPER_COLUMNS = {  # rows of Table 3's head, read off the paper
    "FLAIR": "✓ ✗ ✗ ✗ ✓ ✓ ✓ ✗ ✗ ✗ ✓ ✓ ✓ ✗ ✓",
    "T1ce": "✗ ✓ ✗ ✗ ✓ ✗ ✗ ✓ ✓ ✗ ✓ ✓ ✗ ✓ ✓",
    "T1": "✗ ✗ ✓ ✗ ✗ ✓ ✗ ✓ ✗ ✓ ✓ ✗ ✓ ✓ ✓",
    "T2": "✗ ✗ ✗ ✓ ✗ ✗ ✓ ✗ ✓ ✓ ✗ ✓ ✓ ✓ ✓",
}


def cells(markdown: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]


class TestTableLayout:
    evaluation = synthetic_evaluation()
    rows = cells(markdown_table(table_grid([evaluation], "dice")))

    def test_head_is_the_papers(self):
        head = [self.rows[0], *self.rows[2:5]]
        assert {row[1]: " ".join(row[2:17]) for row in head} == PAPER_COLUMNS
        assert [row[17] for row in head] == [AVERAGE, "", "", ""]

    def test_regions_are_in_the_papers_order(self):
        assert [(row[0], row[1]) for row in self.rows[5:]] == [("WT", "A"), ("TC", "A"), ("ET", "A")]

    def test_cells_belong_to_their_column(self):
        order = [
            "flair",
            "t1ce",
            "t1",
            "t2",
            "t1ce+flair",
            "t1+flair",
            "t2+flair",
            "t1+t1ce",
            "t1ce+t2",
            "t1+t2",
            "t1+t1ce+flair",
            "t1ce+t2+flair",
            "t1+t2+flair",
            "t1+t1ce+t2",
            "t1+t1ce+t2+flair",
        ]
        table = self.evaluation.table
        for column, name in enumerate(order):
            values = table[(table.subset == name) & (table.region == "tumor core") & (table.metric == "dice")].value
            assert self.rows[6][2 + column] == f"{100 * values.mean():.2f} ± {100 * values.std(ddof=1):.2f}"

    def test_average_is_the_mean_of_the_subsets_means(self):
        means = [float(cell.split(" ± ")[0]) for cell in self.rows[5][2:17]]
        assert float(self.rows[5][17].split(" ± ")[0]) == pytest.approx(np.mean(means), abs=0.011)

    def test_caption_names_policy_cases_and_unit(self):
        text = markdown_table(table_grid([self.evaluation], "hd95"))
        assert "HD95 (mm)" in text
        assert "12 cases" in text
        assert "policy 'brats': both empty: Dice" in text

    def test_order_follows_names_not_channel_numbers(self):
        shuffled = ("flair", "t2", "t1", "t1ce")
        rows = cells(markdown_table(table_grid([synthetic_evaluation(channels=shuffled)], "dice")))
        assert {row[1]: " ".join(row[2:17]) for row in [rows[0], *rows[2:5]]} == PAPER_COLUMNS

    def test_several_methods_are_stacked_per_region(self):
        both = [self.evaluation, synthetic_evaluation("B_1", seed=3)]
        rows = cells(markdown_table(table_grid(both, "dice")))
        assert [row[:2] for row in rows[5:]] == [[r, m] for r in ("WT", "TC", "ET") for m in ("A", "B_1")]

    def test_latex(self):
        text = latex_table(table_grid([self.evaluation, synthetic_evaluation("B_1 & co", seed=3)], "dice"))
        body = [line for line in text.splitlines() if line.endswith(r"\\")]
        assert len(body) == 4 + 6
        assert all(line.count(" & ") == 17 for line in body if "B" not in line)
        assert body[0].startswith(r" & FLAIR & $\checkmark$ & $\times$")
        assert body[5].startswith(r" & B\_1 \& co & ")
        assert text.count("{") == text.count("}")

    def test_few_modalities_and_one_region(self):
        evaluation = synthetic_evaluation(channels=("dwi", "adc", "flair"))
        rows = cells(markdown_table(table_grid([evaluation], "dice")))
        assert [row[1] for row in [rows[0], *rows[2:4]]] == ["DWI", "ADC", "FLAIR"]
        assert " ".join(rows[0][2:9]) == "✓ ✗ ✗ ✓ ✓ ✗ ✓"

    def test_beyond_fifteen_subsets_the_table_is_turned(self):
        evaluation = synthetic_evaluation(channels=("a", "b", "c", "d", "e"), cases=2)
        rows = cells(markdown_table(table_grid([evaluation], "dice")))
        assert rows[0] == [""] * 5 + ["WT", "TC", "ET"]
        assert rows[2][:5] == ["A", "B", "C", "D", "E"]
        assert len(rows) == 3 + 31 + 1
        assert rows[3][:5] == ["✓", "✗", "✗", "✗", "✗"]
        assert rows[-1][0] == AVERAGE

    def test_missing_values_are_counted(self):
        table = self.evaluation.table.copy()
        table.loc[(table.subset == "t1") & (table.region == "enhancing tumor") & (table.case < "case_05"), "value"] = (
            math.nan
        )
        rows = cells(
            markdown_table(table_grid([dataclasses.replace(self.evaluation, table=table, policy="nan")], "dice"))
        )
        assert [row[1] for row in rows[5:]] == ["A", "A", "A", "A (n)"]
        assert rows[-1][4] == "7"
        assert rows[-1][3] == "12"
        assert rows[-1][-1] == "12"  # of the average, over the subsets a case has
        text = summary_text(dataclasses.replace(self.evaluation, table=table, policy="nan"))
        [line] = [line for line in text.splitlines() if line.startswith("t1 ")]
        assert line.endswith(" (7)")
        assert line.count(" (12)") == 2
        assert "In brackets: cases with a value." in text
        assert "(12)" not in summary_text(self.evaluation)

    def test_subset_without_values_has_a_dash(self):
        table = self.evaluation.table.copy()
        table.loc[table.subset == "t1", "value"] = math.nan
        grid = table_grid([dataclasses.replace(self.evaluation, table=table)], "dice")
        assert cells(markdown_table(grid))[5][4] == "-"

    def test_only_shared_subsets_are_put_side_by_side(self):
        few = synthetic_evaluation("B").restricted(["t1", "flair"])
        assert [e.subset_names for e in common_subsets([self.evaluation, few])] == [["flair", "t1"]] * 2
        caption = table_grid([self.evaluation, few], "dice").caption
        assert "2 of 15 evaluated" in caption

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            (synthetic_evaluation("B", policy="nan"), "differ in policy"),
            (synthetic_evaluation("B", channels=("dwi", "adc")), "differ in channels"),
        ],
    )
    def test_other_evaluations_cannot_be_put_side_by_side(self, other, message):
        with pytest.raises(ValueError, match=message):
            table_grid([self.evaluation, other], "dice")


class TestFiles:
    def test_round_trip(self, tmp_path):
        evaluation = synthetic_evaluation()
        evaluation.table.loc[[0, 7], "value"] = math.nan
        evaluation = dataclasses.replace(
            evaluation, info=EvaluationInfo(source=Source("validation"), command=("mgml",))
        )
        save_evaluation(evaluation, tmp_path)
        again = load_evaluation(tmp_path)
        pd.testing.assert_frame_equal(again.table, evaluation.table, check_exact=True)
        assert dataclasses.replace(again, table=None) == dataclasses.replace(evaluation, table=None)
        assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 12 * 15 * 3 * 2

    def test_case_names_stay_text(self, tmp_path):
        evaluation = synthetic_evaluation(cases=2)
        evaluation.table["case"] = evaluation.table["case"].map({"case_00": "007", "case_01": "nan"})
        save_evaluation(evaluation, tmp_path)
        assert load_evaluation(tmp_path).cases == ["007", "nan"]

    def test_summary_is_strict_json_with_mean_sd_n(self, tmp_path):
        evaluation = synthetic_evaluation()
        evaluation.table.loc[evaluation.table.subset == "t2", "value"] = math.nan
        save_evaluation(evaluation, tmp_path)

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
        values = evaluation.values("dice", "whole tumor")["t1"]
        entry = summary["results"]["dice"]["whole tumor"]["t1"]
        assert entry == {"mean": pytest.approx(values.mean()), "sd": pytest.approx(values.std(ddof=1)), "n": 12}
        assert summary["results"]["dice"]["whole tumor"]["t2"] == {"mean": None, "sd": None, "n": 0}
        assert summary["policy"]["name"] == "brats"
        assert summary["number_of_cases"] == 12
        assert summary["subsets"][0] == "flair"

    def test_summary_and_tables_tell_inversions_and_volume_bias(self, tmp_path):
        evaluation = synthetic_evaluation(metrics=["dice", "absolute_volume_error", "relative_volume_error"])
        save_evaluation(evaluation, tmp_path)
        summary = json.loads((tmp_path / "summary.json").read_text())
        found = inversions(evaluation)
        assert summary["inversions"]["regions"]["tumor core"] == {"share": found["tumor core"].share, "n": 12 * 50}
        assert summary["inversions"]["regions"]["all"]["n"] == 3 * 12 * 50
        per_case = evaluation.values("absolute_volume_error", "tumor core").mean(axis=1)
        assert summary["volume_bias_ml"]["tumor core"]["mean"] == pytest.approx(per_case.mean())
        few = dataclasses.replace(evaluation.restricted(["t1"]), name="B")
        write_tables([evaluation], tmp_path)
        rows = cells((tmp_path / "table.md").read_text())[-2:]
        assert rows[0] == ["inversions (%)", "A", *(f"{100 * entry.share:.1f}" for entry in found.values())]
        assert rows[1][:2] == ["volume bias (ml)", "A"]
        assert f"inversions: {100 * found[ALL].share:.1f} % (WT" in summary_text(evaluation)
        assert [row[0] for row in overview_grid([few]).body] == ["volume bias (ml)"]
        assert overview_grid([synthetic_evaluation(metrics=["hd95"])]) is None

    def test_damaged_folder_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"summary\.json"):
            load_evaluation(tmp_path)
        save_evaluation(synthetic_evaluation(), tmp_path)
        (tmp_path / "results.csv").write_text("a,b\n1,2\n")
        with pytest.raises(ValueError, match="must have the columns case, subset"):
            load_evaluation(tmp_path)

    def test_damaged_rows_are_named(self, tmp_path):
        save_evaluation(synthetic_evaluation(cases=2), tmp_path)
        header, first, *rest = (tmp_path / "results.csv").read_text().splitlines()
        start = first.rpartition(",")[0]
        for row, message in (
            (f"{start},about 0.8", r"has a value that is no number \(.*about 0\.8"),
            (f"{start},0.8\n{start},0.7", r"results\.csv has two values for case_0"),
            (f"{start},0.8\n{start.replace('whole tumor', 'brain')},0.7", "has the region brain, which summary.json"),
        ):
            (tmp_path / "results.csv").write_text("\n".join([header, row, *rest]) + "\n")
            with pytest.raises(ValueError, match=message):
                load_evaluation(tmp_path)

    def test_both_tables_hold_every_metric(self, tmp_path):
        write_tables([synthetic_evaluation()], tmp_path)
        assert (tmp_path / "table.md").read_text().count("mean ± standard deviation") == 2
        assert (tmp_path / "table.tex").read_text().count(r"\begin{table*}") == 3  # the overview is the last


class TestEvaluation:
    def test_tidy_table_is_ordered_and_skips_what_a_case_lacks(self):
        scores = {"b": {"t1": {"r": {"dice": 0.5}}}, "a": {"t2": {"r": {"dice": 1}}, "t1": {"r": {"dice": 0.25}}}}
        table = tidy_table(scores, ["t1", "t2"])
        assert table.values.tolist() == [
            ["a", "t1", "r", "dice", 0.25],
            ["a", "t2", "r", "dice", 1.0],
            ["b", "t1", "r", "dice", 0.5],
        ]

    def test_values_are_one_row_per_case(self):
        evaluation = synthetic_evaluation()
        values = evaluation.values("hd95", "tumor core")
        assert values.shape == (12, 15)
        assert set(values.columns) == set(NAMES)
        with pytest.raises(ValueError, match=r"no metric 'iou'\. It has: dice, hd95"):
            evaluation.values("iou", "tumor core")

    def test_spread_of_the_average_is_over_cases(self):
        evaluation = synthetic_evaluation()
        per_case = evaluation.values("dice", "whole tumor").mean(axis=1)
        average = evaluation.summary("dice", "whole tumor")[AVERAGE]
        assert average == {"mean": pytest.approx(per_case.mean()), "sd": pytest.approx(per_case.std(ddof=1)), "n": 12}
        assert evaluation.channels == CHANNELS
