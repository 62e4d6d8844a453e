"""Where the files of an evaluation are: as given, else as it says itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from evaluation_cases import DATASET_JSON, synthetic_evaluation, write_study

from nnunetv2_mgml.scoring.info import EvaluatedModel, EvaluationInfo, Source
from nnunetv2_mgml.scoring.results import Evaluation
from nnunetv2_mgml.scoring.sources import find_files


@pytest.fixture
def study(tmp_path: Path) -> Path:
    root = write_study(tmp_path / "study", cases=1)
    (root / "images").mkdir()
    return root


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
