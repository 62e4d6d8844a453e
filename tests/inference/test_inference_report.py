"""``mgml_prediction.json`` while a prediction runs, and after it was continued."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_cases import DATASET_JSON, synthetic_evaluation

from nnunetv2_mgml.inference import report as module
from nnunetv2_mgml.inference.earlier import Earlier
from nnunetv2_mgml.inference.preprocessing import Item
from nnunetv2_mgml.inference.report import PredictionReport
from nnunetv2_mgml.io.prediction_reports import REPORT_NAME
from nnunetv2_mgml.scoring.subset_report import write_subset_report

CHANNELS = ("t1", "t1ce", "t2", "flair")


def item(case: str) -> Item:
    return Item(case, np.zeros((4, 1, 1, 1)), {}, (True, False, False, True), files={"t1": f"{case}_0000.nii.gz"})


def stored(folder: Path) -> dict:
    return json.loads((folder / REPORT_NAME).read_text())


def test_the_file_grows_while_cases_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = PredictionReport(str(tmp_path), {}, CHANNELS)
    report.begin(["a", "b", "c"], [])
    report.add_item(item("a"))
    report.finish("a")
    assert {name: entry["status"] for name, entry in stored(tmp_path)["cases"].items()} == {
        "a": "predicted",
        "b": "pending",
        "c": "pending",
    }
    assert stored(tmp_path)["finished"] is None
    report.finish("b")
    assert stored(tmp_path)["cases"]["b"]["status"] == "pending"  # not more often than every few seconds
    monkeypatch.setattr(module, "SECONDS_BETWEEN_WRITES", 0.0)
    report.finish("c", "no disk")
    assert stored(tmp_path)["cases"]["b"]["status"] == "predicted"
    report.save()
    assert stored(tmp_path)["finished"] is not None


def test_continuing_keeps_what_is_known_of_skipped_cases(tmp_path: Path) -> None:
    first = PredictionReport(str(tmp_path), {}, CHANNELS)
    first.begin(["a", "b", "c", "d"], [])
    for case in ("a", "b", "c"):
        first.add_item(item(case))
    first.finish("a")
    first.finish("c", "broken")
    first.save()
    again = PredictionReport(str(tmp_path), {}, CHANNELS, keep=True)
    again.begin(["d"], ["a", "b", "c", "e"])
    again.save()
    cases = stored(tmp_path)["cases"]
    assert {name: entry["status"] for name, entry in cases.items()} == {
        "a": "predicted",
        "b": "skipped",
        "c": "skipped",
        "d": "pending",
        "e": "skipped",
    }
    assert cases["a"]["present"] == cases["b"]["present"] == ["t1", "flair"]
    assert "error" not in cases["c"]


def test_expected_dice_comes_with_its_bound_and_policy(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps(DATASET_JSON))
    write_subset_report(synthetic_evaluation(), tmp_path)
    report = PredictionReport(str(tmp_path / "out"), {"folder": str(tmp_path)}, CHANNELS)
    report.add_item(item("a"))
    report.save()
    content = stored(tmp_path / "out")
    assert set(content["cases"]["a"]["expected_dice"]) == {"whole tumor", "tumor core", "enhancing tumor"}
    assert content["expected_dice_from"]["reliability_bound"] == 0.5
    assert content["expected_dice_from"]["policy"] == "brats"


def test_a_run_without_parts_keeps_what_the_reports_of_the_parts_know(tmp_path: Path) -> None:
    for part in (0, 1):
        one = PredictionReport(str(tmp_path), {}, CHANNELS, part_id=part, num_parts=2)
        one.begin([f"case_{part}"], [])
        one.finish(f"case_{part}")
        one.cases[f"case_{part}"]["present"] = ["t1"]
        one.save()
    (tmp_path / "mgml_prediction_part9of2.json").write_text("[1, ")
    whole = PredictionReport(str(tmp_path), {}, CHANNELS, keep=True)
    whole.begin(["case_2"], ["case_0", "case_1"])
    whole.finish("case_2")
    whole.save()
    cases = json.loads((tmp_path / "mgml_prediction.json").read_text())["cases"]
    assert {name: entry["status"] for name, entry in cases.items()} == {f"case_{i}": "predicted" for i in range(3)}
    assert cases["case_0"]["present"] == cases["case_1"]["present"] == ["t1"]


def test_of_a_case_the_run_that_began_last_counts(tmp_path: Path) -> None:
    old = PredictionReport(str(tmp_path), {"folds": [0]}, CHANNELS, part_id=0, num_parts=2)
    old.begin(["a", "b"], [])
    old.finish("a")
    old.finish("b")
    old.save()
    assert Earlier(tmp_path).unfinished == set()
    new = PredictionReport(str(tmp_path), {"folds": [1]}, CHANNELS)
    new.begin(["a", "b"], [])  # killed at once: what is there is of the run before
    assert Earlier(tmp_path).unfinished == {"a", "b"}
    new.finish("b")
    new.save()
    assert Earlier(tmp_path).unfinished == {"a"}
    Earlier(tmp_path).refuse_other_settings({"folds": [1]}, CHANNELS, ["b"])
    with pytest.raises(ValueError, match=r"\(case b\): folds was \[1\], is now \[0\]\. Use another"):
        Earlier(tmp_path).refuse_other_settings({"folds": [0]}, CHANNELS, ["b"])


def test_weights_are_those_of_the_folds_that_both_runs_have(tmp_path: Path) -> None:
    report = PredictionReport(str(tmp_path), {"checkpoint_size_and_time_ns": {"0": [7, 1], "1": None}}, CHANNELS)
    report.finish("a")
    report.save()
    earlier = Earlier(tmp_path)
    for same in ({"0": [7, 1]}, {"1": None, "2": [7, 5]}):
        earlier.refuse_other_settings({"checkpoint_size_and_time_ns": same}, CHANNELS, ["a"])
    for other in ({"0": [7, 2]}, {"0": [7, 1], "1": [7, 1]}, None):
        with pytest.raises(ValueError, match="weights have been replaced"):
            earlier.refuse_other_settings({"checkpoint_size_and_time_ns": other}, CHANNELS, ["a"])


def test_settings_that_mean_the_same_are_the_same(tmp_path: Path) -> None:
    before = {"folds": [0, 1], "missing_modalities": ["t1gd", "auto"], "folder": str(tmp_path), "device": "cuda"}
    report = PredictionReport(str(tmp_path), before, CHANNELS)
    report.finish("a")
    report.save()
    (tmp_path / "link").symlink_to(tmp_path)
    now = {"folds": [1, 0], "missing_modalities": ["auto,t1ce"], "folder": str(tmp_path / "link"), "device": "cpu"}
    Earlier(tmp_path).refuse_other_settings(now, CHANNELS, ["a"])


def test_reports_say_nothing_of_what_another_run_has_replaced(tmp_path: Path) -> None:
    def predict(*cases: str, **part: int) -> None:
        report = PredictionReport(str(tmp_path), {}, CHANNELS, **part)
        report.begin(cases, [])
        for case in cases:
            report.finish(case)
        report.save()

    def described() -> dict[str, list[str]]:
        files = sorted(tmp_path.glob("mgml_prediction*.json"))
        return {file.name: list(json.loads(file.read_text())["cases"]) for file in files}

    predict("a", "b", "c")
    predict("b", part_id=1, num_parts=3)
    assert described() == {"mgml_prediction.json": ["a", "c"], "mgml_prediction_part1of3.json": ["b"]}
    predict("b", "c", part_id=0, num_parts=2)
    assert described() == {"mgml_prediction.json": ["a"], "mgml_prediction_part0of2.json": ["b", "c"]}
    predict("a", "b", "c")
    assert described() == {"mgml_prediction.json": ["a", "b", "c"]}
    (tmp_path / "mgml_prediction.json").write_text("[1, ")
    predict("b", part_id=1, num_parts=2)
    assert (tmp_path / "mgml_prediction.json").read_text() == "[1, "


def test_a_part_reports_on_its_own_cases_only(tmp_path: Path) -> None:
    whole = PredictionReport(str(tmp_path), {}, CHANNELS)
    whole.begin(["a", "b"], [])
    for case in ("a", "b"):
        whole.add_item(item(case))
        whole.finish(case)
    whole.save()
    part = PredictionReport(str(tmp_path), {}, CHANNELS, keep=True, part_id=0, num_parts=2)
    part.begin([], ["a"])
    part.save()
    cases = json.loads((tmp_path / "mgml_prediction_part0of2.json").read_text())["cases"]
    assert {name: (entry["status"], entry["present"]) for name, entry in cases.items()} == {
        "a": ("predicted", ["t1", "flair"])
    }
