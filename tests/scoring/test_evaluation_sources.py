"""Where the files of an evaluation are: as given, else as it says itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from evaluation_cases import DATASET_JSON, synthetic_evaluation, write_study

from nnunetv2_mgml.scoring.info import EvaluatedModel, EvaluationInfo, Source
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.scoring.sources import find_files, find_references, pair_cases


@pytest.fixture
def study(tmp_path: Path) -> Path:
    root = write_study(tmp_path / "study", cases=1)
    (root / "images").mkdir()
    return root


def write_report(folder: Path, cases: dict[str, dict[str, object]], name: str = "mgml_prediction.json") -> None:
    (folder / name).write_text(json.dumps({"started": name, "cases": cases}))


def test_what_the_prediction_says_of_its_files_counts(tmp_path: Path) -> None:
    root = write_study(tmp_path, cases=5)
    folders = {"t1": root / "predictions" / "t1", "t1ce+flair": root / "predictions" / "flair"}
    references = find_references(root / "labels", ".nii.gz")
    write_report(folders["t1"], {"case_0": {"status": "failed", "present": ["t1"]}, "case_1": {"status": "pending"}})
    right = {"status": "predicted", "present": ["T1Gd", "flair"]}
    wrong = {"status": "predicted", "present": ["t1ce"]}
    write_report(folders["t1ce+flair"], {"case_2": wrong, "case_3": right, "case_4": {"status": "skipped"}})
    with pytest.raises(
        FileNotFoundError, match=r"2 predictions are missing for 2 .*case_0\.nii\.gz \(failed, by mgml_"
    ):
        pair_cases(references, folders, ".nii.gz")
    found = pair_cases(references, folders, ".nii.gz", allow_missing=True)
    assert ([task.case for task in found.tasks], found.missing) == (
        ["case_3", "case_4"],
        ["case_0", "case_1", "case_2"],
    )
    (folders["t1"] / "mgml_prediction.json").unlink()
    with pytest.raises(ValueError, match=r"1 predictions of 1 .*case_2\.nii\.gz is from t1ce, not t1ce\+flair"):
        pair_cases(references, folders, ".nii.gz")
    write_report(folders["t1ce+flair"], {"case_2": right}, "mgml_prediction_part0of2.json")
    assert len(pair_cases(references, folders, ".nii.gz").tasks) == 5, "of a case the run that began last counts"


def evaluation(source: Source, model: EvaluatedModel | None = None) -> Evaluation:
    return dataclasses.replace(synthetic_evaluation(), info=EvaluationInfo(source=source, model=model))


def test_finished_predictions_are_found_where_they_were_scored(study: Path, tmp_path: Path) -> None:
    folders = {name: study / "predictions" / name for name in ("t1", "flair")}
    source = Source("predictions", labels=study / "labels", folders={**folders, "t2": study / "gone"})
    files = find_files(evaluation(source), tmp_path, images=study / "images")
    assert files.predictions == folders
    assert (files.images, files.labels, files.file_ending) == (study / "images", study / "labels", ".nii.gz")


def test_predictions_of_the_evaluation_itself_come_first(study: Path, tmp_path: Path) -> None:
    source = Source("folder", images=study / "images", labels=study / "labels", folders={"t2": study / "labels"})
    assert set(find_files(evaluation(source), study).predictions) == {"t1", "flair"}
    named = find_files(evaluation(source), study, predictions={"T1Gd": study / "predictions" / "t1"})
    assert named.predictions == {"t1ce": study / "predictions" / "t1"}


def test_dataset_json_of_the_model_is_the_last_resort(study: Path, tmp_path: Path) -> None:
    (study / "dataset.json").unlink()
    source = Source("folder", images=study / "images", labels=study / "labels")
    with pytest.raises(FileNotFoundError, match=r"No dataset\.json"):
        find_files(evaluation(source), study)
    (tmp_path / "dataset.json").write_text(json.dumps({**DATASET_JSON, "file_ending": ".nii"}))
    assert find_files(evaluation(source, EvaluatedModel(tmp_path)), study).file_ending == ".nii"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("predictions", labels=Path("l")), "does not say where its images are"),
        (Source("folder", images=Path("i")), "does not say where its label maps are"),
        (Source("folder", images=Path("i"), labels=Path("l")), "No predictions: .*predictions does not exist"),
        (Source("folder", images=Path("i"), labels=Path("l"), folders={"t1": Path("gone")}), "No predictions: gone"),
    ],
)
def test_what_is_not_there_is_named(source: Source, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        find_files(evaluation(source), tmp_path)


def test_predictions_of_other_subsets_are_refused(study: Path) -> None:
    source = Source("folder", images=study / "images", labels=study / "labels")
    with pytest.raises(ValueError, match="none of the evaluated subsets: t2"):
        find_files(evaluation(source).restricted(["t2"]), study)
