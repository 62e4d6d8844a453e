"""Regions whose names look alike stay apart in every table, figure and file; one may be called ``all``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from report_cases import DATASET, write_evaluation

from nnunetv2_mgml.commands import main as cli
from nnunetv2_mgml.presentation.preview import quality_lines
from nnunetv2_mgml.presentation.report import content
from nnunetv2_mgml.presentation.report.charts import score_figures
from nnunetv2_mgml.presentation.report.page import viewer_data
from nnunetv2_mgml.presentation.report.sheets import names_of_values
from nnunetv2_mgml.presentation.tables import overview_grid, summary_text, table_grid
from nnunetv2_mgml.scoring.derived import inversions
from nnunetv2_mgml.scoring.results import Evaluation, load_evaluation, save_evaluation

ALIKE = ["all", "et 1", "et 2", "3 ET", "enhancing tumor"]
"""All but the first were called ET."""
TITLES = ["all", "et 1", "et 2", "3 ET", "ET"]


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    """Dice of a region is 0.1 times its place, plus 0.4; of ``all`` it falls with every modality more."""
    labels = {"background": 0, "all": [1, 2, 3, 4], **{name: [number] for number, name in enumerate(ALIKE[1:], 1)}}
    dataset = {**DATASET, "labels": labels, "regions_class_order": [1, 2, 3, 4, 4]}
    made = write_evaluation(tmp_path / "A", ["a", "b"], dataset)
    table = made.table[made.table["metric"] == "dice"].copy()
    table["value"] = 0.4 + 0.1 * table["region"].map(ALIKE.index)
    falling = table["region"] == "all"
    table.loc[falling, "value"] -= 0.05 * table["subset"].str.count(r"\+")[falling]
    save_evaluation(dataclasses.replace(made, table=table), tmp_path / "A")
    return load_evaluation(tmp_path / "A")


def test_every_region_has_its_own_place_on_the_page(evaluation: Evaluation) -> None:
    metric = content.headline_metric(evaluation)
    assert content.subset_table(evaluation, metric).heads[4:-1] == TITLES
    worth = content.worth_by_region(evaluation, metric)
    assert list(worth) == ALIKE
    assert worth["et 2"]["DWI"].alone == pytest.approx(60)
    table = content.worth_table(evaluation, metric)
    assert table is not None
    assert [row[0].text for row in table.rows[::3]] == TITLES
    assert len(score_figures(evaluation, metric)[2].figure.axes[0].get_xticks()) == len(TITLES)
    data = viewer_data(evaluation, metric, [{"name": "a"}], {}, {})
    assert [data["regionTitles"][region] for region in data["regions"]] == TITLES
    assert data["cases"][0]["scores"]["dwi"] == dict(
        zip(ALIKE, ["40.00", "50.00", "60.00", "70.00", "80.00"], strict=True)
    )
    assert names_of_values({"et 1": [1], "et 2": [2]}) == {1: "et 1", 2: "et 2"}


def test_tables_and_terminal(evaluation: Evaluation) -> None:
    assert [row[0] for row in table_grid([evaluation], "dice").body] == TITLES
    lines = summary_text(evaluation).splitlines()
    assert lines[1].split("  ")[-1].strip() == "ET"
    long = dataclasses.replace(evaluation, regions={"peritumoral a": (1,), "peritumoral b": (2,)})
    long.table["region"] = long.table["region"].map(dict(zip(ALIKE, [*long.regions] * 3, strict=False)))
    table = long.table.drop_duplicates(["case", "subset", "region"])
    head, first = summary_text(dataclasses.replace(long, table=table)).splitlines()[1:3]
    assert head.split() == ["peritumoral", "a", "peritumoral", "b"]
    assert len(head) == len(first)


def test_a_region_called_all_is_not_all_of_them(evaluation: Evaluation, tmp_path: Path, capsys) -> None:
    pairs = 2 * 12  # two cases; 12 nested pairs of seven subsets
    assert inversions(evaluation)["all"] == (1.0, pairs)
    shares = json.loads((tmp_path / "A" / "summary.json").read_text())["inversions"]["regions"]
    assert shares["all"] == {"share": 1.0, "n": pairs}
    assert shares["(all)"] == {"share": 0.2, "n": 5 * pairs}
    grid = overview_grid([evaluation])
    assert grid is not None
    assert grid.head == [["", "", *TITLES, "all regions"]]
    assert grid.body[0][2:] == ["100.0", "0.0", "0.0", "0.0", "0.0", "20.0"]
    table = content.inversions_table(evaluation)
    assert table is not None
    assert [table.rows[0][1].text, table.foot[0].text, table.foot_label] == ["100.00", "20.00", "all regions"]
    save_evaluation(dataclasses.replace(evaluation, name="B"), tmp_path / "B")
    assert cli.main(["compare", str(tmp_path / "A"), str(tmp_path / "B"), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("| all | B | 2 | 100.00 |") == 1
    assert said.count("| all regions | B | 2 | 20.00 |") == 1
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["inversions"]
    assert [row["region"] for row in rows] == [*ALIKE, "(all)"]


def test_the_preview_tells_regions_apart() -> None:
    entry = {"expected_dice": {name: {"mean": 0.5, "sd": None} for name in ("whole tumor", "WT")}}
    assert quality_lines({**entry, "unreliable_regions": ["WT"]}) == [
        "Dice of validation cases with these sequences: whole tumor 0.50, WT 0.50.",
        "Unreliable from these sequences: WT.",
    ]
